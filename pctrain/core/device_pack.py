"""A pack on this rank's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from pctrain.common.device import to_device
from pctrain.data.packing import NO_LABEL, Pack


@dataclass(frozen=True)
class DevicePack:
    """T positions on the device: a pack, or this rank's share of one, with everything that model and head read."""

    tokens: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    padding: torch.Tensor  # bool [T]
    labels: torch.Tensor  # int64 [T]; NO_LABEL where the head computes nothing
    labelled: torch.Tensor  # int64 [n]; the positions with a label, ascending
    weights: torch.Tensor  # float32 [T]
    streams: dict[str, torch.Tensor]  # {name: float32 [T]}
    layout: PackedSeqParams

    @classmethod
    def place(cls, pack: Pack, layout: PackedSeqParams, *, trained_only: bool) -> DevicePack:
        """Copy a pack and its layout, both in host memory, to the device.

        With `trained_only`, tokens of weight 0 have no label. The labels are counted here, because a host would have to
        wait for a GPU to count them.
        """
        labels = pack.labels.masked_fill(pack.weights == 0, NO_LABEL) if trained_only else pack.labels
        labelled = (labels != NO_LABEL).nonzero().squeeze(1)
        bounds = {name: value for name, value in vars(layout).items() if isinstance(value, torch.Tensor)}
        own = [pack.tokens, pack.position_ids, pack.padding, labels, labelled, pack.weights]
        placed = iter(to_device([*own, *pack.streams.values(), *bounds.values()]))
        tokens, position_ids, padding, labels, labelled, weights = (next(placed) for _ in own)
        streams = {name: next(placed) for name in pack.streams}
        for name in bounds:
            setattr(layout, name, next(placed))
        return cls(tokens, position_ids, padding, labels, labelled, weights, streams, layout)
