"""Which engine answers which request, and how every rank gets every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from pctrain.common.errors import UserError

T = TypeVar("T")


class EngineGroups:
    """The ranks in groups of `tensor` neighbours, one engine a group: group = rank // tensor.

    vLLM builds the same groups of neighbours from the learner's world (its "external data parallel"), whatever the number of groups.
    Without torch.distributed there is one group of one rank. Making one is collective.
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
        # Completions are Python objects: they travel over gloo, also where the learner's own group is NCCL.
        self._gloo = None
        if self.world > 1 and "gloo" not in dist.get_backend():
            self._gloo = dist.new_group(backend="gloo")

    def share(self, items: Sequence[T]) -> list[T]:
        """This engine's items: every `count`-th, so that prompts of one batch spread evenly."""
        return list(items[self.index :: self.count])

    def gather(self, mine: list[T]) -> list[list[T]]:
        """What each engine made, in the order of the engines, on every rank. All ranks of an engine must have made the same."""
        if self.world == 1:
            return [mine]
        by_rank: list = [None] * self.world
        dist.all_gather_object(by_rank, mine, group=self._gloo)
        for rank, made in enumerate(by_rank):
            if made != by_rank[rank - rank % self.tensor]:
                raise RuntimeError(
                    f"the tensor parallel ranks {rank - rank % self.tensor} and {rank} of one engine sampled different "
                    "tokens: their requests or weights differ"
                )
        return by_rank[:: self.tensor]

    def unshare(self, by_engine: list[list[T]], total: int) -> list[T]:
        """Undoes `share`: all items in their first order."""
        items: list = [None] * total
        for index, made in enumerate(by_engine):
            items[index :: self.count] = made
        return items

    def close(self) -> None:
        if self._gloo is not None:
            dist.destroy_process_group(self._gloo)
            self._gloo = None
