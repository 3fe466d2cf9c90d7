"""The built-in verifiers: one file each, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pctrain.config.verifiers import VERIFIER_NAMES, VerifierName
from pctrain.reward import choice, exact, lenient, strict
from pctrain.reward.verdict import Verdict

if TYPE_CHECKING:  # a worker imports this module, and does not need pydantic
    from pctrain.config.tree import RewardConfig


@dataclass(frozen=True)
class Verifier:
    """A verifier, in two steps. Call it as a function (response, answer) -> Verdict only where a hang is acceptable.

    `settle(response, answer)` returns the verdict, or the question (boxed answer, gold) that is left for Math-Verify.
    It takes microseconds (a few milliseconds for the longest responses) and raises nothing, so it may run in the
    learner's process. `strict.judge` answers the question. It may hang, die or use any amount of memory, so
    `pool.VerifierPool` runs it in a worker.
    """

    settle: Callable[[str, str], Verdict | tuple[str, str]]

    def __call__(self, response: str, answer: str) -> Verdict:
        """Return the verdict."""
        settled = self.settle(response, answer)
        return settled if isinstance(settled, Verdict) else strict.judge(*settled)


_SETTLE: dict[VerifierName, Callable[[str, str], Verdict | tuple[str, str]]] = {
    "strict": strict.settle,
    "lenient": lenient.settle,
    "exact": exact.settle,
    "choice": choice.settle,
}
VERIFIERS: dict[str, Verifier] = {name: Verifier(_SETTLE[name]) for name in VERIFIER_NAMES}


def find(config: RewardConfig) -> Verifier:
    """Return the built-in verifier that the config names, with its options.

    A user's function is not a Verifier; `pctrain.reward.user` loads it.
    """
    return Verifier(lenient.settle_with_similarity) if config.levenshtein else VERIFIERS[config.verifier]
