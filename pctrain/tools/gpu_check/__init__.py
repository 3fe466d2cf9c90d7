"""Check a GPU machine: `python launch/gpu_check.py` and `pctrain doctor --full`.

Every phase runs in its own process with a time limit. The modules that start and judge them import the standard library
only, so that a machine with just torch and Triton can run the phases that need no more.
"""
