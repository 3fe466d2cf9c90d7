"""Config files and command lines: they give a resolved config, or an error that names file and line or the argument."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from hypothesis import strategies as st

from pctrain.cli import main as cli
from pctrain.cli.commands import COMMANDS
from pctrain.config import load as config_load
from pctrain.config.tree import Config
from tests.fuzz.case import Case
from tests.fuzz.config_texts import DEFAULTS, FRAGMENTS, KEYS, OWN
from tests.fuzz.mutate import ODD_TEXTS, edited_bytes

NAME = "config"


@st.composite
def values(draw: st.DrawFn, key: str) -> str:
    """A value as YAML; often one that the key may have."""
    if draw(st.integers(0, 5)):
        return json.dumps(DEFAULTS.get(key))
    return draw(st.sampled_from(FRAGMENTS))


STARTS = [
    *[""] * 12,
    "%YAML 1.1\n---\n",
    "%TAG ! !x\n---\n",
    "# note\n",
    "\ufeff",
    "--- \n",
    "x: &m {a: 1}\n",
    "- a\n",
]
ODD_BASES = [
    "[]",
    "3",
    "''",
    "{a: 1}",
    "[3]",
    "'a\\0b'",
    '"\\0"',
    '"\\ud800"',
    "missing.yaml",
    "folder",
    "." * 300,
    "x" * 5000,
    "&a [*a]",
    "!!set {a}",
]
ENDS = [
    *[""] * 12,
    "...\n",
    "---\nrun: {}\n",
    "kind: sft\nfingerprints: {}\n",
    "run: {dir: a}\n",
    "zzz: 1\n",
    "3: 4\n",
    "? [a]\n: b\n",
]


@st.composite
def trees(draw: st.DrawFn, bases: list[str]) -> str:
    """A file: some keys in block style, in any order, some of them twice; `base` of files that may be there."""
    lines = [draw(st.sampled_from(STARTS))]
    if bases and draw(st.booleans()):
        named = [*bases, json.dumps(bases), json.dumps(bases * 2)]
        lines.append(f"base: {draw(st.sampled_from([*named, *ODD_BASES]))}\n")
    for section in draw(st.lists(st.sampled_from(list(Config.model_fields)), max_size=3)):
        inner = [key for key in DEFAULTS if key.startswith(section + ".")]
        lines.append(f"{section}:" + draw(st.sampled_from([*["\n"] * 12, " \n", " &s\n", " !!map\n", " 3\n", "\t\n"])))
        for key in draw(st.lists(st.sampled_from(inner), max_size=3)):
            *middle, last = key.split(".")[1:]
            indent = "  "
            for name in middle:
                lines.append(f"{indent}{name}:\n")
                indent += "  "
            lines.append(f"{indent}{last}: {draw(values(key))}\n")
    lines.append(draw(st.sampled_from(ENDS)))
    return "".join(lines)


@st.composite
def config_files(draw: st.DrawFn) -> dict[str, bytes | None]:
    """main.yaml, and files that it may name."""
    count = draw(st.sampled_from([0, 0, 1, 2, 3]))
    names = [f"base-{n}.yaml" for n in range(count)]
    files: dict[str, bytes | None] = {}
    for number, name in enumerate(names):
        known = draw(st.sampled_from([names[:number], names[number + 1 :], names, ["main.yaml"]]))
        files[name] = draw(trees(known)).encode("utf-8", "surrogatepass")
    text = draw(trees(names))
    files["main.yaml"] = text.encode(
        draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "latin-1", "utf-8-sig", "utf-7"])), "replace"
    )
    if draw(st.integers(0, 5)) == 0:
        edited = draw(st.sampled_from(sorted(files)))
        files[edited] = draw(edited_bytes(files[edited]))
    if draw(st.integers(0, 19)) == 0:
        files[draw(st.sampled_from(sorted(files)))] = None
    return files | {"folder": None}


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    """Arguments as a shell passes them: bytes that are not UTF-8 arrive as lone surrogates, and there is no NUL."""
    key = draw(st.sampled_from(KEYS))
    value = draw(st.one_of(values(key), st.sampled_from(ODD_TEXTS), st.text(max_size=8))).replace("\0", "")
    form = draw(st.integers(0, 9))
    return (
        [f"--{key}={value}"]
        if form < 7
        else [f"--{key}", value]
        if form < 9
        else [draw(st.sampled_from([f"--{key}", value, "--", "-x", "--=", "--=a"]))]
    )


@st.composite
def file_cases(draw: st.DrawFn) -> Case:
    given = [token for group in draw(st.lists(options(), max_size=2)) for token in group]
    return Case("load", draw(config_files()), ("main.yaml", *given))


ODD_OPTIONS = ["a=b", "=", "a=", "0,1,2", "1,,2", "0.5", "[{name: a, path: b}]"]


@st.composite
def command_cases(draw: st.DrawFn) -> Case:
    """A whole command line."""
    command = draw(
        st.sampled_from(
            [*(c.name for c in COMMANDS), "data", "convert", "", "--version", "--help", "sfft", "data chek", "-x", "é"]
        )
    )
    words = command.split()
    for kind in draw(st.lists(st.integers(0, 3), max_size=4)):
        if kind == 0:
            words += draw(options())
        elif kind == 1:
            value = draw(st.sampled_from([*FRAGMENTS, *ODD_TEXTS, *ODD_OPTIONS])).replace("\0", "")
            forms = draw(st.sampled_from(["name=value", "name value", "name"]))
            name = draw(st.sampled_from(OWN))
            words += {"name=value": [f"{name}={value}"], "name value": [name, value], "name": [name]}[forms]
        elif kind == 2:
            words.append(
                draw(
                    st.sampled_from(
                        [
                            "main.yaml",
                            "a.jsonl",
                            "folder",
                            "missing",
                            "-",
                            "--",
                            "",
                            "\udcff",
                            "x" * 5000,
                            "*.jsonl",
                            "[",
                        ]
                    )
                )
            )
        else:
            words += ["--config", draw(st.sampled_from(["main.yaml", "missing.yaml", "folder", "", "x" * 5000]))]
    return Case(
        "command",
        {"main.yaml": b"run: {seed: 1}\n", "a.jsonl": b'{"prompt": "a", "response": "b"}\n', "folder": None},
        tuple(words),
    )


CASES = st.one_of(file_cases(), file_cases(), command_cases())


def prepare(folder: Path) -> Mapping[str, Path]:
    # What the command line imports before a command begins its work; everything else of pctrain is the work.
    printed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pctrain.cli.main; print(*[name for name in sys.modules if name.startswith('pctrain')])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    global _parsing
    _parsing = frozenset(printed.stdout.split())
    return {}


_parsing: frozenset[str] = frozenset()
_ready = False


class _Reached(Exception):
    """The arguments were read, and the work would begin."""


class _Begins:
    """Anything of a module in whose place nothing is done."""

    def __getattr__(self, name: str) -> _Begins:
        return self

    def __call__(self, *_: object, **__: object) -> None:
        raise _Reached


class _Work(ModuleType):
    """Such a module."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> _Begins:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Begins()


class _Finder:
    def find_spec(self, name: str, path: object, target: object = None):
        if name.startswith("pctrain.") and name not in _parsing:
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec):
        return _Work(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _stop_before_the_work() -> None:
    """Once in each process, which is thrown away afterwards."""
    global _ready
    if not _ready:
        sys.meta_path.insert(0, _Finder())
        for name in [name for name in sys.modules if name.startswith("pctrain.") and name not in _parsing]:
            del sys.modules[name]
            parent, _, last = name.rpartition(".")
            if parent in sys.modules and last in vars(sys.modules[parent]):
                delattr(sys.modules[parent], last)
        _ready = True


def run(case: Case, folder: Path) -> None:
    if case.action == "load":
        config = config_load.load(Path(case.arguments[0]), list(case.arguments[1:]))
        again = folder / "again.yaml"
        again.write_text(config_load.dump(config))
        assert config_load.load(again, []) == config, "a resolved config does not come back from its own file"
    else:
        _stop_before_the_work()
        try:
            cli.run_command(list(case.arguments))
        except _Reached:
            return
        except SystemExit as end:
            if end.code not in (0, 1):
                raise
    assert not (folder / "ran").exists(), "a config file ran code"
