"""The command line: `pctrain <command> [--config FILE] [--section.key=value ...]`.

Nothing heavy is imported before a command has its checked config; the options printed by `--help` come from config.py.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from pctrain.cli.arguments import Command
from pctrain.cli.commands import COMMANDS
from pctrain.common.errors import RunFault, ToBeContinued, UserError
from pctrain.config import help as config_help


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a run that failed, 2 for bad input, 130 for Ctrl-C."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except ToBeContinued as pause:
        if os.environ.get("RANK", "0") == "0":
            print(pause, flush=True)
        return 0
    except RunFault as fault:
        if fault.speaker:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return 1
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank finds the same mistake; once is enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from pctrain import __version__

        print(f"pctrain {__version__}")
        return 0
    of_group = [command for command in COMMANDS if command.name.split()[:-1] == arguments[:1]]
    if of_group and arguments[1:] in (["-h"], ["--help"], ["help"]):
        print(_overview(of_group))
        return 0
    command, rest = _find_command(arguments)
    if "-h" in rest or "--help" in rest:
        print(_command_help(command))
        return 0
    command.handler(command, rest)
    return 0


def _find_command(arguments: list[str]) -> tuple[Command, list[str]]:
    for command in COMMANDS:
        words = command.name.split()
        if arguments[: len(words)] == words:
            return command, arguments[len(words) :]
    group = next((c for c in COMMANDS if c.name.split()[0] == arguments[0]), None)
    if group is not None and (len(arguments) == 1 or arguments[1].startswith("-")):
        known = [f"pctrain {c.name}" for c in COMMANDS if c.name.split()[0] == arguments[0]]
        raise UserError(f"pctrain {arguments[0]} needs one more word; known: {', '.join(known)}")
    typed = " ".join(arguments[:2]) if group is not None else arguments[0]
    near = difflib.get_close_matches(typed, [c.name for c in COMMANDS], n=1, cutoff=0.5)
    hint = f"did you mean `pctrain {near[0]}`?" if near else f"commands are: {', '.join(c.name for c in COMMANDS)}"
    raise UserError(f"unknown command {typed!r}; {hint}")


# ---------------------------------------------------------------- help


def _overview(commands: Sequence[Command] = COMMANDS) -> str:
    width = max(len(command.name) for command in commands)
    lines = [f"  pctrain {command.name:<{width}}  {command.summary}" for command in commands]
    return "\n".join(
        [
            "Trains language models on expert trajectories, then by reinforcement learning, and tells the ceiling.",
            "",
            *lines,
            "",
            "`pctrain COMMAND --help` shows every option with its unit and default. Start here:",
            "",
            "  pctrain run --config configs/quickstart.yaml",
        ]
    )


def _command_help(command: Command) -> str:
    lines = [f"usage: {command.usage}", "", command.summary, ""]
    if command.options:
        lines += [
            "  --config FILE  YAML file with the same tree of keys; the command line goes over it,",
            "                 and it over the files that its key `base` names",
        ]
    lines += [*command.notes, "", "examples:", *(f"  {example}" for example in command.examples)]
    if command.options:
        lines += ["", *config_help.option_lines(command.options)]
    return "\n".join(lines)
