"""Sections `rollout`, `reward` and `eval`: how responses are sampled, judged and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pctrain.config.data import FieldsConfig
from pctrain.config.section import Section


class RolloutConfig(Section):
    """The vLLM engine that samples responses in training."""

    tensor: int = Field(
        1, ge=1, description="tensor parallel size of one engine, ranks: 1 or a divisor of parallel.tensor"
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature of training rollouts; the learner's log-probs use it too"
    )
    max_prompt: int | None = Field(
        None,
        ge=1,
        description="longest prompt in training and in its evaluations, tokens; the KV cache must hold it together "
        "with the longest response; default: what the context leaves",
    )
    max_response: int = Field(48, ge=1, description="longest response, tokens")
    max_sequences: int = Field(256, ge=1, description="sequences that one engine decodes at once")
    kv_cache_mb: int = Field(256, ge=16, description="KV cache of one engine, MB (CPU only)")
    gpu_memory: float = Field(
        0.4, gt=0, lt=1, description="share of the GPU's memory that an engine may use (GPU only)"
    )
    verify_every: int = Field(
        10,
        ge=1,
        description="weight updates between checks that engine and learner give the same log-probs; the first is "
        "always checked",
    )
    verify_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference of those log-probs, nats per token; default: 2e-5 in float32 (5e-3 on a "
        "GPU, whose attention uses TF32), 0.1 in bfloat16",
    )


class RewardConfig(Section):
    """The verifier that turns a response and the gold answer into a reward."""

    verifier: str = Field(
        "strict",
        min_length=1,
        description="strict: the last \\boxed{} compared as string, number, Math-Verify; lenient: strict, then "
        "RETU's chain (stated answers, equivalent LaTeX, rounded decimals, choices); exact: the same string in the "
        "box; choice: a letter A to J; or your function as module:function, sync or async, (response, answer) -> "
        "bool or number in [0, 1]",
    )
    levenshtein: bool = Field(
        False,
        description="add a last link to the lenient chain: a string more than 0.6 similar to the answer is correct. "
        "This can be exploited: 1234567 is rewarded for 1234568, and a policy learns to imitate the look of an answer",
    )
    workers: int = Field(1, ge=1, description="verifier processes per rank")
    timeout: float = Field(
        5.0,
        gt=0,
        description="deadline for one verdict, seconds; a slower one is killed and counted, and its reward is 0",
    )
    memory_mb: int = Field(
        2048,
        ge=64,
        description="address space that a worker may use beyond its imports, MB; a verdict that needs more is counted "
        "as a `memory` fault, and its reward is 0 (Linux)",
    )


class BenchmarkConfig(Section):
    """One benchmark of `pctrain eval`."""

    path: Path = Field(
        description="file, glob or folder of a Hugging Face data set; published layouts are recognized by their columns"
    )
    samples: int | None = Field(None, ge=1, description="samples per problem; default: eval.samples")
    verifier: str | None = Field(
        None,
        min_length=1,
        description="verifier of its score; default: reward.verifier, or `choice` for multiple choice",
    )
    instruction: str | None = Field(
        None, description="text to append to each problem; default: eval.instruction; multiple choice has its own"
    )
    fields: FieldsConfig = Field(default_factory=FieldsConfig, description="columns of an unknown layout")


def _as_benchmark(value: Any) -> Any:
    """Turn `math500.jsonl` into `{path: math500.jsonl}`."""
    return {"path": value} if isinstance(value, (str, Path)) else value


BenchmarkOrPath = Annotated[BenchmarkConfig, BeforeValidator(_as_benchmark)]


class EvalConfig(Section):
    """How a score is sampled: on data.test during training, and on benchmarks by `pctrain eval`."""

    temperature: float = Field(0.7, ge=0, description="sampling temperature for evaluation; 0: greedy")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling for evaluation: total probability of the tokens to sample from; 1: all tokens",
    )
    samples: int = Field(1, ge=1, description="samples per problem; the score is their mean")
    max_response: int | None = Field(
        None,
        ge=1,
        description="longest response, tokens; default: rollout.max_response; for `pctrain eval` 8192 or what the "
        "context leaves",
    )
    benchmarks: dict[str, BenchmarkOrPath] = Field(
        {},
        description="only for `pctrain eval`: benchmarks by name, each a path or {path: aime24.parquet, samples: 16}",
    )
    instruction: str | None = Field(
        None,
        description="only for `pctrain eval`: text to append to each problem, e.g. Put your final answer in \\boxed{}.",
    )
    judge: str | None = Field(
        None,
        min_length=1,
        description="only for `pctrain eval`: your function as module:function, of the same form as for "
        "reward.verifier; it decides where the two verifiers disagree",
    )
