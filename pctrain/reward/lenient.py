r"""lenient: the verifier that tries strict, then the fallbacks of published training code (RETU).

Use it to compare with published scores, and strict for training.

The candidate is the content of the last box. Without a box it is the last stated answer ("answer is ...", "answer:
...", "#### ...", up to the end of the line). The candidate is right if any of these rules says so:

1. strict accepts it (a stated answer counts as if it were in a box);
2. the LaTeX is the same apart from spaces, text commands, outer brackets, and upper or lower case;
3. the number, rounded to the decimal places of the gold answer, is the same (3.14159 for 3.14). If only one of the two
has a
   percent sign, the sign is read as 1/100;
4. the gold answer is a letter from A to J, and the candidate is that choice.

Unlike the published code, it takes no number from prose, and evaluates nothing if the gold answer is a literal number.
The last fallback of that code, a Levenshtein similarity above 0.6, is `settle_with_similarity`. It pays for 1234567
when the answer is 1234568, so a policy trained on it learns to write something that looks like an answer.
`reward.levenshtein` turns it on.
"""

from __future__ import annotations

import re

from pctrain.reward import choice
from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import answers_integer_with_fraction, normalize, read_number
from pctrain.reward.strict import LONGEST, compare
from pctrain.reward.verdict import NO_BOX, RIGHT, Verdict

SIMILAR = 0.6  # a candidate is accepted if its similarity to the gold answer is above this
LONGEST_SIMILAR = 200  # characters; the comparison is quadratic

_STATED = re.compile(r"(?:\banswer\b[ \t]*(?:is|:|=)[ \t]*:?|####)[ \t]*([^\n]{1,2000})", re.IGNORECASE)
_DECORATION = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|mbox|left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|[\s{}$*~]"
)


def settle(response: str, answer: str) -> Verdict | tuple[str, str]:
    """Return the verdict, or the question (candidate, gold) for Math-Verify."""
    candidate, gold = _candidate(response), gold_content(answer)
    if candidate is None:
        return choice.settle(response, answer) if _is_choice(gold) else NO_BOX
    verdict = compare(candidate, gold)
    if verdict == RIGHT:
        return verdict
    if _same_latex(candidate, gold) or _same_number(candidate, gold):
        return RIGHT
    if _is_choice(gold) and choice.settle(response, answer) == RIGHT:
        return RIGHT
    return verdict


def settle_with_similarity(response: str, answer: str) -> Verdict | tuple[str, str]:
    """Return the verdict of `settle`, or right if the similarity of the strings is above SIMILAR."""
    verdict = settle(response, answer)
    candidate, gold = _candidate(response), gold_content(answer)
    if verdict == RIGHT or candidate is None or similarity(normalize(candidate), normalize(gold)) <= SIMILAR:
        return verdict
    return RIGHT


def similarity(a: str, b: str) -> float:
    """Return 1 - Levenshtein distance / longer length, or 0 for strings longer than LONGEST_SIMILAR."""
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
    bare = [_DECORATION.sub("", normalize(text)).casefold() for text in (candidate, gold)]
    return bool(bare[1]) and bare[0] == bare[1]


def _same_number(candidate: str, gold: str) -> bool:
    if len(candidate) > LONGEST or len(gold) > LONGEST:
        return False
    given, expected = read_number(normalize(candidate)), read_number(normalize(gold))
    if given is None or expected is None or answers_integer_with_fraction(given, expected):
        return False
    if given.units and expected.units and given.units - {"%"} != expected.units - {"%"}:
        return False
    value, expected_value = given.value, expected.value
    if "%" in candidate and "%" not in gold:
        value /= 100
    elif "%" in gold and "%" not in candidate:
        expected_value /= 100
    if value == expected_value:
        return True
    return expected.places > 0 and round(value, expected.places) == expected_value
