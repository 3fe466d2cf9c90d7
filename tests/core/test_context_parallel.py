"""Context parallelism: how packs are cut, and that a run cut so is the same run.

Attention across the ranks is Transformer Engine's, on GPUs alone. Here a stand-in takes its place, which gathers the
sequences, so that everything else (the cut, labels, streams, denominators, reductions, log-probs) runs as it does
there.
"""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

from tests.helpers import small


def test_a_pack_is_cut_as_megatron_core_rotates_it():
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    from pctrain.core.layers.context_parallel import positions

    size, bounds, tokens = 4, [0, 16, 40, 48], 64
    taken = [positions(torch.tensor(bounds, dtype=torch.int32), tokens, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(taken).sort().values, torch.arange(tokens))
    for rank, mine in enumerate(taken):
        expected, ends = [], [*bounds, tokens]
        for a, b in pairwise(ends):
            within = torch.arange(b - a)
            expected.append(a + _get_thd_freqs_on_this_cp_rank(rank, size, torch.empty((b - a) // size), within))
        assert mine.tolist() == torch.cat(expected).tolist()


class _Gather(torch.autograd.Function):
    """Gather [T / size, ...] of every rank to [T, ...] in the pack's order; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, x, cu_seqlens):
        from megatron.core import parallel_state

        from pctrain.core.layers.context_parallel import positions

        group = parallel_state.get_context_parallel_group()
        shares = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(shares, x.contiguous(), group=group)
        cut = [positions(cu_seqlens, len(x) * group.size(), rank, group.size()) for rank in range(group.size())]
        ctx.mine, ctx.group = cut[group.rank()], group
        whole = x.new_empty(len(x) * group.size(), *x.shape[1:])
        whole[torch.cat(cut)] = torch.cat(shares)
        return whole

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[ctx.mine], None


def _stand_in():
    """The torch spec, with its refusal of context parallelism taken out and its attention run on gathered sequences."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from pctrain.core.layers import spec as layers
    from pctrain.core.layers.context_parallel import positions
    from pctrain.core.layers.packed_attention import PackedSDPA

    alone, build = PackedSDPA.forward, DotProductAttention.__init__

    def attend(self, query, key, value, *args, packed_seq_params, **kwargs):
        cu_seqlens, group = packed_seq_params.cu_seqlens_q, parallel_state.get_context_parallel_group()
        whole = [_Gather.apply(x, cu_seqlens) for x in (query, key, value)]
        out = alone(self, *whole, *args, packed_seq_params=packed_seq_params, **kwargs)
        return out[positions(cu_seqlens, len(out), group.rank(), group.size())]

    def build_alone(self, config, *args, **kwargs):
        with mock.patch.object(config, "context_parallel_size", 1):
            build(self, config, *args, **kwargs)

    return (
        mock.patch.object(PackedSDPA, "forward", attend),
        mock.patch.object(DotProductAttention, "__init__", build_alone),
        mock.patch.object(layers, "choose_spec", return_value="torch"),
        # For packed sequences in Transformer Engine's format megatron-core leaves the angles whole, too.
        mock.patch.object(
            rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", lambda pos_emb, seq_dim, cp_group: pos_emb
        ),
    )


def _train(directory, layout, steps):
    from contextlib import ExitStack

    with ExitStack() as stack:
        for patch in _stand_in() if layout.get("context", 1) > 1 else ():
            stack.enter_context(patch)
        model = small.learner(directory, layout)
        before = model.logprobs(small.rows(6), small.BUDGET)
        updates = [small.step(model, i) for i in range(steps)]
        return before, [u.loss for u in updates], [u.grad_norm for u in updates]


@pytest.mark.parametrize("layout, world", [
    ({"context": 2}, 2),
    ({"context": 2, "tensor": 2, "sequence_parallel": True}, 4),
    pytest.param({"context": 2}, 4, marks=pytest.mark.full),
    pytest.param({"context": 2, "pipeline": 2}, 4, marks=pytest.mark.full),
    pytest.param({"context": 4}, 4, marks=pytest.mark.full),
], ids=["CP2", "CP2 x TP2 with sequence parallel", "CP2 x DP2", "CP2 x PP2", "CP4"])  # fmt: skip
def test_a_run_whose_sequences_are_cut_is_the_same_run(ranks, hf_dirs, layout, world):
    steps = 3
    [alone] = ranks.run(_train, hf_dirs[True], {}, steps, world=1)
    for before, losses, norms in ranks.run(_train, hf_dirs[True], layout, steps, world=world):
        for ours, expected in zip(before, alone[0], strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)  # fp32 sums in another order
        np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
        np.testing.assert_allclose(norms, alone[2], rtol=1e-4)


def _build(directory, layout):
    small.learner(directory, layout)


def test_the_torch_spec_refuses_it(ranks, hf_dirs):
    from tests.helpers.ranks import RanksFailed

    with pytest.raises(RanksFailed, match=r"parallel.context needs the layer spec te .* but this model runs on torch"):
        ranks.run(_build, hf_dirs[True], {"context": 2}, world=2)
