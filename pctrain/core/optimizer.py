"""AdamW in megatron-core's distributed optimizer, its schedule, and what its checkpoints need."""

from __future__ import annotations

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pctrain.config import OptimizerConfig


def build(config: OptimizerConfig, model: torch.nn.Module, dtype: torch.dtype, total_steps: int):
    """Returns (megatron-core optimizer, scheduler). Norm weights and biases are not decayed (megatron-core's default)."""
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
        [model],
    )
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"] = True  # one pass over a parameter instead of one for each operation; megatron-core has no key for it
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup,
        lr_decay_steps=max(total_steps, config.warmup + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chained if isinstance(getattr(o, "optimizer", None), torch.optim.AdamW)]


def prime(optimizer) -> None:
    """Gives torch's AdamW its state before a load: megatron-core reads state["step"] of an optimizer that never stepped."""
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
