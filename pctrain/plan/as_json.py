"""The plan as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pctrain.files.durable import write_atomically
from pctrain.plan.page import assumptions, warnings
from pctrain.plan.planner import Plan, Planner


def as_json(path: Path, planner: Planner, plans: Sequence[Plan], options: Sequence[str], launch: str) -> None:
    """Write {gpu, gpus, kind, work, layouts, options, launch, assumptions, warnings} in bytes, seconds and FLOPs.

    A layout is {name, parallel, fits, memory {phase: {part: bytes}}, host {save_rank, save_node, load_rank,
    load_node, reference_node}, seconds {part: seconds}, ...}. The file is replaced atomically.
    """
    content = {
        "gpu": asdict(planner.gpu),
        "gpus": planner.options.gpus,
        "kind": planner.kind,
        "work": asdict(planner.work),
        "layouts": [_layout(plan) for plan in plans],
        "options": list(options),
        "launch": launch,
        "assumptions": list(assumptions(planner)),
        "warnings": list(warnings(planner, plans[0])),
    }
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _layout(plan: Plan) -> dict[str, Any]:
    speed = plan.speed
    return {
        "name": plan.name,
        "parallel": plan.layout.parallel.model_dump(mode="json"),
        "rollout_tensor": plan.config.rollout.tensor,
        "data": plan.layout.data,
        "fits": plan.fits,
        "share": plan.share,
        "fullest": plan.memory.peak.phase,
        "memory": {phase: moment.parts for phase, moment in plan.memory.phases.items()},
        "host": asdict(plan.memory.host),
        "seconds": speed.parts,
        "step_seconds": speed.seconds,
        "tokens": speed.tokens,
        "flops": speed.flops,
        "bubble": speed.bubble,
        "micro_batches": speed.micro_batches,
        "traffic": [asdict(traffic) for traffic in speed.traffic],
        "engine": None if plan.engine is None else {**asdict(plan.engine), "tokens": plan.engine.tokens},
        "rollouts": None if speed.rollouts is None else asdict(speed.rollouts),
    }
