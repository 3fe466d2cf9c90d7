r"""Literal numbers in a box, read without evaluating anything.

Math-Verify evaluates its input, so `\boxed{2+3}` would verify against 5, and a policy could be paid for copying the
problem into the box. If the gold answer is a literal number, the answer must be one too, and the two are compared here,
exactly.

| written | read as |
|---|---|
| `5`, `+5`, `-5`, `05`, `5.0`, `1,234`, `1{,}234` | the number; the only other digits accepted are full-width ones |
| `5 \times 10^3` | 5000; the power has at most 3 digits |
| `1/2`, `\frac{1}{2}`, `\frac12`, `2\frac{1}{2}` | a fraction; never equal to an integer gold (10/2 is unevaluated) |
| `x = 5`, `\text{Cost: } 5`, `5 \text{ cm}^2`, `5 apples`, `\$5`, `5^\circ` | 5, with a name before or unit after it |
| `5 \text{ m}` against `5 \text{ cm}` | wrong: known units that differ are never converted |
| `50\%` | 50: the sign is a unit. It is never read as 0.5 |
| `5 million`, `5 or 7`, `not 5`, `5 pi`, `\sin 5`, `5 \text{ squared}` | not a number: these words change it |
| `5x`, `5i`, `5!`, `2+3`, `5,7`, `\{5\}`, `(4,5)`, `\pm 5`, `5_7`, `0x5`, `1/0` | not a number |
| more than 400 digits | not a number (only the same string is the same answer) |

A decimal with at least 6 places equals a fraction if it is that fraction rounded (0.333333 for 1/3). Otherwise only
equal values are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"}

_TEXT_GROUP = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;: ]|~|\\(?:quad|qquad|left|right|displaystyle)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]+")

# re.ASCII: otherwise \d accepts the digits of every script. The lengths are bounded: int() refuses very long strings,
# and no gold answer is that long.
_DECIMAL = r"(?:\d{1,3}(?:,\d{3}){1,100}(?:\.\d{0,400})?|\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_FRACTION = (
    rf"(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>{_DECIMAL})"
    rf"|(?P<whole>\d{{0,9}}) ?\\frac ?(?:\{{ ?(?P<top2>[+-]? ?{_DECIMAL}) ?\}} ?\{{ ?(?P<bottom2>{_DECIMAL}) ?\}}"
    r"|(?P<top3>\d) ?(?P<bottom3>\d))"
)
_POWER = r"(?: ?(?:\\times|\\cdot) ?10 ?\^ ?(?:\{ ?(?P<power>[+-]?\d{1,3}) ?\}|(?P<power1>\d)))"
# « and » enclose the content of \text{}: words, a unit or prose.
_NAME = r"(?:« ?(?P<title>[^«»]*)» ?:? ?)?(?:(?P<name>(?:[A-Za-z\\{}()' ]|_\{?\d{1,3}\}?)+)[=:] ?)?"
_WORD = r"(?: ?«[^«»]*»| [A-Za-z]+)(?: ?\^ ?(?:[23]|\{ ?[23] ?\}))?"
_UNIT = rf"(?P<unit>(?:{_WORD}| ?\\?%| ?\^ ?(?:\\circ|\{{ ?\\circ ?\}}))*)"
_NUMBER = re.compile(
    rf"{_NAME}(?P<sign>[+-]?) ?(?:\\?\$ ?)?(?:{_FRACTION}|(?P<decimal>{_DECIMAL}){_POWER}?){_UNIT} ?\.?", re.ASCII
)

# Words that change the number, or that say it is not the answer.
_CHANGING_WORDS = """
    or and not no nor neither either to between about around than less more least most below above under over greater
    except nearly approximately hundred thousand million billion trillion dozen half third quarter double twice triple
    negative minus plus times divided by squared cubed square cube power root factorial pi infinity inf infty nan base
    binary octal hex hexadecimal mod modulo neg ne neq lnot sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det
    abs floor ceil
"""
_CHANGING = frozenset(_CHANGING_WORDS.split())
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
    """A number as it was written.

    `places` is the number of digits after the decimal point. `units` are the known units among the words next to it.
    """

    value: Fraction
    is_fraction: bool
    places: int
    units: frozenset[str]


def normalize(text: str) -> str:
    r"""Normalize what has no meaning: spaces, outer dollar signs, a closing period, `\dfrac`, full-width characters."""
    text = " ".join(text.translate(_FULL_WIDTH).split())
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text[:-1].rstrip() if text.endswith(".") else text


def read_number(text: str) -> Number | None:
    """Return the literal number that a normalized text is by the table above, or None.

    The time is linear in the text.
    """
    match = _NUMBER.fullmatch(_plain(text))
    if match is None:
        return None
    words_before = _lower_words(f"{match['title'] or ''} {match['name'] or ''}")
    words_after = _lower_words(match["unit"] or "")
    if _changes_number(words_before, words_after):
        return None
    value = _value(match.groupdict())
    if value is None:
        return None
    if match["sign"] == "-":
        value = -value
    places = len((match["decimal"] or "").partition(".")[2])
    units = frozenset(_UNITS[word] for word in words_after if word in _UNITS)
    return Number(value, match["decimal"] is None, places, units)


def _lower_words(text: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(text)]


def _changes_number(words_before: list[str], words_after: list[str]) -> bool:
    """Return whether a word around a number changes it or says that it is not the answer."""
    # One or two letters after a number are a product (5 ab) unless they are a unit; `circ` comes from the degree sign.
    if any(len(word) < 3 and word not in _UNITS for word in words_after):
        return True
    return any(word in _CHANGING and word not in ("min", "in") for word in (*words_before, *words_after))


def answers_integer_with_fraction(answer: Number, gold: Number) -> bool:
    """Return whether the answer is a fraction and the gold answer an integer. Such an answer is unevaluated."""
    return answer.is_fraction and not gold.is_fraction and gold.places == 0


def same_number(answer: Number, gold: Number) -> bool:
    """Return whether the two are the same number. It is not symmetric: a fraction does not answer an integer."""
    if answers_integer_with_fraction(answer, gold):
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
    """Remove thin spaces and outer brackets.

    Put words of text groups into « », and other contents of groups into the open.
    """
    text = _TEXT_GROUP.sub(_open_group, text.replace("«", "?").replace("»", "?"))
    text = _SPACING.sub(" ", text.replace("{,}", ","))
    text = " ".join(text.split())
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and not any(c in "(){}" for c in text[1:-1]):
        text = text[1:-1].strip()
    return text


def _open_group(group: re.Match[str]) -> str:
    """Return a text group as «words» if it is only words.

    Otherwise return its content: a minus sign or a digit counts.
    """
    words = group[1].replace("~", " ")
    if not words.strip():
        return " "
    only_words = all((c.isascii() and c.isalpha()) or c in " .:'" for c in words)
    return f"«{words}»" if only_words else f" {words} "


def _value(part: dict[str, str | None]) -> Fraction | None:
    """Return the value of a match of _NUMBER without its sign, or None for a division by zero."""
    if part["decimal"] is not None:
        power = part["power"] or part["power1"] or "0"
        return _fraction(part["decimal"]) * Fraction(10) ** int(power)
    top = _fraction(_first_group(part, "top", "top2", "top3"))
    bottom = _fraction(_first_group(part, "bottom", "bottom2", "bottom3"))
    if bottom == 0:
        return None
    return int(part["whole"] or 0) + top / bottom


def _first_group(part: dict[str, str | None], *names: str) -> str:
    """Return the first of the named groups that matched.

    One of them did, because the alternatives of _FRACTION have them.
    """
    return next(text for text in map(part.get, names) if text is not None)


def _fraction(digits: str) -> Fraction:
    digits = digits.replace(",", "").replace(" ", "")
    return Fraction(digits + "0" if digits.endswith(".") else digits)
