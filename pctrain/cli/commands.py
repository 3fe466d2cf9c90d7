"""The table of all commands, in the order of the overview. Each family has its file."""

from __future__ import annotations

from typing import Any

from pctrain.cli import convert, data, evaluate, plan, results, sets, train
from pctrain.cli.command import Command
from pctrain.cli.completion import completion_command

_WORK: tuple[Command[Any], ...] = (
    *train.COMMANDS,
    *results.COMMANDS,
    *evaluate.COMMANDS,
    *data.COMMANDS,
    *sets.COMMANDS,
    *convert.COMMANDS,
    *plan.COMMANDS,
)
COMMANDS: tuple[Command[Any], ...] = (*_WORK, completion_command(_WORK))
