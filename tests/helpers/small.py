"""A model and data small enough for many layouts, and the functions that one rank runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pctrain.config.tree import ArchitectureConfig, ModelConfig, OptimizerConfig, ParallelConfig
from pctrain.data.rows import Row, make_row
from pctrain.data.scratch_model import make_hf_dir

if TYPE_CHECKING:
    from pctrain.core import Learner, Update

OPTIMIZER = OptimizerConfig(lr=3e-3, warmup=5, weight_decay=0.1)
BUDGET = 256


def hf_dir(folder: Path, *, tied: bool) -> Path:
    """Make a model with grouped-query attention (4 heads on 2 key/value heads), 4 layers and an odd vocabulary."""
    architecture = ArchitectureConfig(layers=4, hidden=32, heads=4, kv_heads=2, ffn=80, context=256, tied=tied)
    return make_hf_dir(folder, architecture, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=331, seed=1)


def rows(count: int = 24, seed: int = 0, longest: int = 90) -> list[Row]:
    """Return sequences of very different lengths: several attention buckets, several packs."""
    rng = np.random.default_rng(seed)
    return [
        make_row(rng.integers(3, 260, 5).tolist(), rng.integers(3, 260, rng.integers(2, longest)).tolist())
        for _ in range(count)
    ]


def rows_of_a_pack(seed: int = 0) -> list[Row]:
    """Return six sequences of which no two fit into a pack.

    The packs are the same at any data parallel size, and some of them are padding packs.
    """
    rng = np.random.default_rng(seed)
    return [
        make_row(rng.integers(3, 260, 5).tolist(), rng.integers(3, 260, rng.integers(130, 240)).tolist())
        for _ in range(6)
    ]


def learner(
    directory: Path,
    layout: dict,
    *,
    train: bool = True,
    checkpoint: Path | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    total_steps: int = 100,
    dtype: str = "float32",
    router_aux_loss: float = 0.0,
    deterministic: bool = False,
) -> Learner:
    from pctrain.core import Learner

    config = ModelConfig(dtype=dtype, router_aux_loss=router_aux_loss, deterministic=deterministic)
    return Learner(
        config.resolved(directory, checkpoint),
        ParallelConfig(**layout),
        optimizer_config=optimizer if train else None,
        total_steps=total_steps,
        seed=0,
    )


def step(model: Learner, step: int) -> Update:
    """Run one SFT step on that step's batch. (The auxiliary loss of experts depends on the packs.)"""
    from pctrain.sft.loss import cross_entropy

    of_experts = model.modules[0].config.moe_aux_loss_coeff > 0
    return model.train_step(
        model.pack(rows_of_a_pack(step) if of_experts else rows(seed=step), BUDGET), cross_entropy, want_entropy=False
    )


def train(directory: Path, layout: dict, steps: int, *, router_aux_loss: float = 0.0) -> dict:
    """Return losses, metrics and gradient norms of the first steps, and the Hugging Face weights after 3 of them."""
    model = learner(directory, layout, router_aux_loss=router_aux_loss)
    updates = [step(model, i) for i in range(3)]
    weights = {name: tensor.numpy().copy() for name, tensor in model.hf_weights()}
    updates += [step(model, i) for i in range(3, steps)]
    return {
        "loss": [u.loss for u in updates],
        "metrics": [u.metrics for u in updates],
        "grad_norm": [u.grad_norm for u in updates],
        "weights": weights,
    }


def save_and_continue(directory: Path, layout: dict, folder: Path, steps: int, **options: Any) -> tuple:
    """Train `steps` steps, save a checkpoint in `folder`, and return the result of as many more."""
    from pctrain.distributed import parallel

    model = learner(directory, layout, **options)
    for i in range(steps):
        step(model, i)
    if parallel.rank() == 0:
        folder.mkdir()
    parallel.barrier()
    model.save(folder)
    return train_on(model, steps)


def load_and_continue(directory: Path, layout: dict, folder: Path, steps: int, **options: Any) -> tuple:
    model = learner(directory, layout, **options)
    model.load(folder)
    return train_on(model, steps)


def train_on(model: Learner, steps: int) -> tuple:
    """Train `steps` more steps; return losses, gradient norms, (learning rate, metrics) and the final weights."""
    updates = [step(model, i) for i in range(steps, 2 * steps)]
    weights = {name: tensor.numpy().copy() for name, tensor in model.hf_weights()}
    return [u.loss for u in updates], [u.grad_norm for u in updates], [(u.lr, u.metrics) for u in updates], weights
