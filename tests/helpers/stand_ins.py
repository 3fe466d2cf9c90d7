"""Stand-ins of real classes and functions, held to the real signature: a stand-in may be simpler, never different."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_stand_in(fake: Any, real: Any, *, own: tuple[str, ...] = ()) -> None:
    """Raise AssertionError, with every difference, if `fake` has or takes what `real` does not.

    Args:
        fake: a class, a function, or a SimpleNamespace.
        real: the class or function that it replaces.
        own: attributes of the test's own, such as a list of calls.

    A method may take fewer optional parameters. It must take the required ones, by the same names, in the same order.
    Where the real one says what it returns, the stand-in says and returns the same.
    """
    faults = list(_faults(fake, real, own))
    assert not faults, f"the stand-in for {_name(real)} differs:\n" + "\n".join(faults)


def _faults(fake: Any, real: Any, own: tuple[str, ...]) -> Iterator[str]:
    if not inspect.isclass(fake) and not isinstance(fake, SimpleNamespace):
        yield from signature_faults(fake, real)
        return
    known = attributes(real)
    members = vars(fake)
    for name, member in members.items():
        if name in own or (name.startswith("__") and name != "__init__"):
            continue
        if name not in known:
            yield f"{name}: {_name(real)} has no such attribute"
        elif inspect.isfunction(member) and callable(getattr(real, name, None)):
            yield from signature_faults(member, getattr(real, name), is_method=inspect.isclass(fake))


@cache
def attributes(real: type) -> set[str]:
    """Return the names of a class's methods, fields and instance attributes, inherited ones included."""
    names = set(dir(real))
    for base in inspect.getmro(real)[:-1]:
        names |= set(getattr(base, "__annotations__", ())) | set(getattr(base, "__struct_fields__", ()))
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # written in C
            continue
        stored = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
        names |= {node.attr for node in stored if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    return names


def signature_faults(fake: Callable, real: Callable, *, is_method: bool = False) -> Iterator[str]:
    """Yield how the parameters and the result of `fake` differ from those of `real`."""
    name = getattr(fake, "__name__", str(fake))
    theirs = inspect.signature(real)
    yield from parameter_faults(name, inspect.signature(fake), theirs, is_method=is_method)
    if name != "__init__":
        yield from result_faults(name, ast.parse(textwrap.dedent(inspect.getsource(fake))), theirs.return_annotation)


def parameter_faults(
    name: str, mine: inspect.Signature, theirs: inspect.Signature, *, is_method: bool = False
) -> Iterator[str]:
    """Yield how the parameters of a stand-in differ."""
    taken = [p for p in list(mine.parameters.values())[is_method:] if p.name not in ("self", "cls")]
    expected = {p.name: p for p in theirs.parameters.values() if p.name not in ("self", "cls")}
    for p in taken:
        if not _is_parameter(p, expected):
            yield f"{name}({p}): the real one takes {theirs}"
    order = [p.name for p in taken if p.kind in POSITIONAL]
    if order != [known for known in expected if known in order]:
        yield f"{name}({', '.join(order)}): the real one takes {theirs}"
    for missing in _required(expected) - set(mine.parameters):
        yield f"{name}: does not take {missing!r}, which the real one requires"


def _required(parameters: dict[str, inspect.Parameter]) -> set[str]:
    return {p.name for p in parameters.values() if p.default is p.empty and p.kind not in ANY}


def _is_parameter(mine: inspect.Parameter, expected: dict[str, inspect.Parameter]) -> bool:
    if mine.kind in ANY:  # anything is taken only where the real one takes anything
        return mine.kind in {p.kind for p in expected.values()}
    return mine.name in expected and (mine.kind not in POSITIONAL or expected[mine.name].kind in POSITIONAL)


def result_faults(name: str, tree: ast.Module, real: Any, *, must_say: bool = True) -> Iterator[str]:
    """Yield how the result of a stand-in, given as its syntax tree, differs from the real one's annotation `real`.

    With `must_say` a function without an annotation is a fault; without it, only one that returns None.
    """
    if real is inspect.Signature.empty:
        return
    returns, function = _annotation(real), tree.body[0]
    if isinstance(function, ast.FunctionDef):
        said = _annotation(ast.unparse(function.returns) if function.returns else inspect.Signature.empty)
        if said != returns and (function.returns or must_say):
            yield f"{name} -> {said}: the real one returns {returns}"
    if returns not in ("None", "NoReturn", "Any") and not _returns_a_value(tree):
        yield f"{name}: never returns a value; the real one returns {returns}"


def _annotation(annotation: Any) -> str:
    """Return an annotation as text, without modules and quotes."""
    if annotation is inspect.Signature.empty:
        return "nothing that it says"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return ast.unparse(_LastNames().visit(ast.parse(text.strip("'\""), mode="eval")))


class _LastNames(ast.NodeTransformer):
    """Replaces `a.b.C` by `C`, and 'C' by C."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(node.attr)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node


def _returns_a_value(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Raise):
            return True
        result = node.value if isinstance(node, ast.Return) else node.body if isinstance(node, ast.Lambda) else None
        if result is not None and ast.unparse(result) != "None":
            return True
    return False


def _name(real: Any) -> str:
    return f"{real.__module__}.{real.__qualname__}"
