"""Prose in code, tests, pages, configs and scripts stays plain English; CONTRIBUTING.md says how it should read.

A finding names file:line. Code is no prose: identifiers, fenced blocks and text between backticks are left out.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.helpers.doc_pages import ROOT

BANNED = {
    r"mend(s|ed|ing)?": "fix",
    r"(go|goes|going|went|gone) on": "resume, continue",
    r"(lie|lies|lay|lying) (in|on|below|under|next|there|beside)": "is in, is on",
    r"(stand|stands|stood|standing) (in|for|below|there)": "is in, replaces, means",
    r"beside": "next to; besides",
    r"(tell|tells|told|telling) (them |these |those |both )?apart": "distinguishable",
    r"borne by": "supported by",
    r"of its own": "its own",
    r"wires?": "interconnect, network",
    r"is told": "gets, knows",
    r"in words": "as text",
    r"swap of weights|weight swaps?": "weight update",
    r"PAPER\.md": "arXiv 2512.11470, section N",
}
PATTERN = re.compile("|".join(rf"(?<![\w-])(?:{pattern})(?![\w-])" for pattern in BANNED), re.I)
OPENING = re.compile(r"(Of|What|Whether|That)\b")
# Made by a program from texts that are not ours.
LEFT_OUT = {"docs/dependencies.md"}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("configs/**/*.md")]
FOLDERS = ("pctrain", "kernels", "benchmarks", "launch", "tests")
CODE = [file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.py") if file != Path(__file__).resolve()]
PATTERNS = ("pctrain/**/*.j2", "configs/**/*.yaml", "launch/*", ".github/workflows/*.yml", "*.toml", "*.yml")
OTHERS = [file for pattern in PATTERNS for file in ROOT.glob(pattern) if file.is_file() and file.suffix != ".py"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blanked(pattern: str, text: str, flags: int = 0) -> str:
    """The text with every match replaced by spaces: lines keep their numbers."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=flags)


def page_prose(text: str) -> str:
    text = blanked(r"^```.*?^```", text, re.M | re.S)
    text = blanked(r"^    .*$", text, re.M)
    return blanked(r"`[^`\n]*`|\]\([^)]*\)", text)


def code_prose(text: str) -> str:
    """Comments and string literals at their places, the rest blank."""
    lines = [[" "] * len(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            (row, column), parts = token.start, token.string.split("\n")
            for number, part in enumerate(parts):
                at = column if number == 0 else 0
                lines[row - 1 + number][at : at + len(part)] = part
    return blanked(r"`[^`\n]*`", "\n".join("".join(line) for line in lines))


def findings(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    prose = code_prose(text) if path.suffix == ".py" else page_prose(text) if path.suffix == ".md" else text
    found = []
    for match in PATTERN.finditer(re.sub(r"(?<=\w)\n(?=\w)", " ", prose)):
        line = prose.count("\n", 0, match.start()) + 1
        better = next(good for bad, good in BANNED.items() if re.fullmatch(bad, match[0], re.I))
        found.append(f"{name(path)}:{line}: {match[0]!r} (better: {better})")
    return found


def docstring_findings(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and OPENING.match(text):
                found.append(f"{name(path)}:{node.body[0].lineno}: docstring opens with {text.split()[0]!r}")
    return found


def test_no_banned_phrase_is_left():
    files = [path for path in [*PAGES, *CODE, *OTHERS] if name(path) not in LEFT_OUT]
    found = [line for path in sorted(files) for line in findings(path)]
    assert not found, f"{len(found)} findings:\n" + "\n".join(found)


def test_docstrings_open_with_what_the_function_does():
    found = [line for path in sorted(CODE) for line in docstring_findings(path)]
    assert not found, f"{len(found)} findings:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("page.md", "    x = 1  # this mends it\n", 0),
        ("page.md", "Run `mend`, which mends it.\n", 1),
        ("module.py", "x = 1  # this mends it\n", 1),
        ("module.py", 'x = "the run goes on"\n', 1),
        ("module.py", "goes_on = mend(1)\n", 0),
        ("module.py", '"""Use `mend` of the finding."""\n', 0),
        ("module.py", '"""It lies\nin memory."""\n', 1),
    ],
)
def test_the_search_itself(tmp_path, monkeypatch, file, text, count):
    monkeypatch.setattr("tests.docs.test_prose.ROOT", tmp_path)
    (tmp_path / file).write_text(text)
    assert len(findings(tmp_path / file)) == count
