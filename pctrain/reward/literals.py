r"""Numbers in a box, read without evaluating anything.

Math-Verify evaluates what it is given, so `\boxed{2+3}` would verify against 5 and a policy could be paid for copying the problem
into the box. Where the gold answer is a literal number, the answer has to be one too, and the two are compared here, exactly.

| written | read as |
|---|---|
| `5`, `+5`, `-5`, `05`, `5.0`, `1,234`, `1{,}234` | the number; of other scripts only full-width digits (Chinese keyboards) |
| `5 \times 10^3` | 5000; the power has at most 3 digits |
| `1/2`, `\frac{1}{2}`, `\frac12`, `2\frac{1}{2}` | a fraction: no answer to an integer gold (10/2 for 5 is unevaluated), else one |
| `x = 5`, `\text{Cost: } 5`, `5 \text{ cm}^2`, `5 apples`, `\$5`, `5^\circ` | 5: a name before, a unit behind |
| `5 \text{ m}` against `5 \text{ cm}` | two known units that differ are wrong, and never converted |
| `50\%` | 50: the sign is a unit. It is neither 0.5 nor worth a try at both |
| `5 million`, `5 or 7`, `not 5`, `5 pi`, `\sin 5`, `5 \text{ squared}` | no number: words that change one |
| `5x`, `5i`, `5!`, `2+3`, `5,7`, `\{5\}`, `(4,5)`, `\pm 5`, `5_7`, `0x5`, `1/0` | no number |
| more than 400 digits | no number (only the same string is the same answer) |

A decimal of at least 6 places stands for a fraction that it is the rounding of (0.333333 for 1/3). Otherwise equal is equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"}

_TEXT_GROUP = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;: ]|~|\\(?:quad|qquad|left|right|displaystyle)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]+")

# re.ASCII: \d would take the digits of every script. Bounded: int() refuses very long strings, and no gold answer is that long.
_DECIMAL = r"(?:\d{1,3}(?:,\d{3}){1,100}(?:\.\d{0,400})?|\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_FRACTION = (
    rf"(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>{_DECIMAL})"
    rf"|(?P<whole>\d{{0,9}}) ?\\frac ?(?:\{{ ?(?P<top2>[+-]? ?{_DECIMAL}) ?\}} ?\{{ ?(?P<bottom2>{_DECIMAL}) ?\}}"
    r"|(?P<top3>\d) ?(?P<bottom3>\d))"
)
_POWER = r"(?: ?(?:\\times|\\cdot) ?10 ?\^ ?(?:\{ ?(?P<power>[+-]?\d{1,3}) ?\}|(?P<power1>\d)))"
# « and » mark what stood in \text{}: words, a unit or prose.
_NAME = r"(?:« ?(?P<title>[^«»]*)» ?:? ?)?(?:(?P<name>(?:[A-Za-z\\{}()' ]|_\{?\d{1,3}\}?)+)[=:] ?)?"
_WORD = r"(?: ?«[^«»]*»| [A-Za-z]+)(?: ?\^ ?(?:[23]|\{ ?[23] ?\}))?"
_UNIT = rf"(?P<unit>(?:{_WORD}| ?\\?%| ?\^ ?(?:\\circ|\{{ ?\\circ ?\}}))*)"
_NUMBER = re.compile(
    rf"{_NAME}(?P<sign>[+-]?) ?(?:\\?\$ ?)?(?:{_FRACTION}|(?P<decimal>{_DECIMAL}){_POWER}?){_UNIT} ?\.?", re.ASCII
)

# Words that change the number, or say that it is not the answer.
_CHANGING = frozenset(
    """
    or and not no nor neither either to between about around than less more least most below above under over greater except nearly
    approximately hundred thousand million billion trillion dozen half third quarter double twice triple negative minus plus times divided
    by squared cubed square cube power root factorial pi infinity inf infty nan base binary octal hex hexadecimal mod modulo neg ne neq lnot
    sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det abs floor ceil
""".split()
)
_UNITS = {
    "mm": "mm",
    "millimeters": "mm",
    "cm": "cm",
    "centimeters": "cm",
    "m": "m",
    "meter": "m",
    "meters": "m",
    "km": "km",
    "kilometers": "km",
    "in": "in",
    "inch": "in",
    "inches": "in",
    "ft": "ft",
    "foot": "ft",
    "feet": "ft",
    "yards": "yd",
    "miles": "mi",
    "mg": "mg",
    "g": "g",
    "grams": "g",
    "kg": "kg",
    "kilograms": "kg",
    "pounds": "lb",
    "s": "s",
    "seconds": "s",
    "min": "minute",
    "minutes": "minute",
    "h": "h",
    "hour": "h",
    "hours": "h",
    "day": "day",
    "days": "day",
    "weeks": "week",
    "months": "month",
    "years": "year",
    "ml": "ml",
    "l": "l",
    "liters": "l",
    "cents": "cent",
    "dollars": "dollar",
    "degrees": "degree",
    "radians": "radian",
    "percent": "%",
}


@dataclass(frozen=True)
class Number:
    """A number as it was written. `places`: digits behind the point; `units`: the known ones among the words beside it."""

    value: Fraction
    is_fraction: bool
    places: int
    units: frozenset[str]


def normalise(text: str) -> str:
    r"""Trims what never carries meaning: spaces, outer dollar signs, a closing full stop, `\dfrac` for `\frac`, full-width characters."""
    text = " ".join(text.translate(_FULL_WIDTH).split())
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text[:-1].rstrip() if text.endswith(".") else text


def read_number(text: str) -> Number | None:
    """The literal number that a normalised text is, by the table above; None where it is none. Time linear in the text."""
    match = _NUMBER.fullmatch(_plain(text))
    if match is None:
        return None
    part = match.groupdict()
    before = f"{part['title'] or ''} {part['name'] or ''}"
    behind = part["unit"] or ""
    words = [word.lower() for word in _WORDS.findall(before + " " + behind)]
    # One or two letters behind a number are a product (5 ab) unless they are a unit; `circ` comes from the degree sign.
    short = [word for word in _WORDS.findall(behind) if len(word) < 3 and word.lower() not in _UNITS]
    if short or not _CHANGING.isdisjoint(word for word in words if word not in ("min", "in")):
        return None
    value = _value(part)
    if value is None:
        return None
    places = len((part["decimal"] or "").partition(".")[2])
    units = frozenset(_UNITS[word] for word in map(str.lower, _WORDS.findall(behind)) if word in _UNITS)
    return Number(-value if part["sign"] == "-" else value, part["decimal"] is None, places, units)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether `answer` says what `gold` says. Not symmetric: a fraction does not answer a gold integer."""
    if answer.is_fraction and not gold.is_fraction and gold.places == 0:
        return False
    if answer.units and gold.units and answer.units != gold.units:
        return False
    if answer.value == gold.value:
        return True
    decimal, fraction = (answer, gold) if gold.is_fraction else (gold, answer)
    if decimal.is_fraction or not fraction.is_fraction or decimal.places < 6:
        return False
    return round(fraction.value, decimal.places) == decimal.value


def _plain(text: str) -> str:
    """Without thin spaces and outer brackets; words of text groups in « », other contents of groups in the open."""
    text = _TEXT_GROUP.sub(_open_group, text.replace("«", "?").replace("»", "?"))
    text = _SPACING.sub(" ", text.replace("{,}", ","))
    text = " ".join(text.split())
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and not any(c in "(){}" for c in text[1:-1]):
        text = text[1:-1].strip()
    return text


def _open_group(group: re.Match[str]) -> str:
    """A minus sign or a digit in a text group is as visible as outside of it."""
    words = group[1].replace("~", " ")
    if not words.strip():
        return " "
    return f"«{words}»" if all(c.isascii() and c.isalpha() or c in " .:'" for c in words) else f" {words} "


def _value(part: dict[str, str | None]) -> Fraction | None:
    if part["decimal"] is not None:
        power = part["power"] or part["power1"] or "0"
        return _fraction(part["decimal"]) * Fraction(10) ** int(power)
    top = next(part[name] for name in ("top", "top2", "top3") if part[name] is not None)
    bottom = next(part[name] for name in ("bottom", "bottom2", "bottom3") if part[name] is not None)
    if _fraction(bottom) == 0:
        return None
    return int(part["whole"] or 0) + _fraction(top) / _fraction(bottom)


def _fraction(digits: str) -> Fraction:
    digits = digits.replace(",", "").replace(" ", "")
    return Fraction(digits + "0" if digits.endswith(".") else digits)
