"""docs/architecture.md says which folder imports which; here the page is held against the code."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pctrain"
KERNELS = ROOT / "kernels" / "pctrain_kernels"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS = [
    re.findall(r"`(\w+)`", row.split("|")[2]) for row in PAGE.split("|---|---|---|\n")[1].split("\n\n")[0].splitlines()
]
ROW = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}


def module_name(file: Path) -> str:
    parts = file.relative_to(KERNELS.parent if KERNELS in file.parents else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]}


def folder_of(module: str) -> str:
    """The folder of `pctrain` that a module is in; the package itself and `__main__` are in none of them."""
    head, _, rest = module.partition(".")
    if head == "pctrain_kernels":
        return "kernels"
    folder = rest.partition(".")[0] if head == "pctrain" else ""
    return folder if (PACKAGE / folder).is_dir() else ""


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """(modules imported at run time, also inside functions; modules imported for types alone)"""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    runtime, types = set(), set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        ours = {name for name in names if name.split(".")[0] in ("pctrain", "pctrain_kernels")} - {module}
        (types if id(node) in for_types else runtime).update(ours)
    return runtime, types


IMPORTS = {module: imports_of(module) for module in MODULES}
FOLDERS = {folder_of(module) for module in MODULES} - {""}
USES = {
    folder: {other for module in MODULES if folder_of(module) == folder for other in map(folder_of, IMPORTS[module][0])}
    - {folder, ""}
    for folder in FOLDERS
}


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these import one another in a cycle: " + " <- ".join(error.args[1]))


def test_nothing_is_loose_in_the_package():
    loose = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "py.typed"}


def test_every_folder_has_one_place():
    assert sorted(ROW) == sorted(folder for layer in LAYERS for folder in layer)
    assert set(ROW) == FOLDERS


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_imports_point_down(folder):
    upward = [
        f"{module} imports {other}"
        for module in sorted(MODULES)
        if folder_of(module) == folder
        for other in sorted(IMPORTS[module][0])
        if folder_of(other) not in ("", folder) and ROW[folder_of(other)] <= ROW[folder]
    ]
    assert not upward, upward


def test_no_cycle_between_folders():
    assert_no_cycle(USES)


def test_no_cycle_between_modules_not_even_for_types():
    assert_no_cycle({module: runtime | types for module, (runtime, types) in IMPORTS.items()})


ARROWS = re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.M)
BOXES = {box for arrow in ARROWS for box in arrow}


def test_the_arrows_of_the_diagram_are_imports():
    wrong = [(box, other) for box, other in ARROWS if other not in USES[box]]
    assert len(ARROWS) > 10 and not wrong


@pytest.mark.parametrize("box", sorted(BOXES - {"kernels"}))
def test_no_import_between_boxes_is_missing_from_the_diagram(box):
    """Each import is an arrow, or a path of several."""
    reached, to_visit = set(), [box]
    while to_visit:
        current = to_visit.pop()
        further = {other for source, other in ARROWS if source == current} - reached
        reached |= further
        to_visit += further
    assert USES[box] & BOXES <= reached | {box}
