r"""The answer a response commits to: what its last balanced `\boxed{...}` holds."""

from __future__ import annotations

import re

# A box opening, an escaped character (so that \{ and \} are no braces), or a brace.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the balanced `\boxed{...}` that starts last, stripped; None where there is none.

    A box that is never closed (a truncated response) does not count. One pass, so that a response of nothing but `\boxed{` stays cheap.
    """
    open_braces: list[int | None] = []  # where a box's content starts; None for an ordinary brace
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
    r"""A gold answer may be written bare or as `\boxed{...}`."""
    boxed = last_boxed(gold)
    return gold if boxed is None else boxed
