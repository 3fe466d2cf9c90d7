"""Every FLOP of a run by phase, in the paper's count and in the exact one.

Two totals are the x of all curves: `eflops_sft` and `eflops_rl` (the latter from the SFT/RL joint). They hold training compute by the
paper's formulas: SFT updates; rollouts, rejected ones included, and RL updates. Validation and evaluation are in the ledger, never in x.
"""

from __future__ import annotations

from dataclasses import dataclass

from pctrain.ceiling import flops


@dataclass(frozen=True)
class Phase:
    """Forward passes that a token costs in this phase. `axis`: the total it belongs to (none: evaluation)."""

    paper_units: float
    exact_units: float
    axis: str | None


# The paper's GRPO step is 4 forward units (rollout 1, update 3) and has no log-prob pass, nor a reference model; a rejected rollout costs
# what a kept one does. It counts 4 units for the expert's tokens of LUFFY and SRFT as well, which nobody samples: `expert` is the fourth.
PHASES = {
    "sft_update": Phase(3.0, 3.0, "sft"),
    "rollout": Phase(1.0, 1.0, "rl"),
    "rollout_rejected": Phase(1.0, 1.0, "rl"),
    "logprob": Phase(0.0, 1.0, "rl"),
    "reference": Phase(0.0, 1.0, "rl"),
    "expert": Phase(1.0, 0.0, "rl"),
    "rl_update": Phase(3.0, 3.0, "rl"),
    "validation": Phase(1.0, 1.0, None),
    "evaluation": Phase(1.0, 1.0, None),
}

_SUMS = ("sequences", "tokens", "paper_flops", "exact_flops", "seconds", "device_seconds")


class Ledger:
    """Running totals of one run. An RL run starts from `eflops_sft`, the compute spent up to the joint."""

    def __init__(self, shape: flops.ModelShape, eflops_sft: float = 0.0, ranks: int = 1):
        """`ranks`: how many run together; each of them holds a device for as long as a phase takes."""
        self.shape, self.ranks = shape, ranks
        self.joint = float(eflops_sft)
        self.entries: list[dict] = []  # for ledger.jsonl; whoever writes them there clears the list. Not part of the state
        self._totals: dict[str, dict[str, float]] = {}

    def add(self, step: int, phase: str, sequences: int, tokens: int, seconds: float) -> dict:
        """Count `tokens` (prompt and response of all `sequences`, over all ranks) and return the entry, one line of ledger.jsonl."""
        rule = PHASES[phase]
        if sequences < 0 or tokens < 0 or (tokens > 0 and sequences == 0):
            raise ValueError(f"ledger: {tokens} tokens in {sequences} sequences ({phase}, step {step})")
        mean_length = tokens / sequences if sequences else 0.0
        entry = {
            "step": step,
            "phase": phase,
            "sequences": sequences,
            "tokens": tokens,
            "mean_length": mean_length,
            "paper_flops": rule.paper_units * tokens * flops.paper_forward_per_token(self.shape, mean_length),
            "exact_flops": rule.exact_units * flops.exact_forward(self.shape, tokens=tokens, mean_length=mean_length),
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
            raise ValueError(f"ledger: unknown phases {sorted(unknown)} in the saved state")
        self.joint = float(state["joint"])
        self._totals = {phase: dict(total) for phase, total in state["totals"].items()}
        self.entries = []

    def _axis(self, axis: str) -> float:
        # In the order of PHASES, not of arrival: the sum must not depend on which phase came first.
        return sum(self._totals[p]["paper_flops"] for p, rule in PHASES.items() if rule.axis == axis and p in self._totals) / flops.EFLOP
