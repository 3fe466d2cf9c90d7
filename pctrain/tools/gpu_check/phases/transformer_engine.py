"""The layer spec te: steps against torch-varlen, resume, and a step with 8-bit products."""

from __future__ import annotations

import torch

from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check, SkipPhase

STEPS = 6
FIRST_LOSS, LAST_LOSS = 0.01, 0.05  # relative: two implementations in bf16, and what their rounding adds up to
FP8_LOSS = 0.03  # of the first step
LATER = 1e-3  # resumed against not resumed: attention's backward adds in any order
FP8_CAPABILITY = (9, 0)


def run(check: Check) -> None:
    """Compare te with torch-varlen and with itself after a resume."""
    if not check.gpu:
        raise SkipPhase("needs a GPU")
    directory, rows = learning.model(check, shallow=True), learning.rows(check)
    with learning.learner(check, directory, "torch-varlen", "bfloat16") as learner:
        varlen = learning.steps(check, learner, rows, STEPS)
    folder, half = check.folder / "step", STEPS // 2
    with learning.learner(check, directory, "te", "bfloat16") as learner:
        check.expect("layer spec", "layer spec te" in learner.describe(), learner.describe())
        te = learning.steps(check, learner, rows, half)
        learning.save(learner, folder)
        te += learning.steps(check, learner, rows, STEPS - half)
    for name, index, bound in (("first", 0, FIRST_LOSS), ("last", -1, LAST_LOSS)):
        check.measure(f"te against torch-varlen: {name} loss", abs(te[index] / varlen[index] - 1), at_most=bound)
    with learning.learner(check, directory, "te", "bfloat16") as learner:
        learner.load(folder)
        resumed = learning.steps(check, learner, rows, STEPS - half)
    difference = max(abs(a / b - 1) for a, b in zip(resumed, te[half:], strict=True))
    check.measure("resumed te: losses", difference, "relative", at_most=LATER)
    _fp8(check, te[0])


def _fp8(check: Check, first: float) -> None:
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        check.skip("a step with 8-bit products", "needs compute capability 9.0")
        return
    directory, rows = learning.model(check, shallow=True), learning.rows(check)
    with learning.learner(check, directory, "te", "bfloat16", fp8="tensorwise") as learner:
        losses = learning.steps(check, learner, rows, 2)
    check.measure("first loss with 8-bit products", abs(losses[0] / first - 1), "relative", at_most=FP8_LOSS)
    check.expect("a second step with 8-bit products", losses[1] < losses[0], f"{losses[0]:.4f}, {losses[1]:.4f}")
