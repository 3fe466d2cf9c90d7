"""megatron-core's GPTModel from a Hugging Face config.json, with the loss head in place of its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from pctrain.common.device import DTYPES, device, on_gpu
from pctrain.config.tree import ModelConfig, ParallelConfig
from pctrain.core.layers import router_loss
from pctrain.core.layers import spec as layers
from pctrain.core.layers.packed_attention import PackedLayout
from pctrain.core.layers.rotary import RotatedLayout
from pctrain.core.layers.varlen_attention import VarlenLayout, flash_bounds, whole_bounds
from pctrain.hf.config import HFConfig

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
# Gradients need range more than digits. Where a scale covers a small block only, e4m3 has enough range for both.
_FP8: dict[str | None, dict[str, Any]] = {
    None: {},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}


class CausalLM(GPTModel):
    """GPTModel that hands its last hidden states to `head` instead of making logits.

    The learner sets `head` before each forward pass. It takes the hidden states [T, H] ([T / tp, H] under sequence
    parallel) and the output weight [V / tp, H]. Its result is what the last pipeline stage returns.
    """

    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Hand the rotary angles to the layout where the torch specs rotate, and cut the padding mask.

        The torch specs rotate in their attention, which knows each token's position in its sequence. Under sequence
        parallel, megatron-core would cut the padding mask (bool [1, T]) to this rank's positions on the first pipeline
        stage only.
        """
        out = super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs)
        if padding_mask is not None and self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        out = (*out[:5], padding_mask, *out[6:])
        if isinstance(packed_seq_params, RotatedLayout):
            packed_seq_params.angles = out[1]
            out = (out[0], None, *out[2:])
        return out

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return self.head(hidden_states.squeeze(1), weight)


def transformer_config(hf: HFConfig, model: ModelConfig, par: ParallelConfig, spec: str) -> TransformerConfig:
    """Return megatron-core's config of the model at this layout, with the layers of `spec`."""
    return TransformerConfig(
        num_layers=hf.layers,
        hidden_size=hf.hidden,
        num_attention_heads=hf.heads,
        num_query_groups=hf.kv_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=hf.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        qk_layernorm=hf.qk_norm,
        **_experts(hf, model, par),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=par.tensor,
        pipeline_model_parallel_size=par.pipeline,
        virtual_pipeline_model_parallel_size=par.virtual_pipeline if par.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=par.first_stage_layers,
        num_layers_in_last_pipeline_stage=par.last_stage_layers,
        # With virtual stages, batched point-to-point calls give a wrong loss and no error.
        overlap_p2p_comm=par.virtual_pipeline > 1,
        batch_p2p_comm=par.virtual_pipeline == 1,
        sequence_parallel=par.sequence_parallel,
        context_parallel_size=par.context,
        params_dtype=DTYPES[model.dtype],
        pipeline_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        **_FP8[model.fp8],
        attention_softmax_in_fp32=True,
        # The weights come from the Hugging Face directory, so nothing is drawn here. (With perform_initialization=False
        # parameters would lack their tensor parallel marks: gradient norm and clipping would count one shard only.)
        init_method=lambda weight: None,
        output_layer_init_method=lambda weight: None,
        embedding_init_method=lambda weight: None,
        # The loss function returns sums; finalize_model_grads divides once by the global token count.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=True,  # see patches/grad_accumulation.py
        **_RECOMPUTE[par.recompute],
        # Compiled by torch.compile, and only where a GPU runs it. It keeps a third less for the backward pass.
        bias_activation_fusion=spec != "torch",
        # A kernel of Transformer Engine. Without it, the host reads the bounds of the sequences in every layer.
        apply_rope_fusion=spec == "te",
        bias_dropout_fusion=False,  # there is neither a bias nor dropout
        masked_softmax_fusion=False,  # no spec's attention has a separate softmax
        deterministic_mode=model.deterministic and on_gpu(),
    )


def _experts(hf: HFConfig, model: ModelConfig, par: ParallelConfig) -> dict[str, Any]:
    """Return TransformerConfig's keys for a mixture of experts; none for a dense model."""
    if hf.experts is None:
        return {}
    return {
        "num_moe_experts": hf.experts.count,
        "moe_ffn_hidden_size": hf.experts.ffn,
        "moe_router_topk": hf.experts.per_token,
        # Softmax over the chosen logits alone = softmax over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not hf.experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if model.router_aux_loss else "none",
        "moe_aux_loss_coeff": model.router_aux_loss,
        "moe_token_dispatcher_type": "alltoall",  # the only one that takes sequences of any length
        "expert_model_parallel_size": par.expert,
    }


def build(hf: HFConfig, model: ModelConfig, par: ParallelConfig, *, trainable: bool) -> list[DistributedDataParallel]:
    """Return this rank's part of the model, wrapped for data parallelism: one module per virtual pipeline stage.

    The weights are not loaded yet. A model that is not `trainable` has no gradient buffers, which are as large as the
    model in float32. Call `core.patches.install()` first.
    """
    spec = layers.choose_spec(model, par)
    config = transformer_config(hf, model, par, spec)
    stages: list[int | None] = [*range(par.virtual_pipeline)] if par.virtual_pipeline > 1 else [None]
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=par.overlap_grad_reduce,
        # The step checks the norm and skips. An assertion on one rank would leave the others waiting.
        check_for_nan_in_grad=False,
    )
    # Buckets serve overlap. Those of the other chunks are reduced after the whole backward pass anyway.
    parts = [_chunk(hf, par, config, spec, i).requires_grad_(trainable) for i in stages]
    for part in parts:
        _keep_experts_apart(part)
    chunks = [DistributedDataParallel(config, ddp, part, disable_bucketing=i > 0) for i, part in enumerate(parts)]
    if par.overlap_grad_reduce:
        # Without this, every micro-batch would reduce.
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def _chunk(hf: HFConfig, par: ParallelConfig, config: TransformerConfig, spec: str, vp_stage: int | None) -> CausalLM:
    """Return the layers of this rank's pipeline stage, or of one of its virtual stages."""
    layer_spec = layers.layer_spec(spec, config, hf.qk_norm, vp_stage=vp_stage)
    if hf.experts is not None:
        router_loss.use_in(layer_spec)
    module = CausalLM(
        config,
        layer_spec,
        vocab_size=hf.padded_vocab(par.tensor),
        max_sequence_length=hf.context,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf.tied,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,
        vp_stage=vp_stage,
    ).to(device())
    if hf.rope_scaling is not None:
        # megatron-core's constructor fixes all values but the factor. Its formula, which is that of transformers for
        # Llama 3.1, takes them all.
        rotary = module.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **asdict(hf.rope_scaling))
    return module


def _keep_experts_apart(part: CausalLM) -> None:
    """Give experts separate gradient buffers and a separate optimizer, as megatron-core does under expert parallel.

    A checkpoint stores the state by optimizer. Otherwise, one written with expert parallel could not be read without
    it, nor the other way round.
    """
    for name, parameter in part.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def attention_layout(spec: str, config: TransformerConfig, cu_seqlens: torch.Tensor, tokens: int) -> PackedSeqParams:
    """Return the bounds of a pack's sequences in the form that the spec's attention reads, in host memory.

    `cu_seqlens` is int32 [n + 1] over the sequences of a pack of `tokens` positions.
    """
    if spec == "torch":
        return PackedLayout.build(cu_seqlens, tokens, config.num_attention_heads * config.kv_channels)
    if spec == "torch-varlen":
        return VarlenLayout.build(cu_seqlens, tokens)
    return PackedSeqParams(qkv_format="thd", **flash_bounds(whole_bounds(cu_seqlens, tokens)))
