"""The description of one upstream patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pctrain.common.device import on_gpu


def always() -> bool:
    """Return True: the patch is needed on every machine."""
    return True


def without_gpu() -> bool:
    """Return True where this process has no GPU."""
    return not on_gpu()


@dataclass(frozen=True)
class Patch:
    """A change to an upstream package.

    Attributes:
        package: the distribution whose behavior changes.
        version: the version that the patch was written and tested for.
        reason: what goes wrong without it.
        test: `file::function` of a test that fails without it.
        apply: makes the change; called at most once per process.
        is_needed: returns False where the change is not needed.
    """

    package: str
    version: str
    reason: str
    test: str
    apply: Callable[[], None]
    is_needed: Callable[[], bool] = always
