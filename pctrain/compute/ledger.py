"""Every FLOP of a run by phase, in the paper's count (arXiv 2512.11470, appendix E) and in the exact one.

Two totals are the x of all curves: `eflops_sft`, and `eflops_rl` from the SFT/RL switch point on. They hold training
compute by the paper's formulas: SFT updates; rollouts, rejected ones included, and RL updates. Validation and
evaluation are in the ledger, but never in x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np

from pctrain.common.errors import UserError
from pctrain.compute import flops
from pctrain.compute.model_shape import ModelShape


@dataclass(frozen=True)
class Phase:
    """The price of a token in one phase.

    `paper_units`: forward passes that the paper's formulas count. `exact`: the passes that are made, which the exact
    count covers. `axis`: the total that the phase belongs to, or None for evaluation.
    """

    paper_units: float
    exact: Literal["forward", "training", "none"]
    axis: Literal["sft", "rl"] | None


# The paper's GRPO step has 4 forward units (rollout 1, update 3) and neither a log-prob pass nor a reference model. A
# rejected rollout costs as much as a kept one. The paper also counts 4 units for the expert's tokens of LUFFY and SRFT,
# which nobody samples: `expert` is the fourth.
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

SUMS = ("sequences", "tokens", "paper_flops", "exact_flops", "seconds", "device_seconds")
Sums = dict[str, float]


class LedgerState(TypedDict):
    """A saved ledger, in plain JSON values."""

    joint: float
    totals: dict[str, Sums]


class Ledger:
    """Running totals of one run. An RL run starts from `eflops_sft`, the compute spent up to the switch point."""

    def __init__(
        self, shape: ModelShape, eflops_sft: float = 0.0, ranks: int = 1, recompute: flops.Recompute = "none"
    ) -> None:
        """Start with empty totals.

        Args:
            shape: the model whose FLOPs are counted.
            eflops_sft: EFLOPs spent on SFT before this run.
            ranks: number of ranks that run together; each holds a device for as long as a phase takes.
            recompute: `parallel.recompute`.
        """
        self.shape = shape
        self.ranks = ranks
        self.recompute = recompute
        self.eflops_at_switch = float(eflops_sft)
        # Entries for ledger.jsonl. Whoever writes them there clears the list. They are not part of the state.
        self.entries: list[dict[str, Any]] = []
        self._totals: dict[str, Sums] = {}

    def add(self, step: int, phase: str, lengths: Sequence[int] | np.ndarray, seconds: float) -> dict[str, Any]:
        """Count sequences of `lengths` [n] tokens, prompt and response, over all ranks; return their ledger entry."""
        rule, lengths = PHASES[phase], np.asarray(lengths, dtype=np.int64)
        if (lengths <= 0).any():
            raise ValueError(f"ledger: a sequence of {lengths.min()} tokens ({phase}, step {step})")
        tokens = int(lengths.sum())
        mean_length = tokens / len(lengths) if len(lengths) else 0.0
        entry: dict[str, Any] = {
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
        total = self._totals.setdefault(phase, dict.fromkeys(SUMS, 0))
        for name in SUMS:
            total[name] += entry[name]
        self.entries.append(entry)
        return entry

    @property
    def eflops_sft(self) -> float:
        """EFLOPs of SFT so far; in an RL run, those up to the switch point."""
        return self.eflops_at_switch + self._axis("sft")

    @property
    def eflops_rl(self) -> float:
        """EFLOPs of RL training since the switch point."""
        return self._axis("rl")

    def totals(self) -> dict[str, Sums]:
        """Return the sums of every phase that occurred, under the names of SUMS."""
        return {phase: dict(total) for phase, total in self._totals.items()}

    def state_dict(self) -> LedgerState:
        """Return plain JSON values. Floats survive `json` bit for bit (shortest round-trip text)."""
        return {"joint": self.eflops_at_switch, "totals": self.totals()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises UserError for phases that this version does not know."""
        unknown = set(state["totals"]) - set(PHASES)
        if unknown:
            raise UserError(
                f"ledger: the saved state has unknown phases {', '.join(sorted(unknown))[:200]}. Another version of "
                "pctrain wrote it: resume with that version, or start a new run"
            )
        self.eflops_at_switch = float(state["joint"])
        self._totals = {phase: dict(total) for phase, total in state["totals"].items()}
        self.entries = []

    def _exact(self, rule: Phase, lengths: np.ndarray) -> float:
        if rule.exact == "none":
            return 0.0
        if rule.exact == "training":
            return flops.exact_training(self.shape, lengths, self.recompute)
        return flops.exact_forward(self.shape, lengths)

    def _axis(self, axis: str) -> float:
        # Summed in the order of PHASES, not of arrival: the sum must not depend on which phase came first.
        present = (phase for phase, rule in PHASES.items() if rule.axis == axis and phase in self._totals)
        return sum(self._totals[phase]["paper_flops"] for phase in present) / flops.EFLOP
