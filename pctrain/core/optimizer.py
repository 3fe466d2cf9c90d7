"""AdamW in megatron-core's distributed optimizer, its schedule, and two fixes that its checkpoints need."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pctrain.common.device import device
from pctrain.config.tree import OptimizerConfig


def build(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], dtype: torch.dtype, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return the optimizer and the scheduler. Norm weights and biases are not decayed (megatron-core's default).

    `chunks` is this rank's part of the model, one module for each virtual pipeline stage. The first step has
    num_steps = 1.
    """
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
            # One pass over a parameter instead of one for each operation; megatron-core has no key for it.
            group["fused"] = True
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


def global_norm(optimizer: MegatronOptimizer) -> float | None:
    """Return the norm of the whole gradient, or None on every rank if it is not finite. Changes nothing. Collective."""
    failed = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    # Each part of a chained optimizer (experts are one) sums over a separate group: agree over the whole world.
    finite = torch.full((), float(not failed and math.isfinite(norm)), device=device())
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return norm if finite.item() else None


def apply(optimizer: MegatronOptimizer, clip: float, norm: float) -> None:
    """Clip the gradients whose norm `global_norm` returned, and update the weights.

    This is `optimizer.step()` without a second pass over the gradients.
    """
    for part in optimizer.chained_optimizers:
        # A stub optimizer means that this rank has no parameter of that kind.
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.AdamW)]


def prime(optimizer: MegatronOptimizer) -> None:
    """Give Adam its state before a save or a load.

    megatron-core 0.16.1 reads a state that an optimizer which never stepped does not have yet: the moments of Adam, be
    it Transformer Engine's or torch's, and the `step` that torch's AdamW keeps for each parameter.
    """
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.init_state_fn(part.optimizer, part.config)
    for inner in _torch_optimizers(optimizer):
        for parameter, state in inner.state.items():
            state.setdefault("step", torch.zeros((), device=parameter.device))


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a separate step tensor after a load.

    megatron-core 0.16.1 lets all parameters share one, which AdamW would then advance once per parameter.
    """
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).detach().clone()
