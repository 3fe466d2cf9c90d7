"""Packs on the device: what the head computes, and one copy per pack."""

from unittest import mock

import pytest
import torch

from pctrain.common import device as devices
from pctrain.core import device_pack, step
from pctrain.core.device_pack import DevicePack
from pctrain.core.model import attention_layout
from pctrain.data.packing import NO_LABEL, pack_rows
from tests.helpers import small

SHAPE = mock.Mock(num_attention_heads=4, kv_channels=8)


def _pack():
    return pack_rows(small.rows(6), small.BUDGET).packs[0]


@pytest.mark.parametrize("trained_only", [True, False])
@pytest.mark.parametrize("spec", ["torch", "torch-varlen", "te"])
def test_the_rows_of_the_head_are_those_with_a_label(spec, trained_only):
    pack = _pack()
    placed = DevicePack.place(
        pack, attention_layout(spec, SHAPE, pack.cu_seqlens, len(pack.tokens)), trained_only=trained_only
    )
    labels = [
        NO_LABEL if trained_only and weight == 0 else label
        for label, weight in zip(pack.labels.tolist(), pack.weights.tolist(), strict=True)
    ]
    assert placed.labels.tolist() == labels
    assert placed.labelled.tolist() == [i for i, label in enumerate(labels) if label != NO_LABEL]
    assert torch.equal(placed.tokens, pack.tokens) and torch.equal(placed.weights, pack.weights)


@pytest.mark.parametrize("spec", ["torch", "torch-varlen", "te"])
def test_everything_of_a_pack_goes_in_one_call(spec):
    """All tensors, those of the layout too, are moved together: none of them stays behind in host memory."""
    pack = _pack()
    layout = attention_layout(spec, SHAPE, pack.cu_seqlens, len(pack.tokens))
    with mock.patch.object(device_pack, "to_device", side_effect=lambda tensors: [t.to("meta") for t in tensors]) as to:
        placed = DevicePack.place(pack, layout, trained_only=True)
    assert to.call_count == 1
    tensors = [value for value in (*vars(placed).values(), *vars(placed.layout).values()) if torch.is_tensor(value)]
    assert len(tensors) >= 8 and all(tensor.device.type == "meta" for tensor in tensors)


def _copies_of_a_step(directory):
    """Return the packs of a step and its `to_device` calls, other tensors on the device, and counts of rows."""
    model = small.learner(directory, {})
    batch = model.pack(small.rows(), small.BUDGET)
    others, nonzero = mock.Mock(side_effect=devices.device), torch.Tensor.nonzero
    counted = mock.Mock(side_effect=lambda rows: rows)
    with (
        mock.patch.object(device_pack, "to_device", wraps=devices.to_device) as to,
        mock.patch.object(step, "device", others),
        mock.patch.object(torch.Tensor, "nonzero", lambda tensor: counted(nonzero(tensor))),
    ):
        small.step(model, 0)
        of_step = (to.call_count, others.call_count, counted.call_count)
        model.logprobs(small.rows(), small.BUDGET, trained_only=True)
    return len(batch.packs), of_step, (to.call_count, others.call_count, counted.call_count)


def test_a_micro_batch_is_one_copy(ranks, hf_dirs):
    packs, of_step, of_both = ranks.run(_copies_of_a_step, hf_dirs[True], world=1)[0]
    assert packs > 1
    assert of_step == (packs, 1, packs)  # the other one is the denominator, filled on the device
    assert of_both == (2 * packs, 1, 2 * packs)
