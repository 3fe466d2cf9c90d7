"""`Learner`: one trainable model on the ranks of this job."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from pctrain.common.device import DTYPES, on_gpu
from pctrain.common.errors import UserError
from pctrain.config.tree import ModelConfig, OptimizerConfig, ParallelConfig
from pctrain.core import checkpoint, model, optimizer, patches, step, weight_buckets, weights
from pctrain.core.layers import context_parallel
from pctrain.core.layers import spec as layers
from pctrain.core.reference import Reference
from pctrain.core.step import TokenLoss
from pctrain.data.packing import MULTIPLE, PackedBatch, PackShape, pack_rows
from pctrain.data.rows import Row, RowSet
from pctrain.distributed import parallel
from pctrain.hf.config import HFConfig


@dataclass(frozen=True)
class Update:
    """What one optimizer step did. `loss` (a weighted sum / the batch's denominator) and `metrics` (weighted means over the batch's loss
    tokens) are from before the update.

    `skipped`: loss or gradient norm (then NaN here) was not finite, or the norm above `optimizer.skip_above`, and no rank updated
    anything; the schedule went on.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool = False


def _pack_shape(config: ModelConfig, par: ParallelConfig, hf: HFConfig) -> PackShape:
    """Sizes that can be cut over the tensor and context parallel ranks; of one pack for all stages of a pipeline."""
    align = context_parallel.alignment(par.context)
    return PackShape(
        align=align,
        multiple=math.lcm(MULTIPLE, par.tensor * align * config.fp8_block),
        equal=par.pipeline > 1,
        balanced_length=hf.shape.balanced_length,
    )


class Learner:
    """A model from a Hugging Face directory, sharded over this job's ranks; with an optimizer, trainable.

    Every method is collective: all ranks call it with the same arguments (batches excepted: each holds its own packs).
    """

    def __init__(
        self,
        config: ModelConfig,
        par: ParallelConfig,
        *,
        optimizer_config: OptimizerConfig | None,
        total_steps: int,
        seed: int,
    ):
        patches.install()
        parallel.initialize(par, seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        self._source, self._start_checkpoint = config.path, config.checkpoint
        self.hf = HFConfig.read(config.path)
        self.spec = layers.choose_spec(config, par)
        self.chunks = model.build(self.hf, config, par, trainable=optimizer_config is not None)
        self._te = self.spec == "te"
        self._pack_shape = _pack_shape(config, par, self.hf)
        # Weights first: the optimizer copies them where it keeps masters of its own.
        self._load_start()
        self._reference: Reference | None = None
        self._head = step.Head(self.hf, par.sequence_parallel)
        self.saver = checkpoint.Saver(background=on_gpu())
        self._optimizer = self._scheduler = None
        if optimizer_config is not None:
            dtype = DTYPES[config.dtype]
            self._clip, self._skip_above = optimizer_config.clip, optimizer_config.skip_above
            self._optimizer, self._scheduler = optimizer.build(optimizer_config, self.chunks, dtype, total_steps)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """This rank's part of the model, without the wrapper for data parallelism."""
        return [chunk.module for chunk in self.chunks]

    def describe(self) -> str:
        """One line for the start of a run: the model, the layer spec that was chosen, and the layout."""
        tensor, pipeline = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        context, data = parallel_state.get_context_parallel_world_size(), parallel.data_parallel()[1]
        model = f"{self.hf.architecture}, {self.hf.shape.parameters / 1e6:.4g}M parameters"
        return (
            f"{model}; layer spec {self.spec}; {parallel.world_size()} rank(s): tensor {tensor} x pipeline {pipeline} "
            f"x context {context} x data {data}"
        )

    def pack(self, rows: Sequence[Row] | RowSet, token_budget: int, *, denominator: float | None = None) -> PackedBatch:
        """The rows as micro-batches of at most `token_budget` positions; this rank holds its data parallel share of them.

        `denominator`: what loss and gradients are divided by, over all ranks; None: the sum of the weights.
        """
        rank, size = parallel.data_parallel()
        return pack_rows(
            rows, token_budget, dp_rank=rank, dp_size=size, shape=self._pack_shape, denominator=denominator
        )

    def step(
        self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True
    ) -> Update:
        """Forward, backward and one optimizer update. `want_entropy` False: the loss gets None for it, and the head is cheaper.

        A loss or gradient that is not finite, or a norm above `optimizer.skip_above`, leaves weights and optimizer as they were, on every
        rank (`Update.skipped`). The learning rate follows the number of calls either way, so that a schedule ends with its run.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        options = {"temperature": temperature, "want_entropy": want_entropy}
        loss, metrics = step.run_loss(self.chunks, self._head, self.spec, batch, token_loss, **options, backward=True)
        # Before the update, so that the first step already has a learning rate above 0.
        self._scheduler.step(1)
        lr = self._optimizer.param_groups[0]["lr"]
        grad_norm = (
            optimizer.global_norm(self._optimizer) if math.isfinite(loss) else None
        )  # every rank has the same loss
        if grad_norm is None:
            return Update(loss, metrics, math.nan, lr, skipped=True)
        if self._skip_above is not None and grad_norm > self._skip_above:
            return Update(loss, metrics, grad_norm, lr, skipped=True)
        optimizer.apply(self._optimizer, self._clip, grad_norm)
        return Update(loss, metrics, grad_norm, lr)

    def forward(
        self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True
    ) -> tuple[float, dict[str, float]]:
        """(loss, metrics) of the batch, no gradient: sums over all ranks / `batch.denominator` (loss) and `batch.loss_tokens` (metrics)."""
        self._eval()
        options = {"temperature": temperature, "want_entropy": want_entropy}
        return step.run_loss(self.chunks, self._head, self.spec, batch, token_loss, **options, backward=False)

    def logprobs(
        self,
        rows: Sequence[Row] | RowSet,
        token_budget: int,
        *,
        temperature: float = 1.0,
        trained_only: bool = False,
        want_entropy: bool = False,
    ) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-prob of every token given those before it, float32 [L] a row on every rank; entry 0 is 0 (nothing predicts it).

        `trained_only`: 0 where the row's weight is 0 as well, whose logits are not made. `want_entropy`: (log-probs, entropies) of the same
        pass, the latter of the distribution that each token was drawn from, in nats, in the same form.
        """
        self._eval()
        rows = rows if isinstance(rows, RowSet) else RowSet.of(rows)
        batch, dp_size = self.pack(rows, token_budget), parallel.data_parallel()[1]
        options = {"temperature": temperature, "trained_only": trained_only, "want_entropy": want_entropy}
        by_pack = step.run_logprob(self.chunks, self._head, self.spec, batch, **options)
        found: dict[int, np.ndarray] = {}  # of each row [1 or 2, L]: log-probs, entropies
        for pack, of_pack in zip(batch.packs, by_pack, strict=True):
            values, bounds = torch.stack(of_pack).float().cpu().numpy(), pack.cu_seqlens.tolist()
            for row, start in zip(pack.rows, bounds[:-1], strict=True):
                found[row] = np.pad(values[:, start : start + rows.lengths[row] - 1], ((0, 0), (1, 0)))
        if dp_size > 1:
            shares: list = [None] * dp_size
            dist.all_gather_object(shares, found, group=parallel_state.get_data_parallel_group())
            found = {row: values for share in shares for row, values in share.items()}
        logprobs = [found[i][0] for i in range(len(rows))]
        return (logprobs, [found[i][1] for i in range(len(rows))]) if want_entropy else logprobs

    def keep_reference(self, offload: bool = False) -> None:
        """Keeps the START weights (`model.checkpoint`, or else `model.path`) beside the trained ones, sharded as they are.

        Called when steps were made or a checkpoint was loaded, it reads them from there again. `offload`: in host memory, where the model
        is on a GPU; there they take device memory inside `reference()` alone.
        """
        self._reference = Reference(self.modules, load=self._load_start, offload=offload)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `logprobs` and `forward` are those of the reference; afterwards, also after an exception, the weights are as before."""
        if self._reference is None:
            raise UserError("there is no reference model: keep_reference was not called; this is a fault of the caller")
        with self._reference.in_place():
            yield

    def _load_start(self) -> None:
        if self._start_checkpoint is not None:
            checkpoint.load_weights(self._start_checkpoint, self.chunks)
        else:
            weights.load_hf(self.modules, self.hf, self._source, self._te)

    def _eval(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) of every weight, on every rank; iterate to the end on all of them."""
        return weight_buckets.stream_hf(self.modules, self.hf, self._te)

    def export(self, folder: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Writes the weights as a Hugging Face directory that transformers and vLLM load. `dtypes`: by name; None: as in the model."""
        weights.save_hf(
            self.modules, self.hf, self._te, self._source, folder, writes=parallel.rank() == 0, dtypes=dtypes
        )
        parallel.barrier()

    def save(self, directory: Path, done: Callable[[], None] = lambda: None) -> None:
        """Writes into an empty folder what `load` reads; `done` (collective) is called when all of it lies there.

        On a GPU the writing goes on in the background, and `done` comes out of a later `poll_save`.
        """
        self.saver.save(directory, self.chunks, self._optimizer, self._scheduler, done)

    def poll_save(self, *, wait: bool = False) -> None:
        """Completes a save whose writing has ended; `wait`: waits for the end. Does nothing where none is under way."""
        self.saver.poll(wait=wait)

    def load(self, directory: Path) -> None:
        """Weights, optimizer, schedule and RNG of a checkpoint made at any layout."""
        if self._optimizer is None:
            raise UserError("a model without an optimizer cannot be resumed; this is a fault of the caller")
        checkpoint.load(directory, self.chunks, self._optimizer, self._scheduler)
