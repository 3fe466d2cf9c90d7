"""`pctrain completion`: a script that lets the shell complete commands, options and file names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pctrain.cli.command import Call, Command, NoOptions, Operands
from pctrain.cli.parser import add_options
from pctrain.common.errors import UserError

SHELLS = ("bash", "zsh")


def completion_command(others: Sequence[Command[Any]]) -> Command[NoOptions]:
    """Return the command that prints a script which completes the `others` and itself."""
    command = Command(
        "completion",
        "print a script that completes commands and options in your shell",
        "pctrain completion bash|zsh",
        lambda call: _print_script(call, [*others, command]),
        (
            'eval "$(pctrain completion bash)"                          # in ~/.bashrc',
            "pctrain completion zsh > ~/.zfunc/_pctrain                 # fpath+=~/.zfunc comes before compinit",
        ),
        NoOptions,
        operands=Operands("SHELL", "one shell", 1, 1, {"SHELL": "bash or zsh"}),
    )
    return command


def _print_script(call: Call[NoOptions], commands: Sequence[Command[Any]]) -> None:
    [shell] = call.operands
    if shell not in SHELLS:
        raise UserError(f"pctrain completion: expected {' or '.join(SHELLS)}, got {shell!r}")
    try:
        import shtab
    except ImportError:
        raise UserError("pctrain completion needs the package shtab; install it: pip install shtab") from None
    sys.stdout.write(shtab.complete(_all_commands(commands, shtab.FILE), shell))


def _all_commands(commands: Sequence[Command[Any]], files: Any) -> argparse.ArgumentParser:
    """Return one parser with every command as a subparser. `files` is shtab's mark for arguments that name files."""
    root = argparse.ArgumentParser(prog="pctrain", description="SFT, RL and ceilings of language models")
    verbs = root.add_subparsers()
    groups: dict[str, Any] = {}
    for command in commands:
        *group, name = command.name.split()
        target = verbs
        if group:
            if group[0] not in groups:
                groups[group[0]] = verbs.add_parser(
                    group[0], help=f"commands: pctrain {group[0]} --help"
                ).add_subparsers()
            target = groups[group[0]]
        parser = target.add_parser(name, help=command.summary.replace("%", "%%"), add_help=False, allow_abbrev=False)
        add_options(parser, command)
        if command.operands.metavar:
            parser.add_argument(
                "operands", nargs="*", metavar=command.operands.metavar.split()[0], help=command.operands.noun
            )
        for action in parser._actions:
            if action.metavar in ("FILE", "PATH", "CURVES", "SOURCE", "RUN", "MODEL", "HF", "CHECKPOINT"):
                action.complete = files  # type: ignore[attr-defined]  # shtab's way to mark an argument
    return root
