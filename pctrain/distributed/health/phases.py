"""Seconds that this rank spends in each phase (`watchdog.phase`), without those that it waits for other ranks.

A phase's seconds exclude those of phases nested in it. This module does not import torch: `distributed.waits` adds the
seconds spent waiting.
"""

from __future__ import annotations

import time
from collections import defaultdict

_phases: list[str] = []
_since = 0.0  # when the innermost phase began or resumed
_seconds: defaultdict[str, float] = defaultdict(float)
_waits: defaultdict[str, float] = defaultdict(float)


def enter(name: str) -> None:
    """Begin a phase inside the current one."""
    _settle()
    _phases.append(name)


def leave() -> None:
    """End the innermost phase."""
    _settle()
    _phases.pop()


def current() -> str | None:
    """Return the innermost phase, if any."""
    return _phases[-1] if _phases else None


def waited(phase: str, seconds: float) -> None:
    """Record that `seconds` of a phase were spent in a collective."""
    _waits[phase] += seconds


def take() -> dict[str, float]:
    """Return {phase: seconds of this rank's own work, without waits} since the last call."""
    _settle()
    own = {phase: max(0.0, seconds - _waits[phase]) for phase, seconds in _seconds.items()}
    _seconds.clear()
    _waits.clear()
    return own


def _settle() -> None:
    global _since
    now = time.perf_counter()
    if _phases:
        _seconds[_phases[-1]] += now - _since
    _since = now
