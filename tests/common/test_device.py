"""Copies of several tensors to a GPU, as far as a CPU shows them."""

import pytest
import torch

from pctrain.common import device as devices

TENSORS = [
    torch.arange(7),
    torch.tensor([True, False, True]),
    torch.empty(0, dtype=torch.int64),
    torch.tensor([0, 3, 9], dtype=torch.int32),
    torch.randn(5),
    torch.randn(4, 6).t(),  # not contiguous
]


@pytest.fixture
def copies(monkeypatch):
    """Take the path of a GPU, whose memory is the host's; return (bytes, options) of each copy to it."""
    made = []
    empty, to = torch.empty, torch.Tensor.to

    def pinned(*arguments, pin_memory=False, **options):
        made.append("pinned" if pin_memory else "pageable")
        return empty(*arguments, **options)

    def counted(self, *arguments, **options):
        made.append((self.nbytes, arguments, options))
        return to(self, *arguments, **options, copy=True)

    monkeypatch.setattr(devices, "on_gpu", lambda: True)
    monkeypatch.setattr(devices, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "to", counted)
    return made


def test_all_tensors_go_in_one_pinned_copy_that_nobody_waits_for(copies):
    placed = devices.to_device(TENSORS)
    assert copies == ["pinned", (64 + 16 + 16 + 32 + 96, (torch.device("cpu"),), {"non_blocking": True})]
    for before, after in zip(TENSORS, placed, strict=True):
        assert torch.equal(after, before) and after.dtype == before.dtype
        assert after.data_ptr() % 16 == 0


def test_a_cpu_copies_nothing():
    assert all(a is b for a, b in zip(devices.to_device(TENSORS), TENSORS, strict=True))
