"""The peak of an SFT step's GPU memory against `pctrain plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pctrain.hf.config import HFConfig
from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check

# Part of the GPU's name and its kind in `pctrain plan`; the first match counts. Another GPU is planned as an H100: the
# kind decides what fits, not what is held.
KINDS = (("H200", "h200"), ("H100", "h100"), ("A100-SXM4-40GB", "a100-40"), ("A100", "a100-80"), ("B200", "b200"))
OTHER = "h100"
LEAST, MOST = 0.85, 1.15  # measured over planned
HELD_BYTES = {"float32": 4 + 4 + 8, "bfloat16": 2 + 4 + 8 + 4}  # per parameter
UPDATE = "update"  # the phase of a step


def run(check: Check) -> None:
    """Plan a step, make it, and compare the peaks."""
    import torch

    directory, budget = learning.model(check), learning.token_budget(check)
    spec, dtype = ("torch-varlen", "bfloat16") if check.gpu else ("torch", "float32")
    kind = "cpu"
    if check.gpu:
        kind = next((kind for part, kind in KINDS if part in torch.cuda.get_device_name()), OTHER)
    plan = _plan(check, directory, kind, budget, spec, dtype)
    planned = planned_bytes(plan)
    # Weights, fp32 gradients, Adam's two moments and, for bf16, fp32 masters: no plan can be below these.
    held = HFConfig.read(directory).shape.parameters * HELD_BYTES[dtype]
    check.measure(f"planned for a step on {kind}", planned / 2**30, "GiB", at_least=held / 2**30)
    if not check.gpu:
        check.skip("peak memory of a step", "needs a GPU")
        return
    with learning.learner(check, directory, spec, dtype) as learner:
        for _ in range(2):  # the second step has the optimizer's state
            torch.cuda.reset_peak_memory_stats()
            learning.steps(check, learner, _full_pack(budget), 1)
        measured = torch.cuda.max_memory_allocated()
    check.measure("peak memory of a step", measured / 2**30, "GiB")
    check.measure("peak memory of a step, of the plan", measured / planned, at_least=LEAST, at_most=MOST)


def _full_pack(budget: int) -> list[Any]:
    from pctrain.data.rows import make_row

    tokens = [3 + i % 300 for i in range(budget // 4)]
    return [make_row(tokens[:3], tokens[3:]) for _ in range(4)]


def _plan(check: Check, directory: Path, kind: str, budget: int, spec: str, dtype: str) -> dict[str, Any]:
    """Run `pctrain plan` for one rank and return its JSON."""
    path = check.folder / "plan.json"
    options = {
        "gpus": 1,
        "gpu": kind,
        "kind": "sft",
        "reserve": 0,  # torch's own count of bytes has no CUDA context in it
        "out": path,
        "model.path": directory,
        "model.dtype": dtype,
        "model.spec": spec,
        "sft.token_budget": budget,
        "sft.batch_size": 4,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, "-m", "pctrain", "plan", *arguments], check=True)
    plan: dict[str, Any] = json.loads(path.read_text())
    return plan


def planned_bytes(plan: dict[str, Any]) -> float:
    """Return the bytes of an update in the first layout of a plan, without its reserve."""
    parts = plan["layouts"][0]["memory"][UPDATE]
    return float(sum(size for name, size in parts.items() if name != "reserve"))
