"""Rewards: what a response is worth against the gold answer, and the cause where it is worth nothing."""

from pctrain.reward.boxed import last_boxed
from pctrain.reward.pool import VerifierPool
from pctrain.reward.verdict import Verdict, cause_counts, fault_line

__all__ = ["Verdict", "VerifierPool", "cause_counts", "fault_line", "last_boxed"]
