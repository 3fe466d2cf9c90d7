"""Fuzzing of everything that pctrain reads: every hostile input soon ends in success or one clear error.

    python -m tests.fuzz config --minutes 15      one target (config, data, checkpoints, curves)
    python -m tests.fuzz --replay FINDING.json          one case again, with its traceback

Targets (`config_target.py`, ...) say how a case is made, from valid inputs by structured and by blind mutation, and
what is done with it; `campaign.py` runs them in forked processes under a deadline and a memory limit, counts, and keeps
what was found.
"""
