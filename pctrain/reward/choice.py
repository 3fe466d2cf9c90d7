r"""choice: the verifier for multiple-choice answers, a letter from A to J.

If the response has a balanced `\boxed{...}`, the last one decides. It must hold one letter and nothing else but
brackets, a closing period or colon, and text commands: `\boxed{C}`, `\boxed{(c)}`, `\boxed{\textbf{(C)}}`. Any other
content ("A or B", "A: 5") is wrong.

Without a box, the last stated choice decides: "answer", "choice" or "option", then "is" or ":" or nothing, then a
capital letter that is bare or in brackets or stars; or a line with only such a letter. A bare A or I must end its
sentence ("the answer is A bit long" states nothing). A second letter after it ("answer: A or B", "A, B") makes the
response wrong. If nothing is stated, the verdict is `no_box`. If the gold answer is not a letter, it is `parse_error`.
"""

from __future__ import annotations

import re

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import normalize
from pctrain.reward.verdict import NO_BOX, PARSE_ERROR, RIGHT, WRONG, Verdict

_WRAPPED = re.compile(r"(?:\\(?:text|textbf|textit|mathrm|mathbf|mbox|bf|rm) ?\{?|[({\[* ])*([A-Ja-j])[)}\]*.: ]*")
_LETTER = r"(?:[(\[*]{1,3}(?P<closed>[A-J])[)\]*]{1,3}|(?P<bare>[B-HJ])\b|(?P<last>[AI])(?=\s*(?:[.,;:!]|$)))"
_MORE = r"(?P<more>\s*(?:,|/|or|and|&)\s*[(\[*]{0,3}[A-J]\b)?"
_STATED = re.compile(
    rf"(?:(?P<label>(?i:\b(?:answer|choice|option)\b))(?:\s+(?i:is))?\s*:?[\s*]*|^\s*){_LETTER}{_MORE}", re.MULTILINE
)
_ALONE = re.compile(r"[.)\]*: ]*$", re.MULTILINE)


def settle(response: str, answer: str) -> Verdict:
    """Return the verdict."""
    gold = _WRAPPED.fullmatch(normalize(gold_content(answer)))
    if gold is None:
        return PARSE_ERROR
    boxed = last_boxed(response)
    chosen = stated_choice(response) if boxed is None else _boxed_choice(boxed)
    if chosen is None:
        return NO_BOX
    return RIGHT if chosen.upper() == gold[1].upper() else WRONG


def _boxed_choice(boxed: str) -> str:
    """Return the letter in a box, or "" if the box holds anything else."""
    match = _WRAPPED.fullmatch(normalize(boxed)) if len(boxed) < 100 else None
    return match[1] if match else ""


def stated_choice(response: str) -> str | None:
    """Return the letter that is stated last, "" if that statement names several, or None if nothing is stated."""
    last = None
    for match in _STATED.finditer(response):
        letter = match["closed"] or match["bare"] or match["last"]
        if not match["label"] and (match["more"] or not _ALONE.match(response, match.end())):
            continue
        last = "" if match["more"] else letter
    return last
