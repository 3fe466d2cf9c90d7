"""The learning rate of every step, against its formula, also across a resume."""

import math

import pytest

from pctrain.config.tree import OptimizerConfig
from tests.helpers import small

TOTAL, WARMUP, DECAY, LR, MIN_LR = 12, 3, 4, 1e-3, 1e-4


def _formula(schedule: str, step: int) -> float:
    """`step` counts from 1."""
    if step <= WARMUP:
        return LR * step / WARMUP
    if schedule == "wsd":
        return MIN_LR + (LR - MIN_LR) * min(1.0, (TOTAL - step) / DECAY)
    if schedule == "cosine":
        return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP)))
    return LR


def _rates(directory, schedule, folder, resumed_at):
    optimizer = OptimizerConfig(
        lr=LR, min_lr=MIN_LR, schedule=schedule, warmup=WARMUP, decay=DECAY if schedule == "wsd" else 0
    )
    model = small.learner(directory, {}, optimizer=optimizer, total_steps=TOTAL)
    rates = [small.step(model, i).lr for i in range(resumed_at)]
    folder.mkdir()
    model.save(folder)
    model = small.learner(directory, {}, optimizer=optimizer, total_steps=TOTAL)
    model.load(folder)
    return rates + [small.step(model, i).lr for i in range(resumed_at, TOTAL)]


@pytest.mark.parametrize("schedule, resumed_at", [("wsd", 2), ("wsd", 10), ("cosine", 6), ("constant", 6)])
def test_every_step_has_the_rate_of_the_formula(ranks, hf_dirs, tmp_path, schedule, resumed_at):
    [rates] = ranks.run(_rates, hf_dirs[True], schedule, tmp_path / "step", resumed_at, world=1)
    assert rates == pytest.approx([_formula(schedule, step) for step in range(1, TOTAL + 1)], rel=1e-12)
    assert rates[-1] == pytest.approx(LR if schedule == "constant" else MIN_LR)
