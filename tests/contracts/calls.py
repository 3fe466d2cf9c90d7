"""Every use that a module makes of another package, resolved in the installed package and bound to its signature.

Uses are found in the syntax tree: names that are imported, and variables whose class is known, from an annotation, from
the call that made them, or from TABLE. A use of a known object that leads to an object of unknown class is a fault, so
that the tables stay complete.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

from tests.helpers.stand_ins import attributes

PACKAGES = ("vllm", "megatron", "torch", "transformer_engine")
OWN = ("pctrain", "pctrain_kernels", "benchmarks")  # read for the classes that their functions return
# Objects of these are followed through variables; tensors and modules are not.
FOLLOWED = ("vllm.", "megatron.", "torch.cuda.", "torch.distributed.", "torch._C._distributed_c10d.")
WRAPPERS = {"list", "Sequence", "Iterable", "Iterator", "tuple", "cached_property"}


class Unknown:
    """The class of an object that is not known, or not followed."""


@dataclass
class Report:
    """The uses of one module: `bound` calls, `seen` names, and what is wrong."""

    bound: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def resolve(dotted: str) -> Any:
    """Return the object of a dotted name, importing the longest module in it. Raises AttributeError or ImportError."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name not in [".".join(parts[:n]) for n in range(1, length + 1)]:
                raise
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise ImportError(dotted)


def bind(function: Callable, call: ast.Call, *, skip_self: bool = False) -> str | None:
    """Return why a call does not fit a function's signature, or None. C functions without a signature fit anything."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return None
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    arguments = [None] * (skip_self + sum(not isinstance(argument, ast.Starred) for argument in call.args))
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    partial = starred or len(keywords) < len(call.keywords)
    try:
        (signature.bind_partial if partial else signature.bind)(*arguments, **keywords)
    except TypeError as error:
        return f"{error}; the signature is {signature}"
    return None


@cache
def hinted(owner: Any, name: str | None = None) -> Any:
    """Return what an attribute of a class is annotated with, or what a function returns; Unknown if it does not say."""
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # an annotation that only a type checker can evaluate
        hints = dict(getattr(owner, "__annotations__", {}))
    return plain(hints.get(name or "return", Unknown))


def plain(hint: Any) -> Any:
    """Return the class of a hint without `| None`, or Many; Unknown if there is no single class."""
    if typing.get_origin(hint) in (list, tuple, Sequence, Iterable, Iterator):
        element = plain(typing.get_args(hint)[0])
        return Unknown if element is Unknown else Many(element)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        hint = members[0] if len(members) == 1 else Unknown
    return hint if inspect.isclass(hint) else Unknown


@dataclass(frozen=True)
class Tables:
    """Facts that the syntax tree does not contain.

    Attributes:
        variables: FILE:EXPRESSION -> class.
        attributes: CLASS.ATTRIBUTE -> class.
        absent: dotted names that exist only with another package installed.
    """

    variables: dict[str, Any]
    attributes: dict[str, Any]
    absent: tuple[str, ...] = ()


class Uses(ast.NodeVisitor):
    """Collects a module's uses into `report`."""

    def __init__(self, file: Path, name: str, tables: Tables) -> None:
        self.name = name
        self.absent = tables.absent
        self.report = Report()
        self.table = tables.variables
        self.attribute_types = tables.attributes
        self.aliases: dict[str, str] = {}
        self.scopes: list[dict[str, Any]] = [{}]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            self._note_import(node)
        self.visit(tree)

    # ---- names -----------------------------------------------------------------------------------------------------

    def _note_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES + OWN:
                    self.aliases[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
                    self._exists(alias.name, node)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES + OWN:
            for alias in node.names:
                self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._exists(f"{node.module}.{alias.name}", node)

    def _exists(self, dotted: str, node: ast.AST) -> Any:
        self.report.seen.add(dotted)
        try:
            value = resolve(dotted)
        except (ImportError, AttributeError) as error:
            if dotted not in self.absent and not dotted.startswith(OWN):
                self._fault(node, f"{dotted}: {error}")
            return Unknown
        return value

    def _fault(self, node: ast.AST, message: str) -> None:
        fault = f"{self.name}:{getattr(node, 'lineno', 0)}: {message}"
        if fault not in self.report.faults:
            self.report.faults.append(fault)

    def _local(self, name: str) -> Any:
        """Return the class of a variable; None if there is no such variable."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    # ---- what an expression is -------------------------------------------------------------------------------------

    def value(self, node: ast.AST) -> tuple[Any, Any]:
        """Return (the object itself or None, its class or Unknown) of an expression."""
        text = ast.unparse(node)
        local = self._local(text) if isinstance(node, ast.Name | ast.Attribute) else None
        if local is not None and local is not Unknown:
            return None, local
        if f"{self.name}:{text}" in self.table:
            self.report.seen.add(f"{self.name}:{text}")
            known = self.table[f"{self.name}:{text}"]
            return (known, Unknown) if isinstance(known, ModuleType) else (None, known)
        if local is not None:
            return None, Unknown
        if isinstance(node, ast.Name):
            if node.id in self.aliases:
                return self._exists(self.aliases[node.id], node), Unknown
            return None, Unknown
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return None, self._result(node)
        if isinstance(node, ast.Subscript):
            inner = self.value(node.value)[1]
            return None, inner.element if isinstance(inner, Many) else Unknown
        return None, Unknown

    def _attribute(self, node: ast.Attribute) -> tuple[Any, Any]:
        owner, owner_class = self.value(node.value)
        if isinstance(owner, ModuleType) or inspect.isclass(owner):
            dotted = f"{owner.__name__}.{node.attr}" if isinstance(owner, ModuleType) else ""
            if isinstance(owner, ModuleType) and self._exists(dotted, node) is Unknown:
                return None, Unknown
            if inspect.isclass(owner) and not hasattr(owner, node.attr) and node.attr not in attributes(owner):
                self._fault(node, f"{owner.__qualname__} has no attribute {node.attr!r}")
            return getattr(owner, node.attr, None), Unknown
        if not self._is_followed(owner_class):
            return None, Unknown
        return None, self._attribute_class(node, owner_class)

    def _attribute_class(self, node: ast.Attribute, owner: type) -> Any:
        if ast.unparse(node.value) == "self" and node.attr in (self._local("own attributes") or ()):
            return Unknown
        key = f"{owner.__name__}.{node.attr}"
        self.report.seen.add(key)
        if key in self.attribute_types:
            return self.attribute_types[key]
        if node.attr not in attributes(owner):
            self._fault(node, f"{owner.__module__}.{owner.__qualname__} has no attribute {node.attr!r}")
            return Unknown
        member = inspect.getattr_static(owner, node.attr, None)
        if isinstance(member, property):
            return hinted(member.fget)
        for base in inspect.getmro(owner):
            if node.attr in getattr(base, "__annotations__", {}):
                return hinted(base, node.attr)
        return Unknown

    @staticmethod
    def _is_followed(owner: Any) -> bool:
        return inspect.isclass(owner) and f"{owner.__module__}.".startswith(FOLLOWED)

    def _result(self, call: ast.Call) -> Any:
        function = self._callee(call)[0]
        if inspect.isclass(function):
            return function
        return hinted(function) if inspect.isfunction(function) or inspect.ismethod(function) else Unknown

    def _callee(self, call: ast.Call) -> tuple[Any, bool]:
        """Return (the function or class that is called or None, whether it is a method of an instance)."""
        if isinstance(call.func, ast.Attribute):
            owner_class = self.value(call.func.value)[1]
            if self._is_followed(owner_class):
                self._attribute_class(call.func, owner_class)
                member = inspect.getattr_static(owner_class, call.func.attr, None)
                if inspect.isfunction(member):
                    return member, True
                return getattr(owner_class, call.func.attr, None), False
        return self.value(call.func)[0], False

    # ---- the walk --------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        """Bind a call of something known."""
        function, is_method = self._callee(node)
        if callable(function):
            name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
            reason = bind(function, node, skip_self=is_method)
            if reason and name.split(".")[0] not in OWN:
                self._fault(node, f"{name}: {reason}")
            self.report.bound.append(name)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Look an attribute up; of a followed object, it must exist, and its class be known if it is used further."""
        self.value(node)
        if isinstance(node.value, ast.Attribute):
            owner = self.value(node.value.value)[1]
            key = f"{getattr(owner, '__name__', '')}.{node.value.attr}"
            if self._is_followed(owner) and self.value(node.value)[1] is Unknown and key not in self.attribute_types:
                self._fault(node, f"the class of {key} is not known: add it to ATTRIBUTE_TYPES")
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Open a scope with the parameters, by their annotations."""
        self.scopes[-1][f"def {node.name}"] = node
        scope: dict[str, Any] = {}
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            if argument.arg != "self" or argument.annotation is not None:  # `self` is the class's
                scope[argument.arg] = self._annotation(argument.annotation)
        for argument in (arguments.vararg, arguments.kwarg):
            if argument is not None:
                scope[argument.arg] = Unknown
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Open a scope in which `self` is the base from another package, and `self.x` is what methods assign to it."""
        scope: dict[str, Any] = {"own attributes": set()}
        base = next((b for b in map(self._annotation, node.bases) if self._is_followed(b)), None)
        if base is not None:
            scope["self"] = base
        self.scopes.append(scope)
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef):
                scope["own attributes"].add(part.name)
                if base is not None and part.name in dir(base):
                    self._takes_the_same(part, getattr(base, part.name), part)
            elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                scope["own attributes"].add(part.attr)
        for part in node.body:
            for target in getattr(part, "targets", [getattr(part, "target", None)]):
                scope["own attributes"].add(getattr(target, "id", None))
        for method in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
            self._note_attributes(method, scope)
        self.generic_visit(node)
        self.scopes.pop()

    def _note_attributes(self, method: ast.FunctionDef, scope: dict[str, Any]) -> None:
        if any(ast.unparse(decorator) == "cached_property" for decorator in method.decorator_list):
            scope[f"self.{method.name}"] = self._annotation(method.returns)
        self.scopes.append({a.arg: self._annotation(a.annotation) for a in method.args.args + method.args.kwonlyargs})
        for part in ast.walk(method):
            if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Attribute):
                scope.setdefault(ast.unparse(part.targets[0]), self.value(part.value)[1])
        self.scopes.pop()

    def _takes_the_same(self, function: ast.FunctionDef, original: Callable, node: ast.AST) -> None:
        """Fault a function that overrides or replaces another and does not take its parameters, by their names."""
        if not inspect.isfunction(original) or original.__name__ == "_forward_unimplemented":  # torch's own stub
            return
        arguments = function.args
        taken = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        anything = arguments.vararg is not None and arguments.kwarg is not None
        missing = [p for p in inspect.signature(original).parameters if p not in taken and p not in ("args", "kwargs")]
        if missing and not anything and function.name != "__init__":
            self._fault(node, f"{function.name} does not take {missing}, as {original.__qualname__} does")
        self.report.bound.append(f"{original.__module__}.{original.__qualname__}")

    def visit_Assign(self, node: ast.Assign) -> None:
        """Note the class of a variable."""
        self.generic_visit(node)
        replaced = node.targets[0]
        if isinstance(replaced, ast.Attribute) and isinstance(node.value, ast.Name):
            function = self._local(f"def {node.value.id}")
            original = self.value(replaced)[0]
            if function is not None and inspect.isfunction(original):
                self._takes_the_same(function, original, node)
        if len(self.scopes) > 1:
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.scopes[-1][target.id] = self.value(node.value)[1]

    def visit_For(self, node: ast.For) -> None:
        """Note the class of a loop's variable."""
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Note the class of a comprehension's variable."""
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        """Visit the loops before the element, which uses their variables."""
        self.scopes.append({})
        for generator in node.generators:
            self.visit(generator)
        for name in ("elt", "key", "value"):
            if hasattr(node, name):
                self.visit(getattr(node, name))
        self.scopes.pop()

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _loop(self, target: ast.AST, iterated: ast.AST) -> None:
        if isinstance(target, ast.Name):
            many = self.value(iterated)[1]
            self.scopes[-1][target.id] = many.element if isinstance(many, Many) else Unknown

    def _annotation(self, node: ast.AST | None) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            known = [c for c in (self._annotation(node.left), self._annotation(node.right)) if c is not Unknown]
            return known[0] if len(known) == 1 else Unknown
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in WRAPPERS:
            element = self._annotation(node.slice)
            return Unknown if element is Unknown else Many(element)
        if isinstance(node, ast.Name | ast.Attribute):
            value = self.value(node)[0]
            return value if inspect.isclass(value) else Unknown
        return Unknown


@dataclass(frozen=True)
class Many:
    """A list, or another iterable, of objects of one class."""

    element: Any


def uses_of(folders: dict[Path, Path], tables: Tables) -> Iterator[Uses]:
    """Yield the uses of every module below the folders; each comes with the folder that its name is relative to."""
    for folder, root in folders.items():
        for file in sorted(folder.rglob("*.py")):
            yield Uses(file, file.relative_to(root).as_posix(), tables)
