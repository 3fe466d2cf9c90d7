"""`Core`: one trainable model on the ranks of this job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pctrain.config import ModelConfig, OptimizerConfig, ParallelConfig
from pctrain.core import checkpoint, layers, model, optimizer, parallel, step, weights
from pctrain.core.hf_config import HFConfig
from pctrain.core.step import TokenLoss
from pctrain.data.packing import PackedBatch, pack_rows
from pctrain.data.rows import Row
from pctrain.errors import UserError


@dataclass(frozen=True)
class Update:
    """What one optimizer step did. `loss` and `metrics` are weighted means over the batch's loss tokens, from before the update."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float


class Core:
    """A model from a Hugging Face directory, sharded over this job's ranks; with an optimizer, trainable.

    Every method is collective: all ranks call it with the same arguments (batches excepted: each holds its own packs).
    """

    def __init__(self, config: ModelConfig, par: ParallelConfig, *, optimizer_config: OptimizerConfig | None, total_steps: int, seed: int):
        parallel.initialize(par, seed)
        self._source = config.path
        self.hf = HFConfig.read(config.path)
        self.spec = layers.choose_spec(config.spec)
        self.model = model.build(self.hf, config, par, trainable=optimizer_config is not None)
        self._te = self.spec == "te"
        # Weights first: the optimizer copies them where it keeps masters of its own.
        if config.checkpoint is not None:
            checkpoint.load(config.checkpoint, self.model)
        else:
            weights.load_hf(self.modules, self.hf, config.path, self._te)
        self._head = step.Head(self.hf, par.sequence_parallel)
        self._optimizer = self._scheduler = None
        if optimizer_config is not None:
            dtype = model.DTYPES[config.dtype]
            self._optimizer, self._scheduler = optimizer.build(optimizer_config, self.model, dtype, total_steps)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """This rank's part of the model, without the wrapper for data parallelism."""
        return [self.model.module]

    def step(self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True) -> Update:
        """Forward, backward and one optimizer update. `want_entropy` False: the loss gets None for it, and the head is cheaper.

        Raises FloatingPointError where loss (before anything is updated) or gradient norm is not finite.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        options = {"temperature": temperature, "want_entropy": want_entropy}
        loss, metrics = step.run_loss(self.model, self._head, self.spec, batch, token_loss, **options, backward=True)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: nothing was updated; lower the learning rate or look at the last batch")
        # Before the update, so that the first step already has a learning rate above 0.
        self._scheduler.step(1)
        lr = self._optimizer.param_groups[0]["lr"]
        ok, grad_norm, _ = self._optimizer.step()
        if not ok or not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}: this run cannot go on; resume from its last checkpoint")
        return Update(loss, metrics, float(grad_norm), lr)

    def forward(
        self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True
    ) -> tuple[float, dict[str, float]]:
        """(loss, metrics) of the batch, no gradient: sums over all ranks / `batch.loss_tokens`."""
        self.model.eval()
        options = {"temperature": temperature, "want_entropy": want_entropy}
        return step.run_loss(self.model, self._head, self.spec, batch, token_loss, **options, backward=False)

    def logprobs(self, rows: list[Row], token_budget: int, *, temperature: float = 1.0) -> list[np.ndarray]:
        """Log-prob of every token given those before it, float32 [L] a row on every rank; entry 0 is 0 (nothing predicts it)."""
        self.model.eval()
        dp_rank, dp_size = parallel.data_parallel()
        batch = pack_rows(rows, token_budget, dp_rank=dp_rank, dp_size=dp_size)
        found: dict[int, np.ndarray] = {}
        for pack, logprob in zip(batch.packs, step.run_logprob(self.model, self._head, self.spec, batch, temperature), strict=True):
            values, bounds = logprob.cpu().numpy(), pack.cu_seqlens.tolist()
            for row, a, b in zip(pack.rows, bounds[:-1], bounds[1:], strict=True):
                found[row] = np.concatenate([[0.0], values[a : b - 1]]).astype(np.float32)
        if dp_size > 1:
            shares: list = [None] * dp_size
            dist.all_gather_object(shares, found, group=parallel_state.get_data_parallel_group())
            found = {row: values for share in shares for row, values in share.items()}
        return [found[i] for i in range(len(rows))]

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) of every weight, on every rank; iterate to the end on all of them."""
        return weights.export_hf(self.modules, self.hf, self._te)

    def export(self, folder: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Writes the weights as a Hugging Face directory that transformers and vLLM load. `dtypes`: by name; None: as in the model."""
        weights.save_hf(self.modules, self.hf, self._te, self._source, folder, writes=parallel.rank() == 0, dtypes=dtypes)
        parallel.barrier()

    def save(self, directory: Path) -> None:
        checkpoint.save(directory, self.model, self._optimizer, self._scheduler)

    def load(self, directory: Path) -> None:
        """Weights, optimizer, schedule and RNG of a checkpoint made at any layout."""
        if self._optimizer is None:
            raise UserError("a model without an optimizer cannot be resumed; this is a fault of the caller")
        checkpoint.load(directory, self.model, self._optimizer, self._scheduler)
