r"""lenient: strict, then the chain that published training code (RETU) falls back on. For comparison; strict is for training.

The candidate is what the last box holds or, where there is no box, the last stated answer ("answer is ...", "answer: ...", "#### ...",
to the end of the line). It is right by the first of these that says so:

1. strict (for a stated answer as if it stood in a box);
2. the LaTeX is the same without spaces, text commands, outer brackets, and upper or lower case;
3. the number, rounded to the places of a decimal gold answer, is the same (3.14159 for 3.14), also where one of the two has a percent
   sign and that is read as 1/100;
4. the gold answer is a letter from A to J, and the candidate is that choice.

Unlike the published chain it takes no number from prose, and evaluates nothing where the gold answer is a literal number.
Its last link, a Levenshtein similarity above 0.6, is `settle_with_similarity`: it pays for 1234567 where the answer is 1234568, so a
policy trained on it learns to write something that looks like an answer. Off unless `reward.levenshtein` asks for it.
"""

from __future__ import annotations

import re

from pctrain.reward import choice
from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import normalise, read_number
from pctrain.reward.strict import LONGEST, compare
from pctrain.reward.verdict import NO_BOX, RIGHT, Verdict

SIMILAR = 0.6  # a candidate at least this like the gold answer, exclusive
LONGEST_SIMILAR = 200  # characters; the comparison is quadratic

_STATED = re.compile(r"(?:\banswer\b[ \t]*(?:is|:|=)[ \t]*:?|####)[ \t]*([^\n]{1,2000})", re.IGNORECASE)
_DECORATION = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|mbox|left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|[\s{}$*~]"
)


def settle(response: str, answer: str) -> Verdict | tuple[str, str]:
    """The verdict, or the question (candidate, gold) for Math-Verify."""
    candidate, gold = _candidate(response), gold_content(answer)
    if candidate is None:
        return choice.settle(response, answer) if _is_choice(gold) else NO_BOX
    verdict = compare(candidate, gold)
    if verdict == RIGHT:
        return verdict
    if (
        _same_latex(candidate, gold)
        or _same_number(candidate, gold)
        or _is_choice(gold)
        and choice.settle(response, answer) == RIGHT
    ):
        return RIGHT
    return verdict


def settle_with_similarity(response: str, answer: str) -> Verdict | tuple[str, str]:
    """`settle`, and right where the strings are alike by more than 0.6."""
    verdict = settle(response, answer)
    candidate, gold = _candidate(response), gold_content(answer)
    if verdict == RIGHT or candidate is None or similarity(normalise(candidate), normalise(gold)) <= SIMILAR:
        return verdict
    return RIGHT


def similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / longer length; 0 for strings longer than LONGEST_SIMILAR."""
    if not a or not b or max(len(a), len(b)) > LONGEST_SIMILAR:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def _candidate(response: str) -> str | None:
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    stated = _STATED.findall(response)
    return stated[-1].strip("* \t") if stated else None


def _is_choice(gold: str) -> bool:
    return len(gold.strip("() .")) == 1 and gold.strip("() .") in "ABCDEFGHIJ"


def _same_latex(candidate: str, gold: str) -> bool:
    if len(candidate) > LONGEST or len(gold) > LONGEST:
        return False
    bare = [_DECORATION.sub("", normalise(text)).casefold() for text in (candidate, gold)]
    return bool(bare[1]) and bare[0] == bare[1]


def _same_number(candidate: str, gold: str) -> bool:
    if len(candidate) > LONGEST or len(gold) > LONGEST:
        return False
    given, expected = read_number(normalise(candidate)), read_number(normalise(gold))
    if given is None or expected is None or (given.is_fraction and not expected.is_fraction and expected.places == 0):
        return False
    if given.units and expected.units and given.units - {"%"} != expected.units - {"%"}:
        return False
    percent = ["%" in candidate, "%" in gold]
    values = [
        number.value / 100 if sign and percent[0] != percent[1] else number.value
        for number, sign in zip((given, expected), percent, strict=True)
    ]
    return values[0] == values[1] or expected.places > 0 and round(values[0], expected.places) == values[1]
