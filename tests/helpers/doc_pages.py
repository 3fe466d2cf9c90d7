"""Read commands, Python snippets, YAML files and links from the documentation pages. Nothing is run here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_WHERE = ("*.md", "docs/**/*.md", "configs/**/*.md", "kernels/*.md", "benchmarks/*.md")
PAGES = sorted(path for pattern in _WHERE for path in ROOT.glob(pattern))
# benchmarks/ says how something was measured once, and the changelog how things were.
GUIDES = [page for page in PAGES if page.parent.name != "benchmarks" and page.name != "CHANGELOG.md"]
# Programs that a command line may begin with, after environment settings.
STARTS = ("pctrain", "torchrun", "bash", "launch/", "sbatch", "python", "pip", "docker")
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=\S*")
PLACEHOLDER = re.compile(r"[A-Z]+(-[A-Z]+|-or-[A-Z]+)*(\.\.\.)?|[A-Z]+=[A-Z]+|\.\.\.|<\w+>")


@dataclass(frozen=True)
class Shown:
    """A command of a page.

    `environment` has the variables set in front of it, `words` the rest as a shell splits it. `alone` says that it is
    in a block.
    """

    page: str
    environment: tuple[str, ...]
    words: tuple[str, ...]
    alone: bool

    @property
    def text(self) -> str:
        return shlex.join([*self.environment, *self.words])

    @property
    def is_form(self) -> bool:
        """Return whether this is no command to type: a bare name in running text, or one with placeholders (RUN, N)."""
        return not self.alone and (
            not any("=" in word or "." in word or "/" in word for word in self.words[1:])
            or any(PLACEHOLDER.fullmatch(word.rpartition("=")[2]) for word in self.words[1:])
        )


def commands(page: Path) -> list[Shown]:
    """Return every command of a page in order: lines of fenced bash blocks and indented blocks, and inline code."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    found: list[tuple[int, Shown]] = []
    for place, block in [*fenced(text, ("bash", "sh", "shell", "console", "")), *_indented(text)]:
        for line in _unrolled(re.sub(r"\\\n\s*", " ", block)).splitlines():
            found += [(place, shown) for shown in [_shown(line, name, alone=True)] if shown]
    prose = re.sub(r"^```.*?^```", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.M | re.S)
    prose = re.sub(r"^    .*$", lambda match: " " * len(match[0]), prose, flags=re.M)
    for match in re.finditer(r"`([^`\n]+)`", prose):
        found += [
            (match.start(), shown) for shown in [_shown(match[1].replace("\\|", "|"), name, alone=False)] if shown
        ]
    return [shown for _, shown in sorted(found, key=lambda pair: pair[0])]


def fenced(text: str, languages: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return (place, content) of the fenced blocks in these languages."""
    return [
        (match.start(), match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
        if match[1] in languages
    ]


def _indented(text: str) -> list[tuple[int, str]]:
    return [
        (match.start(), re.sub(r"^    ", "", match[0], flags=re.M))
        for match in re.finditer(r"(?<=\n\n)(?:    .*\n)+", text)
    ]


def _unrolled(block: str) -> str:
    """Expand `for x in a b; do ... done`: return its lines once per word."""

    def unroll(loop: re.Match) -> str:
        return "\n".join(loop[3].replace(f"${loop[1]}", word) for word in loop[2].split())

    return re.sub(r"for (\w+) in ([^;\n]+); do\n(.*?)\n\s*done", unroll, block, flags=re.S)


def _shown(line: str, page: str, alone: bool) -> Shown | None:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None  # not shell: an apostrophe in a formula or in prose
    environment = [word for word in words if ASSIGNMENT.fullmatch(word)]
    if words[: len(environment)] != environment:
        environment = []
    words = words[len(environment) :]
    if not words or not words[0].startswith(STARTS) or (not alone and len(words) == 1):
        return None
    if words[0].startswith("python") and "-m" not in words and not any(word.endswith(".py") for word in words):
        return None
    return Shown(page, tuple(environment), tuple(words), alone)
