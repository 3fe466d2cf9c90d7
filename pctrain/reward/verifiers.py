"""The built-in verifiers: one file each, and the table of their names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pctrain.common import plugins
from pctrain.common.errors import UserError
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


VERIFIERS: dict[str, Verifier] = {
    "strict": Verifier(strict.settle),
    "lenient": Verifier(lenient.settle),
    "exact": Verifier(exact.settle),
    "choice": Verifier(choice.settle),
}


def check_name(config: RewardConfig) -> None:
    """Check `reward.verifier` and the options that depend on it.

    Raises:
        UserError: the name is not in VERIFIERS and does not have the form module:function, or an option does not fit
            it.
    """
    name = config.verifier
    if plugins.is_own(name):
        if not plugins.NAME.fullmatch(name):
            raise UserError(
                f"reward.verifier = {name!r}: expected module:function, "
                "such as my_rewards:judge for the function judge of my_rewards.py in the current directory"
            )
    elif name not in VERIFIERS:
        near = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"reward.verifier = {name!r} is no verifier{hint}; expected one of {', '.join(VERIFIERS)}, "
            "or your own function as module:function"
        )
    if config.levenshtein and name != "lenient":
        raise UserError(f"reward.levenshtein = true needs reward.verifier = lenient, not {name!r}")


def find(config: RewardConfig) -> Verifier:
    """Return the built-in verifier that the config names, with its options.

    A user's function is not a Verifier; `pctrain.reward.user` loads it.
    """
    return Verifier(lenient.settle_with_similarity) if config.levenshtein else VERIFIERS[config.verifier]
