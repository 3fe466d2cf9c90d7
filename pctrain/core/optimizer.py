"""AdamW in megatron-core's distributed optimizer, its schedule, and what its checkpoints need."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pctrain.common.device import device
from pctrain.config.tree import OptimizerConfig


def build(config: OptimizerConfig, chunks: list[torch.nn.Module], dtype: torch.dtype, total_steps: int):
    """Returns (megatron-core optimizer, scheduler). Norm weights and biases are not decayed (megatron-core's default).

    `chunks`: this rank's part of the model, a module for each virtual pipeline stage. The first step has num_steps = 1.
    """
    _count_padding(chunks)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        chunks,
    )
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"] = (
                True  # one pass over a parameter instead of one for each operation; megatron-core has no key for it
            )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup,
        lr_decay_steps=max(total_steps, config.warmup + 1),
        lr_decay_style={"wsd": "WSD"}.get(config.schedule, config.schedule),
        wsd_decay_steps=config.decay,
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _count_padding(chunks: list[torch.nn.Module]) -> None:
    """Mends checkpoints of buffers with several buckets (a tied embedding in a pipeline has one of its own; overlap makes more).

    For a checkpoint, megatron-core lays buckets end to end without the padding between them, and then looks for each parameter where it
    stands with the padding: Adam's moments and the masters would be saved shifted, with a warning at most. Here padding counts as content.
    """
    for buffer in (buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers):
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def global_norm(optimizer) -> float | None:
    """Norm of the whole gradient; None where it is not finite, on all ranks alike. Nothing is changed yet. Collective."""
    failed = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    # Each part of a chained optimizer (expert parameters are one) sums over a group of its own: agree over the whole world.
    finite = torch.tensor(float(not failed and math.isfinite(norm)), device=device())
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return norm if finite.item() else None


def apply(optimizer, clip: float, norm: float) -> None:
    """Clips the gradients that `global_norm` has seen, and updates the weights: `optimizer.step()` without a second pass over them."""
    for part in optimizer.chained_optimizers:
        parameters = (
            [] if part.is_stub_optimizer else part.get_parameters()
        )  # a stub: this rank has no parameter of that kind
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chained if isinstance(getattr(o, "optimizer", None), torch.optim.AdamW)]


def prime(optimizer) -> None:
    """Gives torch's AdamW its state before a save or a load: megatron-core reads state["step"] of an optimizer that never stepped."""
    for inner in _torch_optimizers(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter].update(
                    step=torch.tensor(0.0, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )


def unshare_steps(optimizer) -> None:
    """After a load all parameters hold ONE step tensor, which AdamW would then advance once per parameter: give each its own."""
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).detach().clone()
