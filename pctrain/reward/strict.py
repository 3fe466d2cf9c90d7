r"""strict: the verifier that compares the last balanced `\boxed{...}` with the gold answer, and pays for nothing else.

It compares the strings, then the numbers that they are, and leaves the rest to Math-Verify. The table lists responses
that a policy could be paid for without solving anything, and the rule that stops each:

| response | rule |
|---|---|
| no box; an unclosed box; a number in prose | no_box: only a closed box commits to an answer |
| several boxes | the box that starts last counts (the inner one if they are nested); text after it does not |
| `2+3`, `\frac{10}{2}`, `4,5`, `\{5\}`, `5 or 7`, prose, percent, units, bases for a number | the table of `literals` |
| `1010_2` for `1010_3` or for 1010 | a written base is part of the answer |
| `\int_0^1 2x\,dx`, `\sum`, `\lim`, `\binom`, `5!`, ... if the gold answer has none | wrong: it is unevaluated |
| `x+1=x+2`, `a=b=\sqrt{2}` if the gold answer has no `=` | at most one `=` is allowed, with a name before it |
| `x+1 \text{ or } x+2`, `x+1, x+2`, sets and intervals with the gold answer | wrong: Math-Verify compares whole sets |
| `\pm\sqrt{2}`, `\neq x+1`, `\approx`, `\text{not } x+1` if the gold answer has none | wrong: they say something else |
| `$...$` or another box in the box, a LaTeX comment | wrong: Math-Verify would choose among several expressions |
| NaN, `0/0`, 1/0 | equal to nothing |
| digits or powers of other scripts (`\u0665`, `5²`) if the gold answer has none | wrong; full-width is read as ASCII |
| more than 2,000 characters, braces nested deeper than 50 | wrong unless the strings are equal |
| a power tower such as `x+9^{9^9}` | wrong if the gold answer has none; a hang of Math-Verify ends at the deadline |
"""

from __future__ import annotations

import re

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import normalize, read_number, same_number
from pctrain.reward.verdict import NO_BOX, PARSE_ERROR, RIGHT, WRONG, Verdict

LONGEST = 2000  # characters
DEEPEST = 50  # braces and brackets

_IN_BASE = re.compile(r"([0-9A-Fa-f]{1,400})_(?:\{ ?(?:\\text ?\{ ?)?([A-Za-z0-9]{1,9}) ?\}? ?\}|(\d))")
# A name that is allowed before an equals sign: y, f(x), A_1, \angle ABC.
_NAME = re.compile(r"(?:[A-Za-z\\{}()', ]|_\{?\d{1,3}\}?)+")
# Marks that ask for a computation, or that say something else than equality. An answer may have only those of the gold
# answer.
_MARKS = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|binom|dbinom|gcd|lcm|max|min|sup|inf|det|Pr|mod|bmod|pmod|pm|mp|neq|ne|not|neg|approx|sim|equiv|to"
    r"|frac ?\{ ?d ?\})(?![A-Za-z])|!|≠|≈|±"
    r"|\\(?:text|mathrm|mbox|operatorname) ?\{[^{}]*\b(?:not|except|about|approximately|or|mod|nan)\b[^{}]*\}",
    re.ASCII | re.IGNORECASE,
)
# Marks of a second expression in the box.
_SEVERAL = re.compile(r"\$|(?<!\\)%|\\boxed|\\fbox|\\\[|\\\(|\\begin ?\{ ?(?:equation|align|gather)")
_NOT_A_NUMBER = re.compile(r"\bnan\b|\\frac ?\{[^{}]*\} ?\{ ?0+ ?\}|/ ?0+(?![\d.])|/ ?\( ?0+ ?\)", re.IGNORECASE)
_TOWER = re.compile(r"\^ ?\{?[^{}^+]{0,40}\^|\^ ?\{? ?\d{5}|\d ?!")


def settle(response: str, answer: str) -> Verdict | tuple[str, str]:
    """Return the verdict if strings and numbers decide, otherwise the question (boxed answer, gold) for `judge`."""
    boxed = last_boxed(response)
    return NO_BOX if boxed is None else compare(boxed, gold_content(answer))


def compare(answer: str, gold: str) -> Verdict | tuple[str, str]:
    """Do the same as `settle` for the content of a box."""
    answer, gold = normalize(answer), normalize(gold)
    if not gold:
        return PARSE_ERROR
    if answer == gold:
        return RIGHT
    if not answer or len(answer) > LONGEST or len(gold) > LONGEST or _depth(answer) > DEEPEST:
        return WRONG
    expected = read_number(gold)
    if expected is not None:
        given = read_number(answer)
        return RIGHT if given is not None and same_number(given, expected) else WRONG
    if _says_something_else(answer, gold):
        return WRONG
    return _compare_bases(answer, gold) or (answer, gold)


def judge(answer: str, gold: str) -> Verdict:
    """Return Math-Verify's verdict.

    It may hang, die or use any amount of memory: run it in a worker, in the main thread.

    Math-Verify's own time-outs are off. They use alarms, which a long C call delays, and they report a hang as a wrong
    answer.
    """
    from math_verify import parse, verify

    try:
        expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
        given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
        if not expected or not given or (_only_text(given) and not _only_text(expected)):
            return PARSE_ERROR
        return RIGHT if verify(expected, given, timeout_seconds=None, raise_on_error=True) else WRONG
    except MemoryError:
        return Verdict(0.0, "memory", "Math-Verify asked for more than reward.memory_mb")
    except Exception:  # Sympy raises nearly anything on nonsense, RecursionError too; the cause is counted.
        return PARSE_ERROR


def _says_something_else(answer: str, gold: str) -> bool:
    """Apply the rules of the table for a gold answer that is not a literal number."""
    if any(not c.isascii() and c.isnumeric() and c not in gold for c in answer):
        return True
    if _SEVERAL.search(answer) or _NOT_A_NUMBER.search(answer):
        return True
    if _TOWER.search(answer) and not _TOWER.search(gold):
        return True
    if set(_MARKS.findall(answer)) - set(_MARKS.findall(gold)):
        return True
    if "=" in answer.replace("\\leq", "").replace("\\geq", "") and "=" not in gold:
        # Each item of a list may have a name, "x = 1, y = 2" for a gold set: Math-Verify compares the whole list.
        return not all(_is_named_once(item) for item in answer.split(","))
    return False


def _is_named_once(item: str) -> bool:
    """Return whether an item has no equals sign, or one with a name before it."""
    name, equals, value = item.partition("=")
    return not equals or ("=" not in value and _NAME.fullmatch(name) is not None)


def _compare_bases(answer: str, gold: str) -> Verdict | None:
    """Return the verdict if the answer or the gold answer has a written base, otherwise None."""
    given, expected = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(gold)
    if expected is None:
        return None if given is None else WRONG
    digits = expected[1].lstrip("0")
    if given is None:  # the question names the base, so the digits alone are an answer
        return RIGHT if answer.lstrip("0") == digits else WRONG
    same_base = (given[2] or given[3]) == (expected[2] or expected[3])
    return RIGHT if same_base and given[1].lstrip("0").lower() == digits.lower() else WRONG


def _depth(text: str) -> int:
    """Return how deep braces and brackets are nested."""
    deepest = depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


def _only_text(parsed: list) -> bool:
    """Return whether Math-Verify could not make an expression of a string. It returns only the string then."""
    return all(isinstance(item, str) for item in parsed)
