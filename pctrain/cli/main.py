"""The command line: `pctrain COMMAND [OPERAND ...] [--config FILE] [--section.key=value ...]`.

Nothing heavy is imported before a command has its checked config.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

from pctrain.cli.command import Command
from pctrain.cli.commands import COMMANDS
from pctrain.cli.help import command_help, overview
from pctrain.cli.parser import parse
from pctrain.common.errors import RunFault, ToBeContinued, UserError

HELP = ("-h", "--help", "help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failed run, 2 for bad input, 130 for Ctrl-C."""
    # Under torchrun every rank finds the same mistake; one reports it.
    is_first_rank = os.environ.get("RANK", "0") == "0"
    try:
        run_command(sys.argv[1:] if arguments is None else arguments)
        return 0
    except ToBeContinued as pause:
        if is_first_rank:
            print(pause, flush=True)
        return 0
    except RunFault as fault:
        if fault.speaker:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return 1
    except UserError as error:
        if is_first_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if is_first_rank:
            print("interrupted", file=sys.stderr, flush=True)
        return 130


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name, or print the help they ask for.

    Raises:
        UserError: an unknown command (with the nearest name), or bad arguments.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in HELP:
        print(overview(COMMANDS))
        return
    if arguments[0] == "--version":
        from pctrain import __version__

        print(f"pctrain {__version__}")
        return
    group = [command for command in COMMANDS if command.name.split()[:-1] == arguments[:1]]
    if group and len(arguments) == 2 and arguments[1] in HELP:
        print(overview(group))
        return
    command, rest = _find_command(arguments)
    call = parse(command, rest)
    if call is None:
        print(command_help(command))
    else:
        command.run(call)


def _find_command(arguments: list[str]) -> tuple[Command[Any], list[str]]:
    for command in COMMANDS:
        words = command.name.split()
        if arguments[: len(words)] == words:
            return command, arguments[len(words) :]
    group = [command.name for command in COMMANDS if command.name.split()[0] == arguments[0]]
    if group and (len(arguments) == 1 or arguments[1].startswith("-")):
        known = ", ".join(name.split()[1] for name in group)
        raise UserError(f"pctrain {arguments[0]} needs a subcommand: {known}")
    typed = " ".join(arguments[:2]) if group else arguments[0]
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(typed, names, n=1, cutoff=0.5)
    hint = f"did you mean `pctrain {near[0]}`?" if near else f"commands are: {', '.join(names)}"
    raise UserError(f"unknown command {typed!r}; {hint}")
