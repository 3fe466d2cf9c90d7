"""The entries of an RL step in the compute ledger."""

from __future__ import annotations

from collections.abc import Sequence

from pctrain.compute.ledger import Ledger
from pctrain.rl.batch import Batch
from pctrain.rl.groups import Group, Sampled, lengths_of
from pctrain.rl.update import Updates


def add_step(ledger: Ledger, step: int, sampled: Sampled, batch: Batch, updates: Updates) -> None:
    """Add all the compute of one step: sampling, passes without gradients, updates."""
    _add_groups(ledger, step, "rollout", sampled.kept, sampled.rollout_seconds)
    # Rejected groups were sampled together with the kept ones, whose entry has the seconds.
    _add_groups(ledger, step, "rollout_rejected", sampled.rejected, 0.0)
    for model_pass in batch.passes:
        ledger.add(step, model_pass.phase, [len(row) for row in model_pass.rows], model_pass.seconds)
    # Rollouts and expert trajectories are separate entries: the paper's formulas have a mean length for each.
    total = sum(map(len, batch.rows))
    for is_expert in (False, True):
        lengths = [len(row) for row in batch.rows if row.member.is_expert == is_expert]
        if lengths:
            ledger.add(step, "rl_update", lengths, updates.seconds * sum(lengths) / total)


def _add_groups(ledger: Ledger, step: int, phase: str, groups: Sequence[Group], seconds: float) -> None:
    if groups:
        ledger.add(step, phase, lengths_of(groups), seconds)
