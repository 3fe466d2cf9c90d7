"""Rewards: the score of a response against the gold answer, and the cause if the score is 0."""

from pctrain.reward.boxed import last_boxed
from pctrain.reward.pool import VerifierPool
from pctrain.reward.verdict import Verdict, cause_counts, fault_line

__all__ = ["Verdict", "VerifierPool", "cause_counts", "fault_line", "last_boxed"]
