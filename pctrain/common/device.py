"""The only check of the device, which everything that differs between CPU and GPU asks, and the dtypes of a model."""

from __future__ import annotations

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # model.dtype


def on_gpu() -> bool:
    """Return whether this job runs on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu() else torch.device("cpu")
