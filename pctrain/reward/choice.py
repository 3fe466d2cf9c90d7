r"""choice: a letter from A to J.

The last balanced `\boxed{...}` decides where there is one: it holds one letter and nothing else but brackets, a closing full stop or
colon, and text commands: `\boxed{C}`, `\boxed{(c)}`, `\boxed{\textbf{(C)}}`. Anything else in it ("A or B", "A: 5") is wrong.

Without a box the last stated choice decides: "answer", "choice" or "option", then "is" or ":" or nothing, then a capital letter, in
brackets or stars or bare; or a line of such a letter alone. A bare A or I has to end its sentence ("the answer is A bit long" states
nothing). A second letter behind it ("answer: A or B", "A, B") makes it wrong. Nothing stated is `no_box`; a gold answer that
is no letter `parse_error`.
"""

from __future__ import annotations

import re

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.literals import normalise
from pctrain.reward.verdict import NO_BOX, PARSE_ERROR, RIGHT, WRONG, Verdict

_WRAPPED = re.compile(r"(?:\\(?:text|textbf|textit|mathrm|mathbf|mbox|bf|rm) ?\{?|[({\[* ])*([A-Ja-j])[)}\]*.: ]*")
_LETTER = r"(?:[(\[*]{1,3}(?P<closed>[A-J])[)\]*]{1,3}|(?P<bare>[B-HJ])\b|(?P<last>[AI])(?=\s*(?:[.,;:!]|$)))"
_MORE = r"(?P<more>\s*(?:,|/|or|and|&)\s*[(\[*]{0,3}[A-J]\b)?"
_STATED = re.compile(
    rf"(?:(?P<label>(?i:\b(?:answer|choice|option)\b))(?:\s+(?i:is))?\s*:?[\s*]*|^\s*){_LETTER}{_MORE}", re.MULTILINE
)
_ALONE = re.compile(r"[.)\]*: ]*$", re.MULTILINE)


def settle(response: str, answer: str) -> Verdict:
    """The verdict."""
    gold = _WRAPPED.fullmatch(normalise(gold_content(answer)))
    if gold is None:
        return PARSE_ERROR
    boxed = last_boxed(response)
    if boxed is None:
        chosen = stated_choice(response)
        if chosen is None:
            return NO_BOX
    else:
        match = _WRAPPED.fullmatch(normalise(boxed)) if len(boxed) < 100 else None
        chosen = match[1] if match else ""
    return RIGHT if chosen.upper() == gold[1].upper() else WRONG


def stated_choice(response: str) -> str | None:
    """The letter that is stated last; "" where that statement names several; None where nothing is stated."""
    last = None
    for match in _STATED.finditer(response):
        letter = match["closed"] or match["bare"] or match["last"]
        if not match["label"] and (match["more"] or not _ALONE.match(response, match.end())):
            continue
        last = "" if match["more"] else letter
    return last
