"""The auxiliary load-balancing loss of a mixture of experts.

It keeps the router from sending every token to the same few experts. For a pack of n real tokens (padding excluded) and
one layer of E experts, k of them per token (Switch Transformer, and megatron-core's `aux_loss`):

    A = E * sum_i f_i * p_i
    f_i = tokens that went to expert i / (k * n)
    p_i = mean of expert i's softmax probability over the n tokens

A is 1 where all experts are used alike, and at most E / k. f is a count, so the gradient flows through p only. The
term added to the loss is

    coefficient * sum over layers of (sum over packs of n * A / sum over packs of n)

over the packs of all ranks. A is not linear in its tokens: it depends on how they are packed, but not on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pctrain.core.megatron_version import mlp_submodules
from pctrain.distributed import parallel

METRIC = "router_aux_loss"


class BalancedRouter(TopKRouter):
    """megatron-core's router with its auxiliary loss on the project's denominator.

    megatron-core weighs the loss with the tokens of one tensor parallel rank, a fraction of the pack under sequence
    parallel, and divides by 0 for a pack without tokens.

    Attributes:
        scale: weight of one token's auxiliary loss in the sums that the learner divides by `batch.denominator`.
        total: float64 [], this rank's part of the sum of n * A over the packs since `start`.
    """

    scale = 1.0
    total: torch.Tensor

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Return probs [tokens, E] with the loss attached; scores and routing_map [tokens, E] are 0 on padding."""
        counts, _, n = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        # This rank's tokens' part of n * A; the counts are those of all ranks.
        share = n * switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts,
            total_num_tokens=n.clamp(min=1),
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=1.0,
        )
        self.total += share.detach()
        with_loss: torch.Tensor = MoEAuxLossAutoScaler.apply(
            probs, share * (self.scale * self.config.moe_aux_loss_coeff)
        )
        return with_loss


def use_in(spec: ModuleSpec | TransformerBlockSubmodules) -> None:
    """Put the router into the spec of a mixture of experts: of one layer (Transformer Engine) or of a whole block."""
    for layer in spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]:
        mlp_submodules(layer.submodules.mlp).router = BalancedRouter


def start(chunks: list[torch.nn.Module], denominator: float, tokens: int) -> None:
    """Begin a batch with that denominator and `tokens` real tokens over all ranks."""
    for router in _routers(chunks):
        router.scale = denominator / tokens
        router.total = torch.zeros((), dtype=torch.float64, device=router.weight.device)


def mean(chunks: list[torch.nn.Module], tokens: int) -> float:
    """Return A of the batch since `start`, averaged over tokens and layers. Collective over the world."""
    config = chunks[0].module.config
    total = torch.zeros((), dtype=torch.float64, device=next(chunks[0].parameters()).device)
    for router in _routers(chunks):
        total += router.total
    if parallel.world_size() > 1:  # each rank has other layers, packs or tokens
        dist.all_reduce(total)
    return float(total) / (tokens * config.num_layers)


def _routers(chunks: list[torch.nn.Module]) -> Iterable[BalancedRouter]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, BalancedRouter))
