"""A stand-in for FusedAdam of Transformer Engine 2.11.0: its signature and its state, with torch's arithmetic.

The real one has the moments only after its first step, and keeps one `step` for each parameter group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW under the signature of the real class."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter | dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ):
        assert adam_w_mode and not (amsgrad or capturable or master_weights or use_decoupled_grad)
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load; as the real one, make the state new, in float32."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            self.state[parameter] = {name: value.float() for name, value in state.items()}

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        torch.optim._functional.adamw(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.tensor(group["step"] - 1.0)],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@contextmanager
def in_place_of_torchs() -> Iterator[None]:
    """Have megatron-core take the stand-in, as it takes the real one where Transformer Engine is installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with ExitStack() as stack:
        for module, name, value in (
            (optimizer, "Adam", FusedAdam),
            (optimizer, "USING_PYTORCH_OPTIMIZER", False),
            (distrib_optimizer, "Adam", FusedAdam),
            (distrib_optimizer, "HAVE_APEX_OR_TE", True),
            (distrib_optimizer, "USING_TE_OPTIMIZER", True),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
