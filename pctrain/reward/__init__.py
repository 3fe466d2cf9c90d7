"""Rewards: 1 where the last box of a response holds the gold answer, else 0, with the cause."""

from pctrain.reward.boxed import last_boxed
from pctrain.reward.pool import Verdict, VerifierPool

__all__ = ["Verdict", "VerifierPool", "last_boxed"]
