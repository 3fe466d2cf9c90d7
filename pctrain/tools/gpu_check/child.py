"""The process of a phase, or of a program that a phase starts: `python -m pctrain.tools.gpu_check.child JSON`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

from pctrain.common.environment import set_environment
from pctrain.core.child_processes import die_with
from pctrain.tools.gpu_check.check import Check, SkipPhase, hand_over
from pctrain.tools.gpu_check.results import SKIP

SKIPPED = 77  # exit status


def main() -> int:
    """Run what the argument names and return the exit status."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    die_with(os.getppid())
    check = Check(**asked["check"])
    set_environment()
    if check.gpu:
        _need_a_gpu()
    phase = importlib.import_module(f"pctrain.tools.gpu_check.phases.{check.phase}")
    if "function" in asked:
        hand_over(asked["result"], getattr(phase, asked["function"])(check, **asked["arguments"]))
        if asked["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0
    try:
        phase.run(check)
    except SkipPhase as reason:
        check.journal.append("point", phase=check.phase, point="phase", status=SKIP, note=str(reason))
        return SKIPPED
    return 0


def _need_a_gpu() -> None:
    """Exit with the way out where torch has no GPU. Its variables are set before it is asked for, as in a run."""
    import torch

    from pctrain.distributed import gpu_environment

    gpu_environment.prepare()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device. Expected a GPU and its driver. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or add --cpu to run the check without a GPU"
        )


if __name__ == "__main__":
    sys.exit(main())
