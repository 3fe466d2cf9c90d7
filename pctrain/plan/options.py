"""What `pctrain plan` takes beside the keys of the config. What is not in the config and changes the answer is an assumption, and a key
here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pctrain.config.tree import Section


class PlanOptions(Section):
    gpus: int = Field(ge=1, description="GPUs in all, a rank each (of --gpu cpu: ranks on this machine)")
    gpu: str = Field(
        description="their kind; h200, h100, a100-80, a100-40, b200, or cpu: this machine, whose rates are then measured"
    )
    kind: Literal["sft", "rl"] | None = Field(
        None, description="what is planned; default: rl where the config sets rl.* and no sft.*, else sft"
    )
    gpus_per_node: int = Field(8, ge=1, description="GPUs that share a fast link (NVLink)")
    prompt: int | None = Field(
        None, ge=1, description="mean prompt, tokens; default: 256, or an eighth of a smaller context"
    )
    response: int | None = Field(
        None,
        ge=1,
        description="mean response, tokens; default: half of rollout.max_response, in SFT of what a pack still holds",
    )
    mfu: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of its peak that a GPU reaches while it computes (wires and bubble are apart)",
    )
    reserve: float = Field(
        2.5,
        ge=0,
        description="GiB a GPU that are nobody's: CUDA context, libraries, NCCL's buffers, the allocator's holes (not of cpu)",
    )
    top: int = Field(8, ge=1, description="layouts in the table")
    out: Path | None = Field(None, description="write the plan to this file as well, as JSON")
    figure: Path | None = Field(None, description="draw the memory of these layouts into this PNG")
