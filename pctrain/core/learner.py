"""`Learner`: one trainable model on the ranks of this job."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from pctrain.common.device import DTYPES, on_gpu
from pctrain.common.errors import UserError
from pctrain.config.tree import OptimizerConfig, ParallelConfig, ResolvedModelConfig
from pctrain.core import checkpoint, model, optimizer, patches, step, weight_buckets, weights
from pctrain.core.layers import context_parallel
from pctrain.core.layers import spec as layers
from pctrain.core.reference import Reference
from pctrain.data.packing import MULTIPLE, PackedBatch, PackShape, pack_rows
from pctrain.data.rows import Row, RowSet
from pctrain.distributed import gpu_environment, parallel
from pctrain.hf.config import HFConfig
from pctrain_kernels import TokenLoss


@dataclass(frozen=True)
class Update:
    """The result of one optimizer update. `loss` and `metrics` are from before the update.

    `loss` is a weighted sum over the batch's denominator; `metrics` are weighted means over the batch's loss tokens.
    `skipped` means that no rank updated anything, because the loss or the gradient norm (then NaN here) was not finite,
    or the norm was above `optimizer.skip_above`. The learning rate schedule advances all the same.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool = False


class Learner:
    """A model from a Hugging Face directory, sharded over this job's ranks; trainable if it has an optimizer.

    Every method is collective: all ranks call it with the same arguments (batches excepted: each rank holds its own
    packs).
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        par: ParallelConfig,
        *,
        optimizer_config: OptimizerConfig | None,
        total_steps: int,
        seed: int,
    ):
        """Build the model and load its start weights.

        Args:
            config: the model; its `checkpoint`, if there is one, has the start weights, else its `path`.
            par: how the model is cut over the ranks.
            optimizer_config: None for a model that is not trained.
            total_steps: optimizer updates of the whole run, for the learning rate schedule.
            seed: of the generators.
        """
        gpu_environment.prepare(deterministic=config.deterministic)
        patches.install()  # asks for a GPU
        parallel.initialize(par, seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        self._source = config.path
        self._start_checkpoint = config.checkpoint
        self.hf = HFConfig.read(config.path)
        self.spec = layers.choose_spec(config, par)
        self.chunks = model.build(self.hf, config, par, trainable=optimizer_config is not None)
        self._te = self.spec == "te"
        self._pack_shape = _pack_shape(config, par, self.hf)
        # Weights first: an optimizer with master weights copies them.
        self._load_start()
        self._reference: Reference | None = None
        self.head = step.PackHead(self.hf, par.sequence_parallel)
        self.saver = checkpoint.Saver(background=on_gpu())
        self.optimizer: Any = None
        self._scheduler: Any = None
        if optimizer_config is not None:
            dtype = DTYPES[config.dtype]
            self._clip, self._skip_above = optimizer_config.clip, optimizer_config.skip_above
            self.optimizer, self._scheduler = optimizer.build(optimizer_config, self.chunks, dtype, total_steps)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """This rank's part of the model, without the wrapper for data parallelism."""
        return [chunk.module for chunk in self.chunks]

    def describe(self) -> str:
        """Return one line for the start of a run: the model, the chosen layer spec, and the layout."""
        sizes = {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "context": parallel_state.get_context_parallel_world_size(),
            "data": parallel.data_parallel()[1],
        }
        layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
        model = f"{self.hf.architecture}, {self.hf.shape.parameters / 1e6:.4g}M parameters"
        return f"{model}; layer spec {self.spec}; {parallel.world_size()} rank(s): {layout}"

    # ---- training --------------------------------------------------------------------------------------------------

    def pack(self, rows: Sequence[Row] | RowSet, token_budget: int, *, denominator: float | None = None) -> PackedBatch:
        """Pack rows into micro-batches of at most `token_budget` positions; this rank gets its data parallel share.

        Loss and gradients are divided by `denominator`, which counts over all ranks; None is the sum of the weights.
        """
        rank, size = parallel.data_parallel()
        return pack_rows(
            rows, token_budget, dp_rank=rank, dp_size=size, shape=self._pack_shape, denominator=denominator
        )

    def train_step(
        self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True
    ) -> Update:
        """Run forward and backward over the batch, and make one optimizer update.

        Without `want_entropy` the loss gets None for the entropy, and the head is cheaper. A loss or gradient that is
        not finite, or a norm above `optimizer.skip_above`, leaves weights and optimizer as they were on every rank
        (`Update.skipped`). The learning rate follows the number of calls either way, so that a schedule ends with its
        run.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, metrics = step.run_loss(
            self.chunks,
            self.head,
            self.spec,
            batch,
            token_loss,
            temperature=temperature,
            want_entropy=want_entropy,
            backward=True,
        )
        # Before the update, so that the first step already has a learning rate above 0.
        self._scheduler.step(1)
        lr = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):  # every rank has the same loss
            return Update(loss, metrics, math.nan, lr, skipped=True)
        grad_norm = optimizer.global_norm(self.optimizer)
        if grad_norm is None:
            return Update(loss, metrics, math.nan, lr, skipped=True)
        if self._skip_above is not None and grad_norm > self._skip_above:
            return Update(loss, metrics, grad_norm, lr, skipped=True)
        optimizer.apply(self.optimizer, self._clip, grad_norm)
        return Update(loss, metrics, grad_norm, lr)

    # ---- without gradients -----------------------------------------------------------------------------------------

    def forward(
        self, batch: PackedBatch, token_loss: TokenLoss, *, temperature: float = 1.0, want_entropy: bool = True
    ) -> tuple[float, dict[str, float]]:
        """Return (loss, metrics) of the batch: sums over all ranks / `batch.denominator` and / `batch.loss_tokens`."""
        self._eval()
        return step.run_loss(
            self.chunks,
            self.head,
            self.spec,
            batch,
            token_loss,
            temperature=temperature,
            want_entropy=want_entropy,
            backward=False,
        )

    def logprobs(
        self,
        rows: Sequence[Row] | RowSet,
        token_budget: int,
        *,
        temperature: float = 1.0,
        trained_only: bool = False,
    ) -> list[np.ndarray]:
        """Return the log-prob of every token given those before it, float32 [L] per row, on every rank.

        Entry 0 is 0, because nothing predicts the first token. With `trained_only` the entries of tokens with weight 0
        are 0 too, and their logits are not computed.
        """
        values = self._token_values(rows, token_budget, temperature, trained_only, want_entropy=False)
        return [of_row[0] for of_row in values]

    def logprobs_and_entropies(
        self,
        rows: Sequence[Row] | RowSet,
        token_budget: int,
        *,
        temperature: float = 1.0,
        trained_only: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the log-probs of `logprobs` and, from the same pass, the entropies in the same form.

        The entropy is that of the distribution that the token was drawn from, in nats.
        """
        values = self._token_values(rows, token_budget, temperature, trained_only, want_entropy=True)
        return [of_row[0] for of_row in values], [of_row[1] for of_row in values]

    def _token_values(
        self,
        rows: Sequence[Row] | RowSet,
        token_budget: int,
        temperature: float,
        trained_only: bool,
        want_entropy: bool,
    ) -> list[np.ndarray]:
        """Return one float32 array [1 or 2, L] per row: log-probs and, if wanted, entropies."""
        self._eval()
        rows = rows if isinstance(rows, RowSet) else RowSet.of(rows)
        batch = self.pack(rows, token_budget)
        by_pack = step.run_logprob(
            self.chunks,
            self.head,
            self.spec,
            batch,
            temperature=temperature,
            trained_only=trained_only,
            want_entropy=want_entropy,
        )
        by_row: dict[int, np.ndarray] = {}
        for pack, of_pack in zip(batch.packs, by_pack, strict=True):
            values = torch.stack(of_pack).float().cpu().numpy()
            starts = pack.cu_seqlens.tolist()[:-1]
            for row, start in zip(pack.rows, starts, strict=True):
                by_row[row] = np.pad(values[:, start : start + rows.lengths[row] - 1], ((0, 0), (1, 0)))
        data_parallel_size = parallel.data_parallel()[1]
        if data_parallel_size > 1:
            shares: list = [None] * data_parallel_size
            dist.all_gather_object(shares, by_row, group=parallel_state.get_data_parallel_group())
            by_row = {row: values for share in shares for row, values in share.items()}
        return [by_row[i] for i in range(len(rows))]

    def _eval(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    # ---- the reference model ---------------------------------------------------------------------------------------

    def keep_reference(self, offload: bool = False) -> None:
        """Keep the START weights (`model.checkpoint`, or else `model.path`) next to the trained ones, sharded alike.

        They are read from there again, so steps may have been made or a checkpoint loaded before the call. With
        `offload` they are kept in host memory, if the model is on a GPU, and take device memory only inside
        `reference()`.
        """
        self._reference = Reference(self.modules, load=self._load_start, offload=offload)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Make `logprobs` and `forward` use the reference; afterwards, also after an exception, restore the weights."""
        if self._reference is None:
            raise UserError("there is no reference model: keep_reference was not called. This is a fault of the caller")
        with self._reference.in_place():
            yield

    def _load_start(self) -> None:
        if self._start_checkpoint is not None:
            checkpoint.load_weights(self._start_checkpoint, self.chunks)
        else:
            weights.load_hf(self.modules, self.hf, self._source, self._te)

    # ---- weights and checkpoints -----------------------------------------------------------------------------------

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, full tensor) of every weight on every rank; all ranks must iterate to the end."""
        return weight_buckets.stream_hf(self.modules, self.hf, self._te)

    def export(self, folder: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Write the weights as a Hugging Face directory that transformers and vLLM load.

        `dtypes` gives the dtype of weights by name; None keeps the model's.
        """
        weights.save_hf(
            self.modules, self.hf, self._te, self._source, folder, writes=parallel.rank() == 0, dtypes=dtypes
        )
        parallel.barrier()

    def save(self, directory: Path, done: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint into an empty folder; `done` (collective) is called once it is complete.

        On a GPU a background process writes it, and a later `poll_save` calls `done`.
        """
        self.saver.save(directory, self.chunks, self.optimizer, self._scheduler, done)

    def poll_save(self, *, wait: bool = False) -> None:
        """Complete a save whose writing has ended; `wait` waits for the end. Does nothing if no save is under way."""
        self.saver.poll(wait=wait)

    def load(self, directory: Path) -> None:
        """Load weights, optimizer, schedule and RNG state of a checkpoint, saved at any layout."""
        if self.optimizer is None:
            raise UserError("a model without an optimizer cannot be resumed. This is a fault of the caller")
        checkpoint.load(directory, self.chunks, self.optimizer, self._scheduler)


def _pack_shape(config: ResolvedModelConfig, par: ParallelConfig, hf: HFConfig) -> PackShape:
    """Return pack sizes that tensor and context parallel ranks can share, equal for all stages of a pipeline."""
    align = context_parallel.alignment(par.context)
    return PackShape(
        align=align,
        multiple=math.lcm(MULTIPLE, par.tensor * align * config.fp8_block),
        equal=par.pipeline > 1,
        balanced_length=hf.shape.balanced_length,
    )
