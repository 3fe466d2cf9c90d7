r"""strict: the last balanced `\boxed{...}` against the gold answer, by the strings, by the numbers they are, else by Math-Verify.

What a policy could be paid for without solving anything, and the rule that stops it:

| response | rule |
|---|---|
| no box; an unclosed box; a number in prose | no_box: only a closed box commits to an answer |
| several boxes | the one that starts last counts, so of nested ones the inner; whatever follows it does not |
| `2+3`, `\frac{10}{2}`, `4,5`, `\{5\}`, `5 or 7`, prose, percent, units, bases for a literal number | the table of `literals` |
| `1010_2` for `1010_3` or for 1010 | a base that is written is part of the answer |
| `\int_0^1 2x\,dx`, `\sum`, `\lim`, `\binom`, `5!`, ... where the gold answer has none | an unevaluated expression is wrong |
| `x+1=x+2`, `a=b=\sqrt{2}` where the gold answer has no `=` | at most one `=`, and a name before it |
| `x+1 \text{ or } x+2`, `x+1, x+2`, sets and intervals that hold the gold answer | Math-Verify compares whole sets: wrong |
| `\pm\sqrt{2}`, `\neq x+1`, `\approx`, `\text{not } x+1` where the gold answer has none | wrong: they say something else |
| `$...$` or another box within the box, a LaTeX comment | wrong: Math-Verify would choose among several expressions |
| NaN, `0/0`, 1/0 | equal to nothing |
| digits or powers of other scripts (`٥`, `5²`) where the gold answer has none | wrong; full-width characters are read as ASCII ones |
| more than 2,000 characters, braces nested deeper than 50 | wrong unless it is the same string: no gold answer looks like that |
| a power tower such as `x+9^{9^9}` | wrong where the gold answer has none; what still hangs Math-Verify meets the worker's deadline |
"""

from __future__ import annotations

import re

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import normalise, read_number, same_number
from pctrain.reward.verdict import NO_BOX, PARSE_ERROR, RIGHT, WRONG, Verdict

LONGEST = 2000  # characters
DEEPEST = 50  # braces and brackets

_IN_BASE = re.compile(r"([0-9A-Fa-f]{1,400})_(?:\{ ?(?:\\text ?\{ ?)?([A-Za-z0-9]{1,9}) ?\}? ?\}|(\d))")
# A name may stand before an equals sign: y, f(x), A_1, \angle ABC.
_NAME = re.compile(r"(?:[A-Za-z\\{}()', ]|_\{?\d{1,3}\}?)+")
# What asks for a computation, or says something else than equality. Counted: an answer may have them where the gold answer has.
_MARKS = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|binom|dbinom|gcd|lcm|max|min|sup|inf|det|Pr|mod|bmod|pmod|pm|mp|neq|ne|not|neg|approx|sim|equiv|to"
    r"|frac ?\{ ?d ?\})(?![A-Za-z])|!|≠|≈|±"
    r"|\\(?:text|mathrm|mbox|operatorname) ?\{[^{}]*\b(?:not|except|about|approximately|or|mod|nan)\b[^{}]*\}",
    re.ASCII | re.IGNORECASE,
)
# A second expression within the box.
_SEVERAL = re.compile(r"\$|(?<!\\)%|\\boxed|\\fbox|\\\[|\\\(|\\begin ?\{ ?(?:equation|align|gather)")
_NOT_A_NUMBER = re.compile(r"\bnan\b|\\frac ?\{[^{}]*\} ?\{ ?0+ ?\}|/ ?0+(?![\d.])|/ ?\( ?0+ ?\)", re.IGNORECASE)
_TOWER = re.compile(r"\^ ?\{?[^{}^+]{0,40}\^|\^ ?\{? ?\d{5}|\d ?!")


def settle(response: str, answer: str) -> Verdict | tuple[str, str]:
    """The verdict where strings and numbers decide, else the question (boxed answer, gold), normalised, for `judge`."""
    boxed = last_boxed(response)
    return NO_BOX if boxed is None else compare(boxed, gold_content(answer))


def compare(answer: str, gold: str) -> Verdict | tuple[str, str]:
    """`settle` for what stands in the box."""
    answer, gold = normalise(answer), normalise(gold)
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
    """Math-Verify's verdict. May hang, die or take any memory: run it in a worker, in the main thread.

    Its own time-outs are off: they are alarms that a long call in C can hold back, and they report a hang as a wrong answer.
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
    """The rules of the table for a gold answer that is no literal number."""
    if any(not c.isascii() and c.isnumeric() and c not in gold for c in answer):
        return True
    if _SEVERAL.search(answer) or _NOT_A_NUMBER.search(answer):
        return True
    if _TOWER.search(answer) and not _TOWER.search(gold):
        return True
    if set(_MARKS.findall(answer)) - set(_MARKS.findall(gold)):
        return True
    if "=" in answer.replace("\\leq", "").replace("\\geq", "") and "=" not in gold:
        # Items of a list may have a name each, "x = 1, y = 2" for a gold set: Math-Verify compares the whole list.
        return any(
            part.count("=") > 1 or "=" in part and not _NAME.fullmatch(part.partition("=")[0])
            for part in answer.split(",")
        )
    return False


def _compare_bases(answer: str, gold: str) -> Verdict | None:
    given, expected = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(gold)
    if given is None and expected is None:
        return None
    if given is None:  # the question names the base: the digits alone are an answer
        return RIGHT if answer.lstrip("0") == expected[1].lstrip("0") else WRONG
    if expected is None:
        return WRONG
    same = (given[2] or given[3]) == (expected[2] or expected[3]) and given[1].lstrip("0").lower() == expected[
        1
    ].lstrip("0").lower()
    return RIGHT if same else WRONG


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


def _only_text(parsed: list) -> bool:
    """Where Math-Verify cannot make an expression of a string, it gives back the string alone."""
    return all(isinstance(item, str) for item in parsed)
