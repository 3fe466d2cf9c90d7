"""How long this rank is in each phase (`health.phase`), and how much of that it stands in collectives, waiting for other ranks.

The seconds of a phase are its own: those of phases inside it count for them alone. No torch here: `core.waits` adds the waits.
"""

from __future__ import annotations

import time
from collections import defaultdict

_phases: list[str] = []
_since = 0.0  # when the innermost phase began, or went on
_seconds: defaultdict[str, float] = defaultdict(float)
_waits: defaultdict[str, float] = defaultdict(float)


def enter(name: str) -> None:
    _settle()
    _phases.append(name)


def leave() -> None:
    _settle()
    _phases.pop()


def current() -> str | None:
    """The innermost phase."""
    return _phases[-1] if _phases else None


def waited(phase: str, seconds: float) -> None:
    """`seconds` of a phase went by in a collective."""
    _waits[phase] += seconds


def take() -> dict[str, float]:
    """{phase: seconds of this rank's own work, without the waits} since the last call."""
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
