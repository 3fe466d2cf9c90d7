"""Checkpoints: a background save and SIGKILL, a save before the first step, and a mixture of experts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pctrain.tools.gpu_check import learning, models
from pctrain.tools.gpu_check.check import Check

BEFORE, AFTER = 3, 3  # steps before and after the save
# The first loss after a resume comes from a forward pass alone, which has a fixed order of sums. A GPU's attention
# backward adds in any order.
LATER = 1e-3  # relative


def run(check: Check) -> None:
    """Train, save, die and resume; then the two cases in one process."""
    checkpoint = str(check.folder / "step-3")
    before = check.program("train_and_save", dies=True, checkpoint=checkpoint)
    check.measure("save: until training continues", before["blocked"], "s")
    check.measure("save: until it is complete", before["complete"], "s")
    after = check.program("resume", checkpoint=checkpoint)
    _equal(check, "killed and resumed", after["losses"], before["losses"])
    _equal(check, "saved before the first step", *after["unstarted"])
    _equal(check, "a mixture of experts", *after["experts"])


def _equal(check: Check, name: str, got: list[float], want: list[float]) -> None:
    check.expect(f"{name}: first loss, same bits", got[0] == want[0], f"{got[0]!r} and {want[0]!r}")
    difference = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
    check.measure(f"{name}: all losses", difference, "relative", at_most=LATER if check.gpu else 0.0)


# ---- in processes of their own -------------------------------------------------------------------------------------


def train_and_save(check: Check, checkpoint: str) -> dict[str, Any]:
    """Train, save in the background while training continues, and return the losses after the save."""
    folder = Path(checkpoint)
    folder.mkdir(parents=True)
    done: list[float] = []
    rows = learning.rows(check)
    with learning.learner(check, learning.model(check, shallow=True), "torch", "float32") as learner:
        learning.steps(check, learner, rows, BEFORE)
        began = time.perf_counter()
        learner.save(folder, lambda: done.append(time.perf_counter() - began))
        blocked = time.perf_counter() - began
        losses = learning.steps(check, learner, rows, AFTER)
        learner.poll_save(wait=True)
    return {"losses": losses, "blocked": blocked, "complete": done[0]}


def resume(check: Check, checkpoint: str) -> dict[str, Any]:
    """Resume from the checkpoint; then run the cases that need no second process."""
    directory, rows = learning.model(check, shallow=True), learning.rows(check)
    with learning.learner(check, directory, "torch", "float32") as learner:
        learner.load(Path(checkpoint))
        losses = learning.steps(check, learner, rows, AFTER)
    size = models.SHALLOW if check.gpu else models.TINY
    experts = models.mixture(check.folder / "experts", size)
    return {
        "losses": losses,
        "unstarted": _save_and_load(check, directory, 0),
        "experts": _save_and_load(check, experts, 1),
    }


def _save_and_load(check: Check, directory: Path, before: int) -> tuple[list[float], list[float]]:
    """Return the losses after a load in a new learner, and those of the learner that saved."""
    rows, folder = learning.rows(check), check.folder / f"saved-{directory.name}"
    with learning.learner(check, directory, "torch", "float32") as learner:
        learning.steps(check, learner, rows, before)
        learning.save(learner, folder)
        want = learning.steps(check, learner, rows, 2)
    with learning.learner(check, directory, "torch", "float32") as learner:
        learner.load(folder)
        got = learning.steps(check, learner, rows, 2)
    return got, want
