"""docs/architecture.md says what imports what; here it is held against the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS = [
    re.findall(r"`(\w+)`", row.split("|")[2]) for row in PAGE.split("|---|---|---|\n")[1].split("\n\n")[0].splitlines()
]
ROW = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def imports() -> dict[str, set[str]]:
    """{module or package of pctrain: those that it imports}, imports inside functions among them, those for types alone not."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "pctrain").rglob("*.py"):
        parts = file.relative_to(ROOT / "pctrain").parts
        mine = parts[0].removesuffix(".py")
        if mine == "__init__":
            continue
        of_mine = found.setdefault(mine, set())
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_types = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        passed_over = {id(inner) for node in for_types for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in passed_over:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"pctrain.{alias.name}" for alias in node.names] if node.module == "pctrain" else [node.module]
            for name in names:
                head, _, rest = name.partition(".")
                other = "kernels" if head == "pctrain_kernels" else rest.split(".")[0] if head == "pctrain" else ""
                if other not in ("", mine, "__version__"):
                    of_mine.add(other)
    return found


IMPORTS = imports()


def test_every_module_has_one_place():
    assert sorted(ROW) == sorted(name for layer in LAYERS for name in layer) and set(ROW) == set(IMPORTS) | {"kernels"}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_point_downwards(module):
    upwards = {other for other in IMPORTS[module] if ROW[other] < ROW[module]}
    assert not upwards, f"{module} imports {upwards}, which stand above it in docs/architecture.md"


def test_no_circle_within_a_layer():
    for layer in LAYERS:
        left = {name: IMPORTS.get(name, set()) & set(layer) for name in layer}
        while free := [name for name, needs in left.items() if not needs & set(left)]:
            for name in free:
                del left[name]
        assert not left, f"these import one another in a circle: {left}"


ARROWS = re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.M)
BOXES = {name: set(IMPORTS.get(name, ())) for name in {box for arrow in ARROWS for box in arrow}}
BOXES["cli"] = set().union(*(IMPORTS[name] for name in IMPORTS if name.startswith("cli")))


def test_the_arrows_of_the_diagram_are_imports():
    assert len(ARROWS) > 10 and all(other in BOXES[one] for one, other in ARROWS)


@pytest.mark.parametrize("box", sorted(BOXES))
def test_no_import_between_its_boxes_is_missing(box):
    """Each is an arrow, or a way over several."""
    reached, todo = set(), [box]
    while todo:
        here = todo.pop()
        further = {other for one, other in ARROWS if one == here} - reached
        reached |= further
        todo += further
    assert BOXES[box] & set(BOXES) <= reached | {box}
