"""Build models, rows, steps and checkpoints for the phases of the learner."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pctrain.tools.gpu_check import models
from pctrain.tools.gpu_check.check import Check

if TYPE_CHECKING:  # the learner takes seconds to import
    from pctrain.core import Learner
    from pctrain.data.rows import Row

SEED = 0


def model(check: Check, *, shallow: bool = False) -> Path:
    """Return the directory of the phases' model, made by the first that asks for it."""
    size = models.TINY if not check.gpu else models.SHALLOW if shallow else models.HUNDRED_MILLION
    return models.llama(Path(check.scratch) / f"llama-{size.num_hidden_layers}", size)


def token_budget(check: Check) -> int:
    """Return the tokens of a micro-batch."""
    return 4096 if check.gpu else 256


def rows(check: Check, count: int = 8) -> list[Row]:
    """Return sequences of random tokens and very different lengths, always the same."""
    from pctrain.data.rows import make_row

    random = np.random.default_rng(SEED)
    lengths = random.integers(20, 1024 if check.gpu else 90, count)
    return [make_row(random.integers(3, 300, 5).tolist(), random.integers(3, 300, n).tolist()) for n in lengths]


@contextmanager
def learner(
    check: Check, directory: Path, spec: str, dtype: str, *, fp8: str | None = None, train: bool = True
) -> Iterator[Learner]:
    """Build a learner, and free its memory afterwards."""
    import torch

    from pctrain.config.tree import ModelConfig, OptimizerConfig, ParallelConfig
    from pctrain.core import Learner

    config = ModelConfig.model_validate({"dtype": dtype, "spec": spec, "fp8": fp8})
    optimizer = OptimizerConfig(lr=1e-3 if check.gpu else 3e-3, warmup=2) if train else None
    built = Learner(
        config.resolved(directory, None), ParallelConfig(), optimizer_config=optimizer, total_steps=100, seed=SEED
    )
    try:
        yield built
    finally:
        del built
        gc.collect()
        if check.gpu:
            torch.cuda.empty_cache()


def steps(check: Check, learner: Learner, batch: Sequence[Row], count: int) -> list[float]:
    """Make SFT steps on the same rows and return their losses."""
    from pctrain.sft.loss import cross_entropy

    losses = []
    for _ in range(count):
        update = learner.train_step(learner.pack(batch, token_budget(check)), cross_entropy, want_entropy=False)
        if update.skipped:
            raise RuntimeError(f"a step was skipped: loss {update.loss}, gradient norm {update.grad_norm}")
        losses.append(update.loss)
    return losses


def save(learner: Learner, folder: Path) -> None:
    """Write a checkpoint into a new folder and wait until it is complete."""
    done: list[bool] = []
    folder.mkdir(parents=True)
    learner.save(folder, lambda: done.append(True))
    learner.poll_save(wait=True)
    if not done:
        raise RuntimeError(f"{folder}: the save did not complete")
