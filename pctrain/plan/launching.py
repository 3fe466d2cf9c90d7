"""The options that make a layout, and the line that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pctrain.config.tree import Config
from pctrain.plan.planner import Plan
from pctrain.plan.work import Kind

LAYOUT_KEYS = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.sequence_parallel",
    "parallel.virtual_pipeline",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "parallel.recompute",
    "parallel.overlap_grad_reduce",
)


def value_of(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def layout_options(plan: Plan, over: Config, kind: Kind) -> list[str]:
    """`--section.key=value` of what differs from the config `over` which they are laid."""
    keys = (*LAYOUT_KEYS, *(("rollout.tensor",) if kind == "rl" else ()))
    changed = [(key, value_of(plan.config, key)) for key in keys if value_of(plan.config, key) != value_of(over, key)]
    return [f"--{key}={_text(value)}" for key, value in changed]


def launch_line(plan: Plan, kind: Kind, per_node: int, arguments: Sequence[str], options: Sequence[str]) -> str:
    """`arguments`: --config and what else was typed; `options`: of the layout."""
    nodes, ranks = -(-plan.layout.gpus // per_node), min(plan.layout.gpus, per_node)
    where = [f"NPROC={ranks}"] + ([f"NNODES={nodes}", "RDZV=FIRST_NODE:29500"] if nodes > 1 else [])
    return " ".join([*where, f"launch/torchrun.sh {kind}", *map(shlex.quote, arguments), *options])


def _text(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
