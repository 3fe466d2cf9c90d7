r"""exact: the verifier that compares the last balanced `\boxed{...}` with the gold answer, character by character.

Runs of white space count as one space.
"""

from __future__ import annotations

from pctrain.reward.boxed import gold_content, last_boxed
from pctrain.reward.verdict import NO_BOX, RIGHT, WRONG, Verdict


def settle(response: str, answer: str) -> Verdict:
    """Return the verdict."""
    boxed = last_boxed(response)
    if boxed is None:
        return NO_BOX
    return RIGHT if boxed.split() == gold_content(answer).split() else WRONG
