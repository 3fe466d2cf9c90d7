r"""What can be settled about a boxed answer without Math-Verify: equal strings, integers, and unevaluated expressions.

Math-Verify evaluates what it is given, so `\boxed{2+3}` would verify against 5 and a policy could be paid for copying the problem
into the box. Where the gold answer is a literal number, the answer has to be one too.
"""

from __future__ import annotations

import re
from typing import Literal

Cause = Literal["right", "wrong", "no_box", "parse_error", "timeout", "crash"]

# At most 400 digits: int() of a longer string is refused by Python, and no gold answer is that long.
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_DECIMAL = r"(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)"
_FRACTION = rf"(?:{_DECIMAL}\s*/\s*{_DECIMAL}|\d*\s*\\frac\s*(?:\{{\s*[+-]?{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}|\d\s*\d))"
_POWER_OF_TEN = r"(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{\s*[+-]?\d+\s*\}|\d))"
# A number may stand in plain words: "x = 5", "5 apples". Anything else beside it (operators, brackets, commands, a second number) is
# an expression.
_WORDS = r"[A-Za-z\s=:]*"
_NUMBER_GOLD = re.compile(rf"[+-]?\s*{_DECIMAL}{_POWER_OF_TEN}?")
_FRACTION_GOLD = re.compile(rf"[+-]?\s*{_FRACTION}")
_NUMBER_ANSWER = re.compile(rf"{_WORDS}[+-]?\s*{_DECIMAL}{_POWER_OF_TEN}?{_WORDS}\.?")
_FRACTION_ANSWER = re.compile(rf"{_WORDS}[+-]?\s*(?:{_FRACTION}|{_DECIMAL}{_POWER_OF_TEN}?){_WORDS}\.?")

_TEXT_GROUP = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_SPACING = re.compile(r"\\[,!;: ]|~|\\(?:quad|qquad|left|right|displaystyle)(?![A-Za-z])")


def settle(answer: str, gold: str) -> Cause | None:
    """`right` or `wrong` where the strings alone decide, None where Math-Verify has to."""
    answer, gold = normalise(answer), normalise(gold)
    if answer == gold:
        return "right"
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return "right" if int(answer) == int(gold) else "wrong"
    if is_unevaluated(answer, gold):
        return "wrong"
    return None


def is_unevaluated(answer: str, gold: str) -> bool:
    """Whether `gold` is a literal number (integer, decimal, fraction, power-of-ten notation) and `answer` is not one.

    An unreduced fraction is a literal where the gold answer is a fraction, and unevaluated where it is an integer or a decimal of its own.
    """
    gold, answer = _bare(gold), _bare(answer)
    if _NUMBER_GOLD.fullmatch(gold):
        # 0.5 may be written 1/2, but 5 may not be written 10/2.
        form = _FRACTION_ANSWER if "." in gold else _NUMBER_ANSWER
        return not form.fullmatch(answer)
    if _FRACTION_GOLD.fullmatch(gold):
        return not _FRACTION_ANSWER.fullmatch(answer)
    return False


def normalise(text: str) -> str:
    r"""Trims what never carries meaning: outer space and dollar signs, runs of spaces, a closing full stop, `\dfrac` for `\frac`."""
    text = " ".join(text.split()).strip("$ ")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text[:-1].rstrip() if text.endswith(".") else text


def _bare(text: str) -> str:
    """The number's own characters: units, degrees, percent and currency signs, thin spaces and outer brackets taken away."""
    text = _TEXT_GROUP.sub(lambda group: f" {group[1]} " if any(c.isdigit() for c in group[1]) else " ", text)
    text = _DEGREES.sub("", text).replace("{,}", ",")
    text = _SPACING.sub(" ", text)
    text = text.replace("\\%", "").replace("%", "").replace("\\$", "").replace("$", "").strip()
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and not any(c in "(){}" for c in text[1:-1]):
        text = text[1:-1].strip()
    return text
