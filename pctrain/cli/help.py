"""The help texts: the overview of all commands, and the page of one command."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from pctrain.cli.command import Command
from pctrain.config.help import help_width, option_lines, own_option_lines


def overview(commands: Sequence[Command[Any]]) -> str:
    """Return one line for each command, and where to start."""
    width = max(len(command.name) for command in commands)
    return "\n".join(
        [
            "Fine-tune language models on expert trajectories, continue with reinforcement learning, estimate the "
            "ceiling.",
            "",
            *(f"  pctrain {command.name:<{width}}  {command.summary}" for command in commands),
            "",
            "`pctrain COMMAND --help` shows every option with its unit and default. Start here:",
            "",
            "  pctrain run --config configs/quickstart.yaml",
        ]
    )


def command_help(command: Command[Any]) -> str:
    """Return the page of one command: usage, operands, its own options, examples, and the config keys it reads."""
    lines = [f"usage: {command.usage}", "", command.summary, ""]
    if command.options:
        lines += _named("--config FILE", _CONFIG)
    for metavar, text in command.operands.help.items():
        lines += _named(metavar, text)
    lines += own_option_lines(command.own)
    if command.notes:
        lines += ["", *_paragraphs(command.notes)]
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    if command.options:
        lines += ["", *option_lines(command.options)]
    return "\n".join(lines)


_CONFIG = (
    "YAML file with the keys below as a tree. The command line overrides the file, and the file overrides the files "
    "that its key `base` names."
)


def _named(name: str, text: str) -> list[str]:
    first, *rest = text.split("\n")
    lines = textwrap.wrap(first, help_width(), initial_indent=f"  {name:<13}  ", subsequent_indent=" " * 17)
    return [*lines, *rest]


def _paragraphs(text: str) -> list[str]:
    """Wrap each line of the text to the terminal. A line that begins with a space is an example and stays as it is."""
    lines = []
    for line in text.split("\n"):
        lines += [line] if line.startswith(" ") else textwrap.wrap(line, help_width())
    return lines
