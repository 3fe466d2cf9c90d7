"""Model families: the meaning of a Hugging Face config.json for pctrain, and its values that change the arithmetic.

A key that would change the arithmetic in a way that is not implemented is refused by name. It is never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.compute.model_shape import ModelShape
from pctrain.files import json_file
from pctrain.files.durable import write_atomically
from pctrain.hf.directory import CONFIG

LARGEST = 2**40  # no size of a model is above this
ADVICE = "model.path must be a Hugging Face directory with a config.json"


@dataclass(frozen=True)
class Family:
    """The features of an architecture beyond pre-RMSNorm, SwiGLU, rotary embeddings and grouped queries."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of query and key, before the rotation
    experts: bool = False  # a mixture of experts in place of every feed-forward block
    # Keys with the only value that is implemented, which is also the one that transformers takes if the key is missing.
    only: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)  # what transformers takes if a key is missing


FAMILIES = {
    "LlamaForCausalLM": Family(only={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family(defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(qkv_bias=True, only={"use_sliding_window": False}),
    "Qwen3ForCausalLM": Family(
        qk_norm=True, only={"use_sliding_window": False, "attention_bias": False}, defaults={"head_dim": 128}
    ),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True,
        experts=True,
        only={"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary frequencies of Llama 3.1 and later: low ones divided by `factor`, high ones kept, others interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: every token goes to `per_token` of `count` feed-forward networks of width `ffn`."""

    count: int
    per_token: int
    ffn: int
    normalised: bool  # the weights of the chosen experts are divided by their sum


@dataclass(frozen=True)
class HFConfig:
    """The part of a Hugging Face config.json that decides the model's arithmetic.

    The EOS token is not here: the tokenizer decides it (`hf.tokenizer.Tokenizer.eos_id`).
    """

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
    qk_norm: bool = False
    rope_scaling: Llama3Rope | None = None
    experts: Experts | None = None

    @classmethod
    def read(cls, directory: Path) -> HFConfig:
        """Read the config of a Hugging Face directory.

        Raises:
            UserError: there is no config.json, the architecture or a setting is not supported, or a key is missing
                or has the wrong type.
        """
        raw = read_raw(directory)
        path = Path(directory) / CONFIG
        name = _architecture(raw)
        family = FAMILIES.get(name)
        if family is None:
            raise UserError(f"{path}: architecture {name:.60} is not supported; supported: {', '.join(FAMILIES)}")
        fields = _Fields({**family.defaults, **raw}, str(path))
        _refuse_unsupported(fields, family)
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        rope = _Fields(
            {
                "rope_theta": raw.get("rope_theta"),
                **fields.mapping("rope_scaling"),
                **fields.mapping("rope_parameters"),
            },
            str(path),
        )
        return cls(
            architecture=name,
            layers=fields.count("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=fields.count("head_dim", hidden // heads or None),
            ffn=fields.count("intermediate_size"),
            vocab=fields.count("vocab_size"),
            context=fields.count("max_position_embeddings"),
            rope_theta=rope.number("rope_theta", 10000.0),
            norm_eps=fields.number("rms_norm_eps"),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope_scaling=_rope_scaling(rope),
            experts=_experts(fields) if family.experts else None,
        )

    @property
    def shape(self) -> ModelShape:
        """The sizes that FLOPs depend on; of a mixture of experts, the router and the experts that a token passes."""
        ffn, experts = self.ffn, 0
        if self.experts:
            ffn, experts = self.experts.per_token * self.experts.ffn, self.experts.count
        return ModelShape(
            self.layers, self.hidden, ffn, self.heads, self.kv_heads, self.head_dim, self.vocab, self.tied, experts
        )

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Return the rows of the embedding over all ranks: every tensor parallel rank holds the same number."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel


def read_raw(directory: Path) -> dict[str, Any]:
    """Return config.json as it is. Raises UserError if it is missing or is not a JSON object."""
    return json_file.read_object(Path(directory) / CONFIG, ADVICE)


def model_shape(fields: Mapping[str, Any], source: str = CONFIG) -> ModelShape:
    """Return the shape of a Llama-like model (Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral) from config.json fields.

    Unlike `HFConfig.read` it needs the sizes alone, so that a curves file can carry them. `source` names their place in
    error messages.

    Raises:
        UserError: a size is missing, or only some layers have experts.
    """
    sizes = _Fields(fields, source)
    heads, hidden = sizes.count("num_attention_heads"), sizes.count("hidden_size")
    ffn, experts = _passed_feed_forward(sizes)
    return ModelShape(
        layers=sizes.count("num_hidden_layers"),
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=sizes.count("num_key_value_heads", heads),
        head_dim=sizes.count("head_dim", hidden // heads or None),
        vocab=sizes.count("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings", False)),
        experts=experts,
    )


def set_dtype(directory: Path, dtype: str) -> None:
    """Write the dtype of the weights into config.json, which tells it to loaders."""
    raw = read_raw(directory)
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if raw.get(key) != dtype:
        write_atomically(Path(directory) / CONFIG, json.dumps({**raw, key: dtype}, indent=2) + "\n")


def _architecture(raw: Mapping[str, Any]) -> str:
    """Return the first of `architectures`, or "?" if there is none."""
    names = raw.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return "?"


def _refuse_unsupported(fields: _Fields, family: Family) -> None:
    """Raise UserError for a setting that would change the arithmetic in a way that is not implemented."""
    raw, path = fields.raw, fields.source
    only = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0, **family.only}
    for key, supported in only.items():
        value = raw.get(key)
        if value is not None and value != supported:
            raise UserError(f"{path}: {key} = {_shown(value)} is not supported; expected {json.dumps(supported)}")
    if raw.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config: quantized weights cannot be trained; give the directory of the unquantized "
            "model"
        )
    _refuse_window(fields, switched="use_sliding_window" in family.only)


def _refuse_window(fields: _Fields, switched: bool) -> None:
    """Raise UserError if attention is limited to a window.

    `switched`: the family turns its window on by use_sliding_window, which is refused elsewhere. Mistral's window
    applies wherever it is set.
    """
    raw, path = fields.raw, fields.source
    window, context = raw.get("sliding_window"), raw.get("max_position_embeddings") or 0
    if type(context) is not int or type(window) not in (int, type(None)):
        raise UserError(
            f"{path}: expected whole numbers under 'max_position_embeddings' and 'sliding_window' (or null there), "
            f"found {_shown(context)} and {_shown(window)}"
        )
    if not switched and window is not None and window < context:
        raise UserError(
            f"{path}: sliding_window = {window} is below max_position_embeddings = {context}; attention within a "
            f"window is not supported: set max_position_embeddings to {window}, up to which the window changes nothing"
        )
    layer_types = raw.get("layer_types") or []
    if switched and isinstance(layer_types, list) and "sliding_attention" in layer_types:
        raise UserError(f"{path}: layer_types names sliding_attention; attention within a window is not supported")


def _rope_scaling(rope: _Fields) -> Llama3Rope | None:
    raw, path = rope.raw, rope.source
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor = {_shown(raw['partial_rotary_factor'])} is not supported; expected 1.0"
        )
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise UserError(f"{path}: rope_type {rope_type!r:.60} is not supported; supported: default, llama3")
    factors = {key: rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["high_freq_factor"] <= factors["low_freq_factor"]:
        raise UserError(
            f"{path}: high_freq_factor = {factors['high_freq_factor']} must be above low_freq_factor = "
            f"{factors['low_freq_factor']}"
        )
    return Llama3Rope(**factors, original_max_position_embeddings=rope.count("original_max_position_embeddings"))


def _experts_key(fields: _Fields) -> str:
    """Return the key of the number of experts: transformers 5 writes num_local_experts, earlier ones num_experts."""
    return "num_experts" if fields.raw.get("num_experts") is not None else "num_local_experts"


def _experts(fields: _Fields) -> Experts:
    key, path = _experts_key(fields), fields.source
    experts = Experts(
        fields.count(key),
        fields.count("num_experts_per_tok"),
        fields.count("moe_intermediate_size"),
        bool(fields.raw.get("norm_topk_prob", False)),
    )
    if experts.per_token > experts.count:
        raise UserError(f"{path}: num_experts_per_tok = {experts.per_token} is above {key} = {experts.count}")
    if experts.per_token == 1 and experts.normalised:
        raise UserError(
            f"{path}: num_experts_per_tok = 1 with norm_topk_prob = true: every weight is 1, the router cannot learn"
        )
    return experts


def _passed_feed_forward(fields: _Fields) -> tuple[int, int]:
    """Return (feed-forward width that a token passes, experts of a layer; 0: dense)."""
    if fields.raw.get("moe_intermediate_size") is None:
        return fields.count("intermediate_size"), 0
    no_dense_layers: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("mlp_only_layers", ([], None)),
        ("decoder_sparse_step", (1, None)),
        ("shared_expert_intermediate_size", (0, None)),
    )
    for key, allowed in no_dense_layers:
        if fields.raw.get(key) not in allowed:
            raise UserError(
                f"{fields.source}: `{key}` = {fields.raw[key]!r}: FLOPs are only counted for models whose layers all "
                "have routed experts and no other feed-forward block; give the curves in EFLOPs that you have counted "
                "yourself, and leave the model out"
            )
    width = fields.count("num_experts_per_tok") * fields.count("moe_intermediate_size")
    return width, fields.count(_experts_key(fields))


@dataclass(frozen=True)
class _Fields:
    """The keys of a config.json, read by type. `source` names the file in error messages."""

    raw: Mapping[str, Any]
    source: str

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 to LARGEST. A key that is null counts as missing."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.source}: expected a whole number above 0 under {key!r}, found {_shown(value)}")
        if value > LARGEST:
            raise UserError(f"{self.source}: the number under {key!r} is above {LARGEST}, which no model has")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0. A key that is null counts as missing."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
            raise UserError(f"{self.source}: expected a finite number above 0 under {key!r}, found {_shown(value)}")
        return float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an object, or {} if the key is missing or empty."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self.source}: expected an object under {key!r}, found {_shown(value)}")
        return value

    def _get(self, key: str, default: float | None) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.source}: key {key!r} is missing")
        return value


def _shown(value: object) -> str:
    return f"{json.dumps(value, default=repr):.80}"
