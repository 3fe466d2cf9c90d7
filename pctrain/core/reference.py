"""The reference model of a KL term: the weights that a run started from, used instead of the trained ones for a pass.

There is no second module. For the time of the pass the parameters get other storage, and afterwards their own again.
The buffers of the optimizer and of data parallelism, which the parameters are views of, are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pctrain.common.device import device, on_gpu


class Reference:
    """This rank's shards of the start weights, with the parameters' shapes and dtypes."""

    def __init__(self, modules: Sequence[torch.nn.Module], *, load: Callable[[], None], offload: bool):
        """Load the start weights.

        Args:
            modules: this rank's part of the model.
            load: writes the start weights into the modules' parameters, in place. It may be collective.
            offload: keep them in host memory; without effect if the parameters are there themselves.
        """
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        tensors = [torch.zeros_like(parameter, requires_grad=False) for parameter in self._parameters]
        with self._holding(tensors):
            load()
        self._tensors = [_pinned_copy(tensor) for tensor in tensors] if offload and on_gpu() else tensors

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the modules compute with the start weights. They must not be trained meanwhile."""
        with self._holding([tensor.to(device(), non_blocking=True) for tensor in self._tensors]):
            yield

    @contextmanager
    def _holding(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        trained = [parameter.data for parameter in self._parameters]
        try:
            for parameter, tensor in zip(self._parameters, tensors, strict=True):
                parameter.data = tensor
            yield
        finally:
            for parameter, tensor in zip(self._parameters, trained, strict=True):
                parameter.data = tensor


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to pinned host memory without waiting. Only later work of the same stream may read the copy."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
