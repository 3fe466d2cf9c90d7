r"""The answer that a response commits to: the content of its last balanced `\boxed{...}`."""

from __future__ import annotations

import re

# The start of a box, an escaped character (so that \{ and \} do not count as braces), or a brace.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return the content, stripped, of the balanced `\boxed{...}` that starts last, or None if there is none.

    A box that is never closed (in a truncated response) does not count. It takes one pass, so a response of nothing but
    `\boxed{` is cheap too.
    """
    open_braces: list[int | None] = []  # the start of a box's content; None for an ordinary brace
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark == "{":
            open_braces.append(None)
        elif mark == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif mark.endswith("{") and mark.startswith("\\boxed"):
            open_braces.append(token.end())
    return text[slice(*last)].strip() if last else None


def gold_content(gold: str) -> str:
    r"""Return the content of a gold answer, which may be written bare or as `\boxed{...}`."""
    boxed = last_boxed(gold)
    return gold if boxed is None else boxed
