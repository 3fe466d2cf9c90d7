"""torch as it is installed, whatever an earlier test of the same process has made of it."""

from collections.abc import Iterator

import pytest
import torch

MODULES = (torch.cuda, torch.accelerator)
ORIGINALS = [dict(vars(module)) for module in MODULES]  # read while tests are collected, so before any has run


@pytest.fixture(scope="module", autouse=True)
def torch_as_installed() -> Iterator[None]:
    """Undo what vLLM's CPU engine replaces in torch, such as `torch.cuda.Event`, and bring it back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for module, originals in zip(MODULES, ORIGINALS, strict=True):
            for name, value in originals.items():
                if getattr(module, name) is not value:
                    patch.setattr(module, name, value)
        yield
