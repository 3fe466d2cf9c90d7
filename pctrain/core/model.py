"""megatron-core's GPTModel from a Hugging Face config.json, with the loss head in place of its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from pctrain.ceiling.flops import ModelShape
from pctrain.config import ModelConfig, ParallelConfig
from pctrain.core import layers
from pctrain.device import device
from pctrain.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}


@dataclass(frozen=True)
class HFConfig:
    """The part of a Hugging Face config.json that decides the model's shape."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool
    eos_id: int

    @classmethod
    def read(cls, directory: Path) -> HFConfig:
        path = Path(directory) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; model.path must be a Hugging Face directory with config.json") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
        name = (raw.get("architectures") or ["?"])[0]
        if name not in _ARCHITECTURES:
            raise UserError(f"{path}: architecture {name} is not supported; supported: {', '.join(_ARCHITECTURES)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"{path}: rope_type {rope['rope_type']!r} is not supported yet; only plain RoPE is")
        if raw.get("attention_bias") and name == "LlamaForCausalLM" or raw.get("mlp_bias"):
            raise UserError(f"{path}: attention_bias and mlp_bias of Llama are not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; silu is")
        try:
            heads, eos = raw["num_attention_heads"], raw["eos_token_id"]
            return cls(
                architecture=name,
                layers=raw["num_hidden_layers"],
                hidden=raw["hidden_size"],
                heads=heads,
                kv_heads=raw.get("num_key_value_heads", heads),
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                ffn=raw["intermediate_size"],
                vocab=raw["vocab_size"],
                context=raw["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
                norm_eps=raw["rms_norm_eps"],
                tied=raw.get("tie_word_embeddings", False),
                qkv_bias=name == "Qwen2ForCausalLM",
                eos_id=eos[0] if isinstance(eos, list) else eos,
            )
        except KeyError as error:
            raise UserError(f"{path}: key {error} is missing") from None

    @property
    def shape(self) -> ModelShape:
        """What the ledger counts FLOPs by."""
        return ModelShape(self.layers, self.hidden, self.ffn, self.heads, self.kv_heads, self.head_dim, self.vocab, self.tied)

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding over all ranks: every tensor parallel rank holds the same number."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel


class CausalLM(GPTModel):
    """GPTModel that hands its last hidden states to `head` instead of making logits.

    `head(hidden [T, H] ([T / tp, H] under sequence parallel), weight [V / tp, H]) -> what the last pipeline stage returns`; the core sets
    it before each forward.
    """

    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params=None, **kwargs):
        """The torch spec rotates in its attention, where it knows each token's position in its sequence: the angles go there."""
        out = super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs)
        if isinstance(packed_seq_params, layers.PackedLayout):
            packed_seq_params.angles = out[1]
            out = (out[0], None, *out[2:])
        return out

    def _postprocess(self, hidden_states, *args, **kwargs):
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        return self.head(hidden_states.squeeze(1), weight)


def transformer_config(hf: HFConfig, model: ModelConfig, par: ParallelConfig) -> TransformerConfig:
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=par.tensor,
        pipeline_model_parallel_size=par.pipeline,
        sequence_parallel=par.sequence_parallel,
        params_dtype=DTYPES[model.dtype],
        pipeline_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        attention_softmax_in_fp32=True,
        # The weights come from the Hugging Face directory, so nothing is drawn here. (perform_initialization=False would also leave out the
        # tensor parallel marks of the parameters: gradient norm and clipping would then count one shard only.)
        init_method=lambda weight: None,
        output_layer_init_method=lambda weight: None,
        embedding_init_method=lambda weight: None,
        # The loss function returns sums; finalize_model_grads divides once by the global token count.
        calculate_per_token_loss=True,
        # Fused kernels of megatron-core that need CUDA extensions.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build(hf: HFConfig, model: ModelConfig, par: ParallelConfig) -> DistributedDataParallel:
    """This rank's part of the model, wrapped for data parallelism. Weights are not loaded yet."""
    config = transformer_config(hf, model, par)
    spec = layers.choose_spec(model.spec)
    module = CausalLM(
        config,
        layers.layer_spec(spec, config),
        vocab_size=hf.padded_vocab(par.tensor),
        max_sequence_length=hf.context,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tied,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,
    ).to(device())
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
    )
    wrapped = DistributedDataParallel(config, ddp, module)
    skip_collectives_of_one(wrapped)
    return wrapped


def skip_collectives_of_one(wrapped: DistributedDataParallel) -> None:
    """Data parallel groups of one rank need no reduce-scatter and no all-gather: both would copy buffers onto themselves.

    megatron-core makes the calls all the same (on a small model 2 % of a step). They are left in place where they do more than that: where
    they overlap with computation, look for NaN, or scale (never with `calculate_per_token_loss`).
    """
    config = wrapped.ddp_config
    if config.overlap_grad_reduce or config.overlap_param_gather or config.check_for_nan_in_grad or config.check_for_large_grads:
        return
    for group in [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]:
        if group.intra_distributed_optimizer_instance_size == 1 and all(b.gradient_scaling_factor == 1.0 for b in group.buckets):
            group.start_grad_sync = group.start_param_sync = lambda *args, **kwargs: None


def attention_layout(spec: str, cu_seqlens: torch.Tensor, tokens: int) -> PackedSeqParams:
    """What attention needs to know of a pack: cu_seqlens int32 [n + 1] over its real tokens, `tokens` positions in all."""
    if spec == "torch":
        return layers.PackedLayout.of(cu_seqlens, tokens)
    bounds = cu_seqlens if int(cu_seqlens[-1]) == tokens else torch.cat([cu_seqlens, cu_seqlens.new_tensor([tokens])])
    longest = int((bounds[1:] - bounds[:-1]).max())
    bounds = bounds.to(device())
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
