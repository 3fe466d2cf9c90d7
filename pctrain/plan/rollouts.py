"""The engine of RL: its memory awake and asleep, what fits into its cache, and how long a step's rollouts take."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Layout, all_parameters

ASLEEP = (
    1.5 * GIB
)  # of a sleeping engine on a GPU: captured graphs, work space of its kernels, buffers of its own communicator
PREFILL = 8192  # tokens of one pass that vLLM sets room aside for (max_num_batched_tokens of its defaults on such GPUs)
CPU_ENGINE = 85e6  # on a CPU: code that is imported at its start, buffers
BANDWIDTH = 0.6  # share of a memory's bandwidth that decoding reaches
LAUNCH = 15e-6  # seconds a layer and token that decoding takes beside reading: launches, all-reduces of a few rows
SCHEDULING = 2e-3  # seconds a token that vLLM's scheduler and sampler take


@dataclass(frozen=True)
class Engine:
    """One vLLM engine on `rollout.tensor` ranks; bytes are of one rank. `cache`: of its KV cache."""

    model_bytes: float
    weights: float
    cache: float
    awake: float
    asleep: float
    token_bytes: float  # of the KV cache, a token

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return max(0, int(self.cache // self.token_bytes))

    def sequences(self, length: int) -> int:
        """Sequences of that length that are decoded at once without one being put off."""
        return self.tokens // length


def engine(hf: HFConfig, config: Config, gpu: Gpu) -> Engine:
    """On a GPU `rollout.gpu_memory` of it, all of which it takes while awake; asleep (level 2) neither weights nor cache are kept. On a CPU
    it never sleeps."""
    rollout, size = config.rollout, DTYPE_BYTES[config.model.dtype]
    whole = float(all_parameters(hf) * size)
    weights = whole / rollout.tensor
    heads = max(1, hf.kv_heads // rollout.tensor)
    token = 2 * hf.layers * heads * hf.head_dim * size
    if gpu.is_cpu:
        cache = float(rollout.kv_cache_mb << 20)
        return Engine(whole, weights, cache, weights + cache + CPU_ENGINE, weights + cache + CPU_ENGINE, token)
    share = rollout.gpu_memory * gpu.memory
    # Activations of the largest pass, and logits in float32 of every sequence.
    width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
    passing = PREFILL * size * (3 * width / rollout.tensor + 4 * hf.hidden) + 2 * rollout.max_sequences * hf.vocab * 4
    return Engine(whole, weights, max(0.0, share - weights - passing), share, ASLEEP, token)


@dataclass(frozen=True)
class Rollouts:
    """What one step samples. `at_once`: sequences that an engine decodes side by side."""

    sequences: int
    rounds: int
    engines: int
    at_once: int
    seconds: float


def rollouts(
    hf: HFConfig,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    of: Engine,
    *,
    prompt: float,
    response: float,
    rounds: int,
    prompts: int,
    group: int,
    mfu: float,
    forward_flops: float,
) -> Rollouts:
    """Of `rounds` rounds of `prompts` x `group` sequences each.

    A token of c sequences costs reading the weights and their caches once; a round ends with its longest response, decoded almost alone.
    `forward_flops`: of one sequence's prompt.
    """
    rollout = config.rollout
    engines = layout.gpus // rollout.tensor
    each = ceil(prompts * group / engines)
    room = max(1, of.sequences(max(1, int(prompt + response))))
    at_once = max(1, min(each, rollout.max_sequences, room))
    speed = gpu.bandwidth * BANDWIDTH

    def token(count: float) -> float:
        touched = of.weights if hf.experts is None else _touched(hf, of.weights, count)
        return (touched + count * (prompt + response / 2) * of.token_bytes) / speed + hf.layers * LAUNCH + SCHEDULING

    decode = each * response / at_once * token(at_once) + max(0.0, rollout.max_response - response) * token(1)
    prefill = each * forward_flops / (gpu.flops(config.model.dtype) * mfu * rollout.tensor)
    return Rollouts(rounds * prompts * group, rounds, engines, at_once, rounds * (decode + prefill))


def _touched(hf: HFConfig, weights: float, count: float) -> float:
    """Bytes of the weights that `count` tokens of a mixture of experts read: experts that none was sent to are not."""
    size = weights / all_parameters(hf)
    experts = 3 * hf.experts.ffn * hf.hidden * hf.experts.count * hf.layers * size
    missed = (1 - hf.experts.per_token / hf.experts.count) ** count
    return weights - experts * missed
