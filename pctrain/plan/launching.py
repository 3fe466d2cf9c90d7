"""The options that select a layout, and the line that launches it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from pctrain.config.tree import Config
from pctrain.plan.planner import Plan
from pctrain.run.config_file import Kind

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


def value_of(config: Config, key: str) -> Any:
    """Return the value of a key `section.name`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def layout_options(plan: Plan, base: Config, kind: Kind) -> list[str]:
    """Return `--section.key=value` for each layout key that differs from the config that they override."""
    keys = (*LAYOUT_KEYS, *(("rollout.tensor",) if kind == "rl" else ()))
    changed = [(key, value_of(plan.config, key)) for key in keys if value_of(plan.config, key) != value_of(base, key)]
    return [f"--{key}={_text(value)}" for key, value in changed]


def launch_line(plan: Plan, kind: Kind, per_node: int, arguments: Sequence[str], options: Sequence[str]) -> str:
    """Return the launch line, with `arguments` (--config and what else was typed) and the `options` of the layout."""
    nodes, ranks = -(-plan.layout.gpus // per_node), min(plan.layout.gpus, per_node)
    where = [f"NPROC={ranks}"] + ([f"NNODES={nodes}", "RDZV=FIRST_NODE:29500"] if nodes > 1 else [])
    return " ".join([*where, f"launch/torchrun.sh {kind}", *map(shlex.quote, arguments), *options])


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
