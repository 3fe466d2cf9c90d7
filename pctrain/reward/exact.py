r"""exact: the last balanced `\boxed{...}` is the gold answer, character by character; runs of white space count as one space."""

from __future__ import annotations

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.verdict import NO_BOX, RIGHT, WRONG, Verdict


def settle(response: str, answer: str) -> Verdict:
    """The verdict."""
    boxed = last_boxed(response)
    if boxed is None:
        return NO_BOX
    return RIGHT if boxed.split() == gold_content(answer).split() else WRONG
