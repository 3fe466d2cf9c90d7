"""Model families: what pctrain needs to know of a Hugging Face config.json, and which values of it change the arithmetic.

A key that would change the arithmetic in a way that is not built is refused by name; it is never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.compute.flops import ModelShape

LARGEST = 2**40  # of a size


@dataclass(frozen=True)
class Family:
    """What an architecture has beyond the common form: RMSNorm before each block, SwiGLU, rotary embeddings, grouped-query attention."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of query and key, before the rotation
    experts: bool = False  # a mixture of experts in place of every feed-forward block
    # Keys whose only value that is built is the one given here (also what transformers takes where the key is missing).
    only: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)  # what transformers takes where a key is missing


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
    """Rotary frequencies of Llama 3.1 and later: low ones divided by `factor`, high ones kept, those between interpolated."""

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
    qk_norm: bool = False
    rope_scaling: Llama3Rope | None = None
    experts: Experts | None = None

    @classmethod
    def read(cls, directory: Path) -> HFConfig:
        """Raises UserError: no config.json, an architecture or a setting that is not built, a missing key or one of the wrong type."""
        path = Path(directory) / "config.json"
        raw = _read_json(path)
        named = raw.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "?"
        family = FAMILIES.get(name)
        if family is None:
            raise UserError(f"{path}: architecture {name:.60} is not supported; supported: {', '.join(FAMILIES)}")
        raw = {**family.defaults, **raw}
        _refuse_what_is_not_built(raw, family, path)
        rope = {
            "rope_theta": raw.get("rope_theta"),
            **_object(raw, "rope_scaling", path),
            **_object(raw, "rope_parameters", path),
        }
        heads, hidden = _count(raw, "num_attention_heads", path), _count(raw, "hidden_size", path)
        if "eos_token_id" not in raw:
            raise UserError(f"{path}: key 'eos_token_id' is missing")
        eos = raw["eos_token_id"]
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if type(eos) is not int or eos < 0:
            raise UserError(
                f"{path}: expected the number of a token under 'eos_token_id', or a list of them, found {_shown(eos)}"
            )
        return cls(
            architecture=name,
            layers=_count(raw, "num_hidden_layers", path),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(raw, "num_key_value_heads", path, heads),
            head_dim=_count(raw, "head_dim", path, hidden // heads or None),
            ffn=_count(raw, "intermediate_size", path),
            vocab=_count(raw, "vocab_size", path),
            context=_count(raw, "max_position_embeddings", path),
            rope_theta=_number(rope, "rope_theta", path, 10000.0),
            norm_eps=_number(raw, "rms_norm_eps", path),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            eos_id=eos,
            qk_norm=family.qk_norm,
            rope_scaling=_rope_scaling(rope, path),
            experts=_experts(raw, path) if family.experts else None,
        )

    @property
    def shape(self) -> ModelShape:
        """What the ledger counts FLOPs by. Of a mixture of experts: the experts that a token passes, and the router."""
        ffn, experts = (
            (self.experts.per_token * self.experts.ffn, self.experts.count) if self.experts else (self.ffn, 0)
        )
        return ModelShape(
            self.layers, self.hidden, ffn, self.heads, self.kv_heads, self.head_dim, self.vocab, self.tied, experts
        )

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding over all ranks: every tensor parallel rank holds the same number."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel


def _read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; model.path must be a Hugging Face directory with config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, numbers of thousands of digits, nested without end
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw


def _refuse_what_is_not_built(raw: dict, family: Family, path: Path) -> None:
    for key, built in {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0, **family.only}.items():
        value = raw.get(key)
        if value is not None and value != built:
            raise UserError(f"{path}: {key} = {_shown(value)} is not supported; expected {json.dumps(built)}")
    if raw.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config: quantised weights cannot be trained; give the directory of the unquantised model"
        )
    window, context = raw.get("sliding_window"), raw.get("max_position_embeddings") or 0
    if type(context) is not int or type(window) not in (int, type(None)):
        raise UserError(
            f"{path}: expected whole numbers under 'max_position_embeddings' and 'sliding_window' (or null there), found "
            f"{_shown(context)} and {_shown(window)}"
        )
    # The Qwen families switch their window by use_sliding_window, refused above; Mistral's applies wherever it is set.
    if "use_sliding_window" not in family.only and window is not None and window < context:
        raise UserError(
            f"{path}: sliding_window = {window} is below max_position_embeddings = {context}; attention within a window is not "
            f"supported: set max_position_embeddings to {window}, up to which the window changes nothing"
        )
    kinds = raw.get("layer_types") or []
    if isinstance(kinds, list) and "sliding_attention" in kinds and "use_sliding_window" in family.only:
        raise UserError(f"{path}: layer_types names sliding_attention; attention within a window is not supported")


def _rope_scaling(rope: dict, path: Path) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor = {_shown(rope['partial_rotary_factor'])} is not supported; expected 1.0"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rope_type {kind!r:.60} is not supported; supported: default, llama3")
    factors = {key: _number(rope, key, path) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["high_freq_factor"] <= factors["low_freq_factor"]:
        raise UserError(
            f"{path}: high_freq_factor = {factors['high_freq_factor']} must be above low_freq_factor = "
            f"{factors['low_freq_factor']}"
        )
    return Llama3Rope(
        **factors, original_max_position_embeddings=_count(rope, "original_max_position_embeddings", path)
    )


def _experts(raw: dict, path: Path) -> Experts:
    # transformers 5 writes num_local_experts for what earlier versions call num_experts.
    key = "num_experts" if raw.get("num_experts") is not None else "num_local_experts"
    experts = Experts(
        _count(raw, key, path),
        _count(raw, "num_experts_per_tok", path),
        _count(raw, "moe_intermediate_size", path),
        bool(raw.get("norm_topk_prob", False)),
    )
    if experts.per_token > experts.count:
        raise UserError(f"{path}: num_experts_per_tok = {experts.per_token} is above {key} = {experts.count}")
    if experts.per_token == 1 and experts.normalised:
        raise UserError(
            f"{path}: num_experts_per_tok = 1 with norm_topk_prob = true: every weight is 1, the router cannot learn"
        )
    return experts


def _count(raw: dict, key: str, path: Path, default: int | None = None) -> int:
    value = raw.get(key, default)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: expected a whole number above 0 under {key!r}, found {_shown(value)}")
    if value > LARGEST:
        raise UserError(f"{path}: the number under {key!r} is above {LARGEST}, which no model has")
    return value


def _number(raw: dict, key: str, path: Path, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        raise UserError(f"{path}: expected a finite number above 0 under {key!r}, found {_shown(value)}")
    return float(value)


def _object(raw: dict, key: str, path: Path) -> dict:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object under {key!r}, found {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return f"{json.dumps(value):.80}"
