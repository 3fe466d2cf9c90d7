"""Commands and calls: `Command` describes one verb of the command line, `Call` is one use of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pctrain.common.environment import set_environment
from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.tree import Config, Section

Options = TypeVar("Options", bound=Section)


class NoOptions(Section):
    """The options of a command that has only config keys, or none at all."""


@dataclass(frozen=True)
class Operands:
    """The arguments of a command that are not options: how many it takes and what they are.

    Attributes:
        metavar: their name in the usage line, such as FILE; empty for a command without operands.
        noun: what an error message asks for, such as "one or more files".
        fewest: the smallest number of operands.
        most: the largest number, or None for any.
        help: for each name of the metavar, what it is.
        hint: what a command without operands says to somebody who gives one.
    """

    metavar: str = ""
    noun: str = ""
    fewest: int = 0
    most: int | None = 0
    help: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""

    def check(self, command: Command[Any], given: Sequence[str]) -> None:
        """Raise UserError if the number of operands does not fit."""
        if self.fewest <= len(given) and (self.most is None or len(given) <= self.most):
            return
        if self.most == 0:
            form = ": options have the form --section.key=value" if command.options else f"; usage: {command.usage}"
            hint = f"; {self.hint}" if self.hint else form
            raise UserError(f"pctrain {command.name}: unexpected argument {given[0]!r}{hint}")
        shown = " ".join(given) or "none"
        raise UserError(f"pctrain {command.name}: expected {self.noun}, got {shown}; usage: {command.usage}")


@dataclass(frozen=True)
class Command(Generic[Options]):
    """One verb of the command line.

    Attributes:
        name: one or two words, such as "sft" or "data check".
        summary: one line of the overview.
        usage: the usage line of `--help`.
        run: what the command does.
        examples: command lines that a reader can copy.
        own: the class whose fields are the command's own options, `--name=value`.
        options: the config sections that the command reads, or single keys of them. `--help` prints them, and the whole
            sections are checked for impossible combinations. A command without any takes neither `--config` nor keys.
        operands: what the command takes besides options.
        notes: text of `--help` after the command's own options. Lines that begin with a space are printed as they are.
    """

    name: str
    summary: str
    usage: str
    run: Callable[[Call[Options]], None]
    examples: tuple[str, ...]
    own: type[Options]
    options: tuple[str, ...] = ()
    operands: Operands = Operands()
    notes: str = ""


@dataclass(frozen=True)
class Call(Generic[Options]):
    """One call of a command, with its arguments sorted.

    Attributes:
        command: the command.
        arguments: what was typed after the command's name.
        operands: the arguments that are not options.
        options: the command's own options, checked.
        config_file: the value of `--config`.
        settings: the config keys that were typed, each as `--section.key=value`, in order.
    """

    command: Command[Options]
    arguments: list[str]
    operands: list[str]
    options: Options
    config_file: Path | None
    settings: list[str]

    def load_config(self, *more: str, sections: Collection[str] | None = None) -> Config:
        """Return the checked config and set the environment for what is imported next.

        Args:
            more: settings that go over the typed ones, `--section.key=value`.
            sections: sections to check for impossible combinations; default: those of the command's options.
        """
        if sections is None:
            sections = {option.split(".")[0] for option in self.command.options}
        set_environment()  # before the module of a user's algorithm is imported, which imports torch
        return config_load.load(self.config_file, [*self.settings, *more], sections=sections)

    def read_config(self) -> Config:
        """Return the config with its keys and types checked, but not their combinations."""
        set_environment()
        return config_load.read(self.config_file, self.settings)
