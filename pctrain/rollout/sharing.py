"""Which engine answers which request, and how every rank gets every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from pctrain.common.errors import UserError

T = TypeVar("T")


class EngineGroups:
    """The ranks in groups of `tensor` neighbors, with one engine per group: group = rank // tensor.

    vLLM builds the same groups of neighbors from the learner's world (its "external data parallel"), whatever their
    number. Without torch.distributed there is one group of one rank. Construction is collective.
    """

    def __init__(self, tensor: int):
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.tensor = tensor
        if self.world % tensor:
            raise UserError(
                f"rollout.tensor={tensor} does not divide the world size {self.world}: "
                f"set rollout.tensor=1 or start a multiple of {tensor} ranks"
            )
        self.count = self.world // tensor
        self.index = self.rank // tensor
        # Completions are Python objects: they travel over gloo, also if the learner's own group is NCCL.
        self._gloo = None
        if self.world > 1 and "gloo" not in dist.get_backend():
            self._gloo = dist.new_group(backend="gloo")

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this engine's items: every `count`-th, so that the prompts of a batch spread evenly."""
        return list(items[self.index :: self.count])

    def gather(self, mine: list[T]) -> list[list[T]]:
        """Return every engine's items, in the order of the engines, on every rank.

        RuntimeError if the ranks of an engine have different items.
        """
        if self.world == 1:
            return [mine]
        by_rank: list = [None] * self.world
        dist.all_gather_object(by_rank, mine, group=self._gloo)
        for rank, items in enumerate(by_rank):
            first = rank - rank % self.tensor
            if items != by_rank[first]:
                raise RuntimeError(
                    f"the tensor parallel ranks {first} and {rank} of one engine sampled different tokens: their "
                    "requests or weights differ"
                )
        return by_rank[:: self.tensor]

    def unshare(self, by_engine: list[list[T]], total: int) -> list[T]:
        """Undo `share`: return all items in their original order."""
        items: list = [None] * total
        for index, of_engine in enumerate(by_engine):
            items[index :: self.count] = of_engine
        return items

    def close(self) -> None:
        """Destroy the process group that this object made."""
        if self._gloo is not None:
            dist.destroy_process_group(self._gloo)
            self._gloo = None
