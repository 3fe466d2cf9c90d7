"""The only forward and backward of the project: one batch of packs through megatron-core's schedule.

The head returns sums. The division by the batch's one denominator happens once, in `finalize_model_grads` (gradients)
and in `_reduce` (the reported loss). Nothing here is a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

import pctrain_kernels
from pctrain.common.device import device
from pctrain.core.device_pack import DevicePack
from pctrain.core.layers import context_parallel, router_loss
from pctrain.core.model import attention_layout
from pctrain.data.packing import NO_LABEL, Pack, PackedBatch
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain_kernels import TokenLoss
from pctrain_kernels.linear_token_loss import MAX

HeadFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (hidden states, weight) -> a sum over the pack
# megatron-core's loss function: it gets the head's sum and returns (sum, an integer token count, a dict).
Collect = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict]]
Prepare = Callable[[DevicePack], tuple[HeadFunction, Collect]]


@dataclass(frozen=True)
class PackHead:
    """Makes the head functions of packs; knows how the vocabulary is sharded."""

    hf: HFConfig
    sequence_parallel: bool

    def shard(self) -> dict[str, Any]:
        """Return the keywords that tell the kernels about this rank's part of the vocabulary."""
        group = parallel_state.get_tensor_model_parallel_group()
        rows = self.hf.padded_vocab(group.size()) // group.size()
        return {
            "vocab_start": rows * group.rank(),
            "valid_vocab": self.hf.vocab,
            "group": group if group.size() > 1 else None,
            "sequence_parallel": self.sequence_parallel,
        }

    def loss(
        self,
        pack: DevicePack,
        token_loss: TokenLoss,
        temperature: float,
        want_entropy: bool,
        metric_sums: dict[str, torch.Tensor],
    ) -> HeadFunction:
        """Return a head that returns the pack's weighted loss sum and puts the metrics' sums in `metric_sums`."""

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            total, metrics = pctrain_kernels.linear_token_loss(
                hidden,
                weight,
                pack.labels,
                token_loss,
                streams=pack.streams,
                denom=1.0,
                token_weight=pack.weights,
                temperature=temperature,
                want_entropy=want_entropy,
                # dW goes straight into the fp32 main_grad that data parallelism made, in the forward pass: there is no
                # [V, H] gradient in the parameter's dtype, and no rounding to it between micro-batches. (Ignored
                # without grad mode.)
                grad_weight_out=weight.main_grad,
                rows=pack.labelled,
                **self.shard(),
            )
            metric_sums.update(metrics)
            return total

        return head

    def logprob(
        self,
        pack: DevicePack,
        temperature: float,
        want_entropy: bool,
        results: list[tuple[torch.Tensor, ...]],
    ) -> HeadFunction:
        """Return a head that appends the pack's (log-probs [T],) or (log-probs [T], entropies [T]) to `results`."""

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            logprob, entropy = pctrain_kernels.linear_logprob_entropy(
                hidden,
                weight,
                pack.labels,
                temperature=temperature,
                want_entropy=want_entropy,
                rows=pack.labelled,
                **self.shard(),
            )
            results.append((logprob, entropy) if want_entropy else (logprob,))
            return logprob.sum()

        return head


def run_loss(
    chunks: list,
    head: PackHead,
    spec: str,
    batch: PackedBatch,
    token_loss: TokenLoss,
    *,
    temperature: float,
    want_entropy: bool,
    backward: bool,
) -> tuple[float, dict[str, float]]:
    """Return (loss, metrics) of the whole batch, on every rank.

    The loss is the weighted sum over all ranks' tokens / `batch.denominator`. A metric is a weighted sum /
    `batch.loss_tokens`, or a maximum if its name begins with `max/`. With `backward`, main_grad holds the gradient of
    that loss afterwards. A mixture of experts that is trained with its auxiliary loss adds that loss's gradient, and
    the metrics contain its value.

    `chunks` is this rank's part of the model, one module per virtual pipeline stage.
    """
    sums: list[dict[str, torch.Tensor]] = []

    def prepare(pack: DevicePack) -> tuple[HeadFunction, Collect]:
        metric_sums: dict[str, torch.Tensor] = {}

        def collect(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            sums.append({"loss": total.detach().clone(), **metric_sums})
            # megatron-core wants an integer token count here; `finalize` below uses the batch's own denominator.
            return total, torch.ones((), dtype=torch.int), {}

        return head.loss(pack, token_loss, temperature, want_entropy, metric_sums), collect

    balanced = backward and _has_router_loss(chunks)
    if balanced:
        router_loss.start(chunks, batch.denominator, batch.tokens)
    # Tokens that are not trained on cost nothing in the head.
    denominator = batch.denominator if backward else None
    _schedule(chunks, spec, batch.packs, prepare, trained_only=True, denominator=denominator)
    loss, metrics = _reduce(sums, batch)
    if balanced:
        metrics[router_loss.METRIC] = router_loss.mean(chunks, batch.tokens)
    return loss, metrics


def run_logprob(
    chunks: list,
    head: PackHead,
    spec: str,
    batch: PackedBatch,
    *,
    temperature: float,
    trained_only: bool,
    want_entropy: bool,
) -> list[tuple[torch.Tensor, ...]]:
    """Return (log-probs [T],) or, with `want_entropy`, (log-probs [T], entropies [T]) of this rank's packs.

    Every pipeline stage gets them.
    """
    results: list[tuple[torch.Tensor, ...]] = []

    def prepare(pack: DevicePack) -> tuple[HeadFunction, Collect]:
        pack_head = head.logprob(pack, temperature, want_entropy, results)
        return pack_head, lambda total: (total, torch.ones((), dtype=torch.int), {})

    _schedule(chunks, spec, batch.packs, prepare, trained_only=trained_only, denominator=None)
    group = parallel_state.get_pipeline_model_parallel_group()
    del results[len(batch.packs) :]  # padding packs of the schedule
    if results:  # on the last stage
        results = [
            tuple(context_parallel.gather(values, pack.cu_seqlens) for values in of_pack)
            for of_pack, pack in zip(results, batch.packs, strict=True)
        ]
    if group.size() > 1:
        if not results:
            count = 2 if want_entropy else 1
            results = [
                tuple(torch.empty(len(pack.tokens), device=device()) for _ in range(count)) for pack in batch.packs
            ]
        last = dist.get_process_group_ranks(group)[-1]
        for of_pack in results:
            for values in of_pack:
                dist.broadcast(values, src=last, group=group)
    return results


def _schedule(
    chunks: list, spec: str, packs: list[Pack], prepare: Prepare, *, trained_only: bool, denominator: float | None
) -> None:
    """Run every pack through the pipeline; a denominator asks for gradients."""
    config = chunks[0].module.config
    balanced = denominator is not None and _has_router_loss(chunks)
    interleaved = len(chunks) > 1
    if interleaved:  # virtual stages take micro-batches in groups of as many as there are stages
        missing = -len(packs) % config.pipeline_model_parallel_size
        packs = [*packs, *[_padding_like(packs[0])] * missing]

    def forward_step(remaining: Iterator[Pack], wrapped: Any) -> tuple[torch.Tensor, Collect]:
        watchdog.beat()
        whole = next(remaining)
        layout = attention_layout(spec, config, whole.cu_seqlens, len(whole.tokens))
        pack = DevicePack.place(context_parallel.shard(whole), layout, trained_only=trained_only)
        wrapped.module.head, collect = prepare(pack)
        output = wrapped(
            pack.tokens[None],
            pack.position_ids[None],
            attention_mask=None,
            padding_mask=pack.padding[None] if balanced else None,  # only the auxiliary loss reads it
            packed_seq_params=pack.layout,
        )
        return output, collect

    if denominator is not None:
        config.finalize_model_grads_func = _finalize(denominator)
    with torch.set_grad_enabled(denominator is not None), _deterministic(config.deterministic_mode):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(packs) for _ in chunks] if interleaved else iter(packs),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(packs),
            seq_length=len(packs[0].tokens),
            micro_batch_size=1,
            forward_only=denominator is None,
        )
    for chunk in chunks:
        del chunk.module.head  # it holds the last pack, with the layout's rotary angles


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Have torch take deterministic algorithms only, and raise RuntimeError where an operation has none.

    It does so here only, because vLLM samples with operations that have none.
    """
    if not wanted:
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that everything here overwrites
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _finalize(denominator: float) -> Callable[..., None]:
    """Return megatron-core's last step of a backward pass, which divides the gradients by the denominator."""

    def finalize(chunks: list, num_tokens: torch.Tensor, **kwargs: Any) -> None:
        # megatron-core sums its argument over the ranks that hold other tokens, so each contributes an equal part.
        # float64 keeps the quotient exact.
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        share = torch.full((), denominator / ranks, dtype=torch.float64, device=device())
        finalize_model_grads(chunks, share, **kwargs)

    return finalize


def _has_router_loss(chunks: list) -> bool:
    return chunks[0].module.config.moe_aux_loss_coeff > 0


def _padding_like(pack: Pack) -> Pack:
    """Return a pack of the same size without a sequence."""
    return Pack(
        tokens=torch.zeros_like(pack.tokens),
        labels=torch.full_like(pack.labels, NO_LABEL),
        weights=torch.zeros_like(pack.weights),
        position_ids=torch.zeros_like(pack.position_ids),
        padding=torch.ones_like(pack.padding),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        streams={name: torch.zeros_like(stream) for name, stream in pack.streams.items()},
        rows=[],
    )


def _reduce(sums: list[dict[str, torch.Tensor]], batch: PackedBatch) -> tuple[float, dict[str, float]]:
    """Add the sums of all packs over the data and context parallel ranks, in float64, for every pipeline stage.

    A metric `max/...` is reduced by its maximum.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    result: list = [None]
    if parallel_state.is_pipeline_last_stage():
        maxima = [name for name in sums[0] if name.startswith(MAX)]
        totals = [name for name in sums[0] if not name.startswith(MAX)]
        result[0] = {
            name: total / (batch.denominator if name == "loss" else batch.loss_tokens)
            for name, total in zip(totals, _over_ranks(sums, totals, torch.sum, dist.ReduceOp.SUM), strict=True)
        }
        if maxima:
            result[0] |= zip(maxima, _over_ranks(sums, maxima, torch.amax, dist.ReduceOp.MAX), strict=True)
    if group.size() > 1:
        dist.broadcast_object_list(result, src=dist.get_process_group_ranks(group)[-1], group=group)
    loss = result[0].pop("loss")
    return loss, result[0]


def _over_ranks(
    sums: list[dict[str, torch.Tensor]],
    names: list[str],
    over_packs: Callable[..., torch.Tensor],
    over_ranks: dist.ReduceOp,
) -> list[float]:
    """Reduce each named value over the packs of this rank and over the ranks."""
    values = torch.stack([over_packs(torch.stack([s[name].double() for s in sums])) for name in names])
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        dist.all_reduce(values, op=over_ranks, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return values.tolist()
