"""The project's only device check: everything that differs between CPU and GPU asks here. And the dtypes a model may have."""

from __future__ import annotations

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of model.dtype


def on_gpu() -> bool:
    """Whether this job runs on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: its GPU, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu() else torch.device("cpu")
