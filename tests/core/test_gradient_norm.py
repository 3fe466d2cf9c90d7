"""The gradient norm without one read of the device per parameter."""

from unittest import mock

import pytest
import torch
from megatron.core import utils
from torch.utils._python_dispatch import TorchDispatchMode

from pctrain.core.patches import gradient_norm
from tests.helpers import small


@pytest.mark.parametrize("count", [1, 7, 150])
def test_the_norm_has_the_bits_of_megatron_cores(count):
    sizes = torch.randint(1, 3000, (count,)).tolist()
    gradients = [torch.randn(size) for size in sizes]
    flag = torch.zeros(1, dtype=torch.int)
    (expected, _), (norm, _) = (
        function(2048 * 32, flag, [gradients], False) for function in (_of_megatron_core, gradient_norm.l2_norm)
    )
    assert torch.equal(norm, expected) and norm.dtype == expected.dtype


def _of_megatron_core(*arguments):
    """Call the original, which names a CUDA device for its result."""
    tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *values, device=None, **options: tensor(*values, **options))
        return utils.local_multi_tensor_l2_norm(*arguments)


class _Reads(TorchDispatchMode):
    """Counts the numbers that the host reads of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def _reads_of_a_step(directory):
    """Return how many numbers the gradient norm of a step reads, and the number of parameters."""
    model, reads = small.learner(directory, {}), _Reads()
    norm = model.optimizer.get_grad_norm

    def counted():
        with reads:
            return norm()

    with mock.patch.object(model.optimizer, "get_grad_norm", counted):
        small.step(model, 0)
    return reads.count, sum(1 for module in model.modules for _ in module.parameters())


def test_the_norm_is_read_once(ranks, hf_dirs):
    ((reads, parameters),) = ranks.run(_reads_of_a_step, hf_dirs[True], world=1)
    assert reads == 1 and parameters > 20
