"""Gathers and reduce-scatters unequal shares over gloo, which has both for equal shares only.

Experts over tensor parallel ranks exchange unequal numbers of tokens. gloo's all-to-all takes unequal shares, so both
operations are built on it. A sum runs over the ranks in their order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from pctrain.core.patches.patch import Patch, without_gpu


def _apply() -> None:
    gather_equal = mappings._gather_along_first_dim
    reduce_scatter_equal = mappings._reduce_scatter_along_first_dim

    def gather(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if group.size() == 1 or output_split_sizes is None:
            return gather_equal(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, copies, output_split_sizes, [len(input_)] * group.size(), group=group)
        return output

    def reduce_scatter(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if group.size() == 1 or input_split_sizes is None:
            return reduce_scatter_equal(input_, group, input_split_sizes, use_global_buffer)
        own_size = input_split_sizes[group.rank()]
        parts = input_.new_empty(group.size() * own_size, *input_.shape[1:])
        own_sizes = [own_size] * group.size()
        dist.all_to_all_single(parts, input_.contiguous(), own_sizes, input_split_sizes, group=group)
        return parts.view(group.size(), own_size, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="experts over tensor parallel ranks gather and reduce-scatter unequal shares, which gloo cannot",
    test="tests/core/test_experts.py::test_training_at_any_layout_is_the_same_run",
    apply=_apply,
    is_needed=without_gpu,
)
