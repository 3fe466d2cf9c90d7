"""Sections `run`, `model` and `parallel`: where a run writes, what it trains, and over which ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pctrain.config.section import Section


class RunConfig(Section):
    """The run folder, the seed, and what is written along the way."""

    dir: Path = Field(Path("runs/default"), description="run folder: everything that this run writes")
    seed: int = Field(0, ge=0, description="seed of data order, initial weights and sampling")
    tensorboard: bool = Field(True, description="write TensorBoard events into the run folder")
    wandb: str | None = Field(
        None, min_length=1, description="Weights & Biases project to log to as well (needs the wandb package)"
    )
    keep_last: int | None = Field(
        None,
        ge=1,
        description="number of newest checkpoints to keep, besides the best one; default: keep all. `pctrain run` "
        "always keeps all checkpoints of SFT",
    )
    keep_every: int | None = Field(
        None, ge=1, description="with run.keep_last: also keep each checkpoint whose step is a multiple of this"
    )


class ArchitectureConfig(Section):
    """Shape of a model made from scratch (Llama form: RMSNorm, SwiGLU, RoPE). Not read if `model.path` is given."""

    layers: int = Field(3, ge=1, description="transformer layers")
    hidden: int = Field(128, ge=8, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int = Field(4, ge=1, description="key/value heads (fewer than heads: grouped-query attention)")
    ffn: int = Field(384, ge=8, description="feed-forward width")
    context: int = Field(256, ge=16, description="longest sequence, tokens")
    tied: bool = Field(True, description="share one matrix between the embedding and the output head")


class ModelConfig(Section):
    """The model: where its weights come from, and how it computes."""

    path: Path | None = Field(
        None,
        description="Hugging Face directory (config.json, tokenizer.json, safetensors); default: make a small model "
        "from model.architecture",
    )
    checkpoint: Path | None = Field(
        None, description="pctrain checkpoint (RUN/checkpoints/step-N) to start from; only its weights are read"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of parameters and activations")
    spec: Literal["auto", "te", "torch-varlen", "torch"] = Field(
        "auto",
        description="layer implementation: te (Transformer Engine), torch-varlen (PyTorch with variable-length flash "
        "attention, CUDA only), torch (plain PyTorch); auto: the fastest one available, for float32 torch",
    )
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = Field(
        None,
        description="scaling recipe of 8-bit matrix products (needs te and bfloat16; mxfp8 needs Blackwell); default: "
        "none",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: the same run gives the same bits, and a completion does not depend on what is sampled "
        "with it; slower. A CPU does both anyway: there it changes nothing",
    )
    router_aux_loss: float = Field(
        0.0,
        ge=0,
        description="mixture of experts: coefficient of the load-balancing loss in training, summed over layers; 0: "
        "none",
    )
    architecture: ArchitectureConfig = Field(default_factory=ArchitectureConfig)

    @property
    def fp8_block(self) -> int:
        """Return the number of tokens that an 8-bit matrix product takes at a time, 1 without fp8."""
        if self.fp8 is None:
            return 1
        return 32 if self.fp8 == "mxfp8" else 16

    def resolved(self, path: Path, checkpoint: Path | None = None) -> ResolvedModelConfig:
        """Return a copy with this model directory, and with this checkpoint to start from."""
        return ResolvedModelConfig.model_validate(self.model_dump() | {"path": path, "checkpoint": checkpoint})


class ResolvedModelConfig(ModelConfig):
    """A model whose directory is known."""

    path: Path


class ParallelConfig(Section):
    """How the model is spread over ranks. The data parallel size is world size / (tensor x pipeline x context)."""

    tensor: int = Field(1, ge=1, description="tensor parallel size, ranks")
    pipeline: int = Field(1, ge=1, description="pipeline parallel size, ranks")
    context: int = Field(
        1, ge=1, description="context parallel size, ranks: each sequence is cut into that many parts (te only)"
    )
    expert: int = Field(
        1, ge=1, description="expert parallel size, ranks, taken from the data parallel ranks (mixture of experts only)"
    )
    sequence_parallel: bool = Field(
        False, description="shard activations of norms and residuals along the sequence (needs tensor > 1)"
    )
    virtual_pipeline: int = Field(
        1, ge=1, description="interleaved virtual stages per pipeline stage: a smaller bubble, more traffic"
    )
    first_stage_layers: int | None = Field(
        None, ge=1, description="layers of the first pipeline stage; default: an even share"
    )
    last_stage_layers: int | None = Field(
        None, ge=1, description="layers of the last pipeline stage; default: an even share"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations to recompute in the backward pass: none, those inside attention (selective), or "
        "everything but each layer's input (full)",
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over data parallel ranks during the backward pass"
    )
    timeout: float = Field(
        600,
        gt=0,
        le=604800,
        description="seconds without progress (a collective, an engine step, a verdict) after which a rank counts as "
        "hanging and the run ends",
    )
