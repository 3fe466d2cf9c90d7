"""Names of the files and folders in a run folder."""

from __future__ import annotations

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
LOG = "train.log"
ROLLOUTS = "rollouts"  # step-N.jsonl
CHECKPOINTS = "checkpoints"  # step-N/
START = "start.json"
SUMMARY = "summary.json"
RANKS = "ranks.json"
HF_FOLDER = "hf"  # the final weights
# An empty file in run.dir of a command that was asked to stop. It is there until the command starts again.
TO_BE_CONTINUED = "to-be-continued"
