"""The options of `pctrain plan` besides config keys. Each assumption that changes the answer is an option."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pctrain.config.tree import Section


class PlanOptions(Section):
    """Options of `pctrain plan`."""

    gpus: int = Field(ge=1, description="number of GPUs, with one rank each (--gpu cpu: ranks on this machine)")
    gpu: str = Field(
        description="kind of GPU: h200, h100, a100-80, a100-40, b200, or cpu for this machine, whose rates are "
        "measured first"
    )
    kind: Literal["sft", "rl"] | None = Field(
        None, description="what to plan; default: rl if the config sets rl.* and no sft.*, else sft"
    )
    gpus_per_node: int = Field(8, ge=1, description="GPUs that share a fast link (NVLink)")
    prompt: int | None = Field(
        None, ge=1, description="mean prompt, tokens; default: 256, or an eighth of a smaller context"
    )
    response: int | None = Field(
        None,
        ge=1,
        description="mean response, tokens; default: half of rollout.max_response; for SFT half of what a pack holds "
        "besides the prompt",
    )
    mfu: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of its peak that a GPU reaches while it computes; communication and bubble are counted "
        "separately",
    )
    reserve: float = Field(
        2.5,
        ge=0,
        description="GiB per GPU for the CUDA context, libraries, NCCL's buffers and memory fragmentation (not for "
        "cpu)",
    )
    top: int = Field(8, ge=1, description="number of layouts in the table")
    out: Path | None = Field(None, description="also write the plan to this file, as JSON")
    figure: Path | None = Field(None, description="also draw the memory of these layouts, as PNG")
