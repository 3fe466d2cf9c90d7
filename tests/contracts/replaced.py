"""Replacements of other packages' functions and classes in tests, held to the real signatures.

They are found in the tests' syntax trees.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tests.contracts.calls import PACKAGES, Tables, Uses
from tests.helpers.stand_ins import parameter_faults, result_faults

Function = ast.FunctionDef | ast.Lambda


@dataclass
class Replacement:
    """One replacement: where it is, the real object, and the stand-in's syntax tree."""

    place: str
    real: Any
    stand_in: ast.AST

    def faults(self) -> Iterator[str]:
        """Yield how the stand-in differs from the real object."""
        if isinstance(self.stand_in, ast.ClassDef):
            for method in [part for part in self.stand_in.body if isinstance(part, ast.FunctionDef)]:
                real = self.real if method.name == "__init__" else getattr(self.real, method.name, None)
                if real is None:
                    yield f"{self.place}: {self.real.__qualname__} has no {method.name}"
                else:
                    yield from self._function_faults(method, real, is_method=True)
        elif isinstance(self.stand_in, Function):
            yield from self._function_faults(self.stand_in, self.real)

    def _function_faults(self, mine: Function, real: Any, is_method: bool = False) -> Iterator[str]:
        try:
            theirs = inspect.signature(real)
        except (ValueError, TypeError):  # written in C
            return
        if isinstance(mine, ast.FunctionDef) and isinstance(mine.body[-1], ast.Raise):
            return  # it refuses every call
        if mine.args.vararg and mine.args.kwarg and "*args, **kwargs)" in ast.unparse(mine).partition(":")[2]:
            return  # it hands every argument on
        taken = inspect.signature(eval(f"lambda {_parameters(mine.args)}: None"))
        name = getattr(mine, "name", "lambda")
        for fault in parameter_faults(name, taken, theirs, is_method=is_method):
            yield f"{self.place}: {fault}"
        if name != "__init__":
            for fault in result_faults(name, ast.Module([mine], []), theirs.return_annotation, must_say=False):
                yield f"{self.place}: {fault}"


def _parameters(arguments: ast.arguments) -> str:
    """Return parameters without annotations and defaults' values, and without those that keep a variable (`x=x`)."""
    kept = []
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None or ast.unparse(default) != argument.arg:
            kept.append((argument, default))
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [(a, d) for a, d in zip(plain, defaults, strict=True) if d is None or ast.unparse(d) != a.arg]
    parts = [f"{a.arg}{'' if d is None else '=...'}" for a, d in pairs]
    parts += [f"*{arguments.vararg.arg}"] if arguments.vararg else ["*"] if kept else []
    parts += [f"{a.arg}{'' if d is None else '=...'}" for a, d in kept]
    return ", ".join(parts + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else []))


def replacements(file: Path, root: Path, tables: Tables) -> Iterator[Replacement]:
    """Yield what a test file puts in the place of another package's function or class."""
    text = file.read_text(encoding="utf-8")
    if "setattr(" not in text and "patch.object(" not in text:
        return
    tree, uses = ast.parse(text), Uses(file, file.relative_to(root).as_posix(), tables)
    definitions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if not _puts_in_place(node):
            continue
        target, name, new = node.args[:3]
        owner = uses.value(target)[0]
        module = owner.__name__ if inspect.ismodule(owner) else getattr(owner, "__module__", "")
        if owner is not None and module.split(".")[0] in PACKAGES:
            new = new.args[0] if isinstance(new, ast.Call) and len(new.args) == 1 else new  # classmethod(function)
            stand_in = definitions.get(new.id, new) if isinstance(new, ast.Name) else new
            place = f"{file.relative_to(root)}:{node.lineno}: {module}.{name.value}"
            yield Replacement(place, getattr(owner, name.value, None), stand_in)


def _puts_in_place(node: ast.AST) -> TypeGuard[ast.Call]:
    """Return True for `monkeypatch.setattr(target, "name", new)` and `mock.patch.object(target, "name", new)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("setattr", "object")
        and len(node.args) >= 3
        and isinstance(node.args[1], ast.Constant)
    )
