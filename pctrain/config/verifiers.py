"""The names of the verifiers. Config checks and `pctrain.reward` read this table; it needs nothing else."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal, get_args

from pctrain.common import plugins
from pctrain.common.errors import UserError

if TYPE_CHECKING:  # a verifier's worker process imports this module and has no use for pydantic
    from pctrain.config.tree import RewardConfig

VerifierName = Literal["strict", "lenient", "exact", "choice"]
VERIFIER_NAMES: tuple[VerifierName, ...] = get_args(VerifierName)


def check_verifier(reward: RewardConfig, key: str = "reward.verifier") -> None:
    """Raise UserError if the verifier is neither a known name nor module:function, or if an option does not fit it.

    Args:
        reward: the section.
        key: the key that named the verifier, for the message.
    """
    name = reward.verifier
    if plugins.is_own(name):
        if not plugins.NAME.fullmatch(name):
            raise UserError(
                f"{key} = {name!r}: expected module:function, such as my_rewards:judge for the function judge of "
                "my_rewards.py in the current directory"
            )
    elif name not in VERIFIER_NAMES:
        near = difflib.get_close_matches(name, VERIFIER_NAMES, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"{key} = {name!r} is no verifier{hint}; there are {', '.join(VERIFIER_NAMES)}, or your function as "
            "module:function"
        )
    if reward.levenshtein and name != "lenient":
        raise UserError(f"reward.levenshtein = true needs reward.verifier = lenient, not {name!r}")
