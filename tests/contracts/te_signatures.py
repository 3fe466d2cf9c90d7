"""The names of Transformer Engine that megatron-core uses where spec `te` reaches it, and their signatures.

Transformer Engine needs a GPU to be imported, so its sources are read. `te_signatures.json` has what this finds:

    pip download --no-deps --only-binary :all: transformer-engine==2.11.0
    unzip transformer_engine-2.11.0-py3-none-any.whl -d te
    python -m tests.contracts.te_signatures te > tests/contracts/te_signatures.json
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("te_signatures.json")
# Modules of megatron-core that spec `te` runs, and that name Transformer Engine.
REACHED = (
    "extensions/transformer_engine.py",
    "fp8_utils.py",
    "optimizer/__init__.py",
    "optimizer/clip_grads.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "tensor_parallel/layers.py",
    "tensor_parallel/random.py",
    "dist_checkpointing/strategies/torch.py",
    "transformer/attention.py",
    "transformer/cuda_graphs.py",
    "transformer/moe/moe_utils.py",
)


# ---- what megatron-core uses -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One use of a name.

    Attributes:
        names: the dotted name; several where imports for several versions bind one name.
        place: file and line.
        positional: number of positional arguments of a call.
        keywords: its keywords.
        call: whether it is a call.
        partial: whether arguments come by * or ** as well.
    """

    names: tuple[str, ...]
    place: str
    positional: int = 0
    keywords: tuple[str, ...] = ()
    call: bool = False
    partial: bool = False


@cache
def uses() -> tuple[Use, ...]:
    """Return every use of Transformer Engine in megatron-core's modules of REACHED."""
    import megatron.core

    root = Path(megatron.core.__path__[0])
    return tuple(use for name in REACHED for use in _uses_in(ast.parse((root / name).read_text()), name))


def _uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, name in _aliases(tree):
        aliases[alias] = (*aliases.get(alias, ()), name)
    for names in aliases.values():
        yield Use(names, file)

    def dotted(node: ast.AST) -> tuple[str, ...]:
        head, _, rest = ast.unparse(node).partition(".")
        return tuple(f"{name}.{rest}".rstrip(".") for name in aliases.get(head, ()))

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in filter(None, map(dotted, node.bases)):
                yield Use(base, f"{file}:{node.lineno}")
                yield from _super_calls(node, base[0], file)
        elif isinstance(node, ast.Call) and dotted(node.func):
            yield _call(dotted(node.func), node, file)
        elif isinstance(node, ast.Attribute) and dotted(node):
            yield Use(dotted(node), f"{file}:{node.lineno}")


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "transformer_engine":
                    yield alias.asname or "transformer_engine", alias.name if alias.asname else "transformer_engine"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformer_engine":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _super_calls(node: ast.ClassDef, base: str, file: str) -> Iterator[Use]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("super()."):
            yield _call((f"{base}.{ast.unparse(call.func).removeprefix('super().')}",), call, file)


def _call(names: tuple[str, ...], call: ast.Call, file: str) -> Use:
    plain = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    partial = len(plain) < len(call.args) or len(keywords) < len(call.keywords)
    return Use(names, f"{file}:{call.lineno}", len(plain), keywords, call=True, partial=partial)


# ---- what Transformer Engine has -------------------------------------------------------------------------------------


class Sources:
    """The sources of a package, read without importing it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module | None] = {}

    def signature(self, name: str) -> str | None:
        """Return the parameters of a class's constructor or a function; "" for a module or value; None if missing."""
        found = self._find(name.split("."))
        if found is None:
            return None
        if isinstance(found, tuple) and isinstance(found[0], ast.ClassDef):
            found = self._method(*found, "__init__")
        if isinstance(found, tuple) and isinstance(found[0], ast.FunctionDef):
            return _parameters(found[0])
        return ""

    def _module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = self.root.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._modules[name] = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None
        return self._modules[name]

    def _find(self, parts: list[str]) -> Any:
        """Return (syntax node, its module), or the module; None if there is no such name."""
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            if self._module(module) is not None:
                rest = parts[length:]
                if not rest:
                    return module
                found = self._in_module(module, rest[0])
                return found if len(rest) == 1 or found is None else self._member(found, rest[1:])
        return None

    def _in_module(self, module: str, name: str) -> Any:
        tree = self._module(module)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node, module
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return node, module
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self._find([*self._origin(module, node), alias.name]) or (node, module)
                    if alias.name == "*" and (found := self._find([*self._origin(module, node), name])):
                        return found
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> list[str]:
        """Return the module that an import names, as parts."""
        parts = module.split(".")
        is_package = self.root.joinpath(*parts).is_dir()
        base = parts[: len(parts) - node.level + is_package] if node.level else []
        return [*base, *(node.module or "").split(".")] if node.module else base

    def _member(self, found: Any, rest: list[str]) -> Any:
        if isinstance(found, str):
            return self._find([*found.split("."), *rest])
        node, module = found
        return self._method(node, module, rest[0]) if isinstance(node, ast.ClassDef) else found

    def _method(self, node: ast.ClassDef, module: str, name: str) -> Any:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == name:
                return part, module
            if isinstance(part, ast.Assign | ast.AnnAssign) and name in ast.unparse(part).split("=")[0].split(":")[0]:
                return part, module
        if name == "__init__" and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return self._dataclass_init(node, module), module
        for base in node.bases:
            found = self._in_module(module, ast.unparse(base))
            is_class = isinstance(found, tuple) and isinstance(found[0], ast.ClassDef)
            if is_class and (method := self._method(*found, name)):
                return method
        return None

    def _dataclass_init(self, node: ast.ClassDef, module: str) -> ast.FunctionDef:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        names = [f"{ast.unparse(part.target)}{'=...' if part.value else ''}" for part in fields]
        if "from pydantic.dataclasses import dataclass" in ast.unparse(self._module(module) or ast.Module([], [])):
            names.append("**ignored")  # pydantic's ignore keywords that are no fields
        [function] = ast.parse(f"def __init__(self, {', '.join(names)}): ...").body
        assert isinstance(function, ast.FunctionDef)
        return function


def _parameters(function: ast.FunctionDef) -> str:
    """Return the parameters without annotations, with `...` for every default."""
    arguments = function.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else ast.Constant(...) for default in arguments.kw_defaults]
    return ast.unparse(arguments)


# ---- the table -------------------------------------------------------------------------------------------------------


def read(root: Path) -> dict[str, Any]:
    """Return the table of a folder with the package's sources and its .dist-info."""
    [metadata] = root.glob("transformer_engine-*.dist-info")
    sources = Sources(root)
    names = sorted({name for use in uses() for name in use.names})
    return {"version": metadata.name.split("-")[1].split(".dist")[0], "names": {n: sources.signature(n) for n in names}}


def installed() -> Path | None:
    """Return the folder that Transformer Engine is installed in."""
    spec = importlib.util.find_spec("transformer_engine")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def signature(parameters: str) -> inspect.Signature:
    """Return the signature of parameters as the table has them."""
    return inspect.signature(eval(f"lambda {parameters}: None"))


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1])), indent=1))
