"""Validation loss along SFT, with its regimes and the starts of RL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pctrain.report.charts.chart import Chart, group_name, identity
from pctrain.report.looks import Look, flop_scale, run_looks
from pctrain.report.study_data import RLRun, SFTLoss, SFTRun, Study

COLUMNS = ("set", "seed", "step", "eflops_sft", "val_loss", "val_loss_se", "regime")


def build(study: Study) -> Chart | None:
    """Build the chart, or return None if no SFT run has a validation loss."""
    curves = [(run, run.best) for run in study.sft]
    runs = [(run, best) for run, best in curves if best is not None]
    if not runs:
        return None
    looks = run_looks(study)
    factor, unit = flop_scale(max(run.losses[-1].eflops_sft for run, _ in runs))
    in_chart = [run for run, _ in runs]
    spec = {
        "x": f"SFT compute ({unit})",
        "y": "validation loss (nats per token)",
        "series": [identity(run, looks, in_chart) | _series(study, run, best, looks, factor) for run, best in runs],
    }
    rows = [
        [run.set, run.seed, p.step, p.eflops_sft, p.val_loss, p.val_loss_se, p.regime]
        for run in in_chart
        for p in run.losses
    ]
    delta, delta2 = (f"{100 * value:.3g}" for value in (in_chart[0].delta, in_chart[0].delta2))
    caption = (
        f"Losses within {delta}% of the minimum (the ring) are stable. Points before the first stable one are "
        f"adaptive. Points after the last are mild, or severe from {delta2}% above the minimum on. Points outside the "
        f"band between stable ones are transient. The dotted lines are the two bounds. Filled markers show where RL "
        f"started."
    )
    return Chart("validation_loss", "Validation loss along SFT", caption, spec, COLUMNS, rows)


def _series(study: Study, run: SFTRun, best: SFTLoss, looks: Mapping[str, Look], factor: float) -> dict[str, Any]:
    return {
        "x": [p.eflops_sft * factor for p in run.losses],
        "y": [p.val_loss for p in run.losses],
        "se": [p.val_loss_se for p in run.losses],
        "steps": [p.step for p in run.losses],
        "regimes": [p.regime for p in run.losses],
        "bands": [{"from": b["from"] * factor, "to": b["to"] * factor, "regime": b["regime"]} for b in run.bands()],
        "minimum": {"x": best.eflops_sft * factor, "y": best.val_loss, "step": best.step},
        "bounds": [best.val_loss * (1 + run.delta), best.val_loss * (1 + run.delta2)],
        "starts": [_start(run, rl, looks[rl.name], factor) for rl in _starts_from(study, run)],
    }


def _start(sft: SFTRun, rl: RLRun, look: Look, factor: float) -> dict[str, Any]:
    """Return the marker of an RL start, at the height of the nearest validation."""
    nearest = min(sft.losses, key=lambda p: abs(p.eflops_sft - rl.eflops_sft))
    return {
        "name": group_name(rl),
        "x": rl.eflops_sft * factor,
        "y": nearest.val_loss,
        "colour": look.alone,
        "marker": look.marker,
    }


def _starts_from(study: Study, sft: SFTRun) -> list[RLRun]:
    """Return one run per start from the checkpoints of `sft`, because markers of several algorithms would overlap."""
    starts: dict[int, RLRun] = {}
    for run in study.rl:
        if run.start_step > 0 and study.sft_of(run) is sft:
            starts.setdefault(run.start_step, run)
    return list(starts.values())
