"""Run `pctrain plan`: plan, print, and write what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from pctrain.common.progress import make_console
from pctrain.config.tree import Config
from pctrain.plan import figure
from pctrain.plan.as_json import as_json
from pctrain.plan.launching import launch_line, layout_options
from pctrain.plan.options import PlanOptions
from pctrain.plan.page import one_of_each, show
from pctrain.plan.planner import Planner


def main(config: Config, base: Config, options: PlanOptions, pinned: Collection[str], arguments: Sequence[str]) -> None:
    """Plan a config and print the result.

    Args:
        config: the config.
        base: the config without the layout keys that were typed.
        options: the options of the command.
        pinned: the layout keys that were typed, which stay as they are.
        arguments: what else was typed, for the launch line.
    """
    planner = Planner.of(config, options, pinned)
    plans = planner.plans()
    configured = planner.as_configured()
    console = make_console()
    show(console, planner, plans, configured)
    best = plans[0]
    changed = layout_options(best, base, planner.kind)
    line = launch_line(best, planner.kind, options.gpus_per_node, arguments, changed)
    if best.fits:
        for text, style in (
            ("", None),
            ("Start it on each node:" if "NNODES" in line else "Start it:", "bold"),
            (f"  {line}", None),
        ):
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    shown = one_of_each([plan for plan in plans if plan.fits] or plans)[: options.top]
    if options.out is not None:
        as_json(options.out, planner, shown, changed, line)
        _wrote(console, options.out)
    if options.figure is not None:
        figure.draw(options.figure, shown)
        _wrote(console, options.figure)


def _wrote(console: Console, path: Path) -> None:
    console.print(f"Wrote {path}.", markup=False, highlight=False, soft_wrap=True)
