"""Every FLOP of a run by phase, in the paper's count and in the exact one.

Two totals are the x of all curves: `eflops_sft` and `eflops_rl` (the latter from the SFT/RL joint). They hold training compute by the
paper's formulas: SFT updates; rollouts, rejected ones included, and RL updates. Validation and evaluation are in the ledger, never in x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pctrain.common.errors import UserError
from pctrain.compute import flops


@dataclass(frozen=True)
class Phase:
    """What a token costs in this phase. `paper_units`: in forward passes by the paper's formulas; `exact`: the passes that are made, and
    counted exactly; `axis`: the total it belongs to (none: evaluation)."""

    paper_units: float
    exact: Literal["forward", "training", "none"]
    axis: str | None


# The paper's GRPO step is 4 forward units (rollout 1, update 3) and has no log-prob pass, nor a reference model; a rejected rollout costs
# what a kept one does. It counts 4 units for the expert's tokens of LUFFY and SRFT as well, which nobody samples: `expert` is the fourth.
PHASES = {
    "sft_update": Phase(3.0, "training", "sft"),
    "rollout": Phase(1.0, "forward", "rl"),
    "rollout_rejected": Phase(1.0, "forward", "rl"),
    "logprob": Phase(0.0, "forward", "rl"),
    "reference": Phase(0.0, "forward", "rl"),
    "expert": Phase(1.0, "none", "rl"),
    "rl_update": Phase(3.0, "training", "rl"),
    "validation": Phase(1.0, "forward", None),
    "evaluation": Phase(1.0, "forward", None),
}

_SUMS = ("sequences", "tokens", "paper_flops", "exact_flops", "seconds", "device_seconds")


class Ledger:
    """Running totals of one run. An RL run starts from `eflops_sft`, the compute spent up to the joint."""

    def __init__(
        self, shape: flops.ModelShape, eflops_sft: float = 0.0, ranks: int = 1, recompute: flops.Recompute = "none"
    ):
        """`ranks`: how many run together; each of them holds a device for as long as a phase takes. `recompute`: parallel.recompute."""
        self.shape, self.ranks, self.recompute = shape, ranks, recompute
        self.joint = float(eflops_sft)
        self.entries: list[
            dict
        ] = []  # for ledger.jsonl; whoever writes them there clears the list. Not part of the state
        self._totals: dict[str, dict[str, float]] = {}

    def add(self, step: int, phase: str, lengths: Sequence[int] | np.ndarray, seconds: float) -> dict:
        """Count sequences of `lengths` [n] tokens, prompt and response, over all ranks; returns the entry, one line of ledger.jsonl."""
        rule, lengths = PHASES[phase], np.asarray(lengths, dtype=np.int64)
        if (lengths <= 0).any():
            raise ValueError(f"ledger: a sequence of {lengths.min()} tokens ({phase}, step {step})")
        tokens = int(lengths.sum())
        mean_length = tokens / len(lengths) if len(lengths) else 0.0
        entry = {
            "step": step,
            "phase": phase,
            "sequences": len(lengths),
            "tokens": tokens,
            "mean_length": mean_length,
            "paper_flops": rule.paper_units * tokens * flops.paper_forward_per_token(self.shape, mean_length),
            "exact_flops": self._exact(rule, lengths),
            "seconds": seconds,
            "device_seconds": seconds * self.ranks,
        }
        total = self._totals.setdefault(phase, dict.fromkeys(_SUMS, 0))
        for name in _SUMS:
            total[name] += entry[name]
        self.entries.append(entry)
        return entry

    @property
    def eflops_sft(self) -> float:
        """EFLOPs of SFT so far (the joint's, in an RL run)."""
        return self.joint + self._axis("sft")

    @property
    def eflops_rl(self) -> float:
        """EFLOPs of RL training since the joint."""
        return self._axis("rl")

    def totals(self) -> dict[str, dict[str, float]]:
        """Sums by phase: sequences, tokens, paper_flops, exact_flops, seconds, device_seconds. Phases that did not occur are absent."""
        return {phase: dict(total) for phase, total in self._totals.items()}

    def state_dict(self) -> dict:
        """Plain JSON values; floats survive `json` bit for bit (shortest round-trip text)."""
        return {"joint": self.joint, "totals": self.totals()}

    def load_state_dict(self, state: dict) -> None:
        unknown = set(state["totals"]) - set(PHASES)
        if unknown:
            raise UserError(
                f"ledger: unknown phases {', '.join(sorted(unknown))[:200]} in the saved state; it is another version's: go on "
                "with that, or begin anew"
            )
        self.joint = float(state["joint"])
        self._totals = {phase: dict(total) for phase, total in state["totals"].items()}
        self.entries = []

    def _exact(self, rule: Phase, lengths: np.ndarray) -> float:
        if rule.exact == "none":
            return 0.0
        if rule.exact == "training":
            return flops.exact_training(self.shape, lengths, self.recompute)
        return flops.exact_forward(self.shape, lengths)

    def _axis(self, axis: str) -> float:
        # In the order of PHASES, not of arrival: the sum must not depend on which phase came first.
        return (
            sum(self._totals[p]["paper_flops"] for p, rule in PHASES.items() if rule.axis == axis and p in self._totals)
            / flops.EFLOP
        )
