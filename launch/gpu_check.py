#!/usr/bin/env python3
"""Check a GPU machine in at most ten minutes: kernels, learner, checkpoints, engine.

docs/gpu.md, section "Checking a GPU machine", lists the phases.

    python launch/gpu_check.py [--phases A,B] [--out DIR] [--quick] [--cpu] [--seconds S]
    python launch/gpu_check.py --compare RESULTS [BASELINE]

It needs no installation: torch and Triton are enough for the kernels, and what needs more is skipped with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pctrain.tools.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
