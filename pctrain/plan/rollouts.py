"""The rollout engine: its memory awake and asleep, what its cache holds, and how long a step's rollouts take."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import Experts, HFConfig
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Layout, all_parameters

ASLEEP = 1.5 * GIB  # a sleeping engine on a GPU: captured graphs, kernel workspaces, buffers of its communicator
# Tokens of the largest pass that vLLM reserves memory for, its default max_num_batched_tokens for the class LLM
# (vllm 0.32.0, engine/arg_utils.py, `get_batch_defaults`): the larger number on GPUs of 70 GiB and more, except A100.
PREFILL, PREFILL_LARGE, LARGE_GPU = 8192, 16384, 70 * GIB
# Bytes of one logit while vLLM's profile run samples: in float32 the logit, its log-softmax and its probability, and
# the model's dtype before that (v1/sample/sampler.py).
SAMPLER = 3 * 4
CPU_ENGINE = 85e6  # an engine on a CPU: imported code, buffers
BANDWIDTH = 0.6  # share of the memory bandwidth that decoding reaches
LAUNCH = 15e-6  # seconds per layer and token besides reading: launches, small all-reduces
SCHEDULING = 2e-3  # seconds per token for vLLM's scheduler and sampler


@dataclass(frozen=True)
class EngineMemory:
    """One vLLM engine on `rollout.tensor` ranks; bytes on one rank.

    Attributes:
        model_bytes: weights of the whole model.
        weights: weights on this rank.
        cache: KV cache.
        passing: activations of its largest pass, which vLLM's profile run measures.
        awake: everything while it samples.
        asleep: everything while it sleeps.
        token_bytes: KV cache of one token.
    """

    model_bytes: float
    weights: float
    cache: float
    passing: float
    awake: float
    asleep: float
    token_bytes: float

    @property
    def idle(self) -> float:
        """Return what it holds awake between two passes."""
        return self.awake - self.passing

    @property
    def tokens(self) -> int:
        """Return the tokens that the cache holds."""
        return max(0, int(self.cache // self.token_bytes))

    def sequences(self, length: int) -> int:
        """Return the sequences of this length that the cache holds at once."""
        return self.tokens // length


def engine(hf: HFConfig, config: Config, gpu: Gpu) -> EngineMemory:
    """Return the engine of a config.

    On a GPU it takes `rollout.gpu_memory` of the memory while awake: vLLM gives its cache what weights, its largest
    pass and captured graphs leave of that (v1/worker/gpu_worker.py, `determine_available_memory`). Asleep (level 2) it
    keeps neither weights nor cache. On a CPU it never sleeps.
    """
    rollout, size = config.rollout, DTYPE_BYTES[config.model.dtype]
    whole = float(all_parameters(hf) * size)
    weights = whole / rollout.tensor
    heads = max(1, hf.kv_heads // rollout.tensor)
    token = 2 * hf.layers * heads * hf.head_dim * size
    if gpu.is_cpu:
        cache = float(rollout.kv_cache_mb << 20)
        held = weights + cache + CPU_ENGINE
        return EngineMemory(whole, weights, cache, 0.0, held, held, token)
    share = rollout.gpu_memory * gpu.memory
    passing = _largest_pass(hf, config, gpu)
    cache = max(0.0, share - weights - passing - ASLEEP)
    return EngineMemory(whole, weights, cache, passing, share, ASLEEP, token)


def prefill_tokens(gpu: Gpu) -> int:
    """Return the most tokens that vLLM computes in one pass on this kind of GPU."""
    return PREFILL_LARGE if gpu.memory >= LARGE_GPU and not gpu.name.startswith("a100") else PREFILL


def _largest_pass(hf: HFConfig, config: Config, gpu: Gpu) -> float:
    """Return the peak of vLLM's profile run: a layer over the most tokens, or sampling for the most sequences."""
    rollout, size = config.rollout, DTYPE_BYTES[config.model.dtype]
    width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
    layer = prefill_tokens(gpu) * size * (3 * width / rollout.tensor + 4 * hf.hidden)
    return max(layer, rollout.max_sequences * hf.vocab * (size + SAMPLER))


@dataclass(frozen=True)
class Rollouts:
    """The sampling of one step. `at_once` is the number of sequences that an engine decodes together."""

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
    sampler: EngineMemory,
    *,
    prompt: float,
    response: float,
    rounds: int,
    prompts: int,
    group: int,
    mfu: float,
    forward_flops: float,
) -> Rollouts:
    """Return the time of `rounds` rounds of `prompts` x `group` sequences.

    One token of c sequences costs reading the weights and their caches once. A round ends with its longest response,
    which is decoded almost alone. `forward_flops` is the forward pass of one prompt.
    """
    rollout = config.rollout
    engines = layout.gpus // rollout.tensor
    each = ceil(prompts * group / engines)
    room = max(1, sampler.sequences(max(1, int(prompt + response))))
    at_once = max(1, min(each, rollout.max_sequences, room))
    speed = gpu.bandwidth * BANDWIDTH

    def token(count: float) -> float:
        read = sampler.weights if hf.experts is None else _read_weights(hf, hf.experts, sampler.weights, count)
        return (read + count * (prompt + response / 2) * sampler.token_bytes) / speed + hf.layers * LAUNCH + SCHEDULING

    decode = each * response / at_once * token(at_once) + max(0.0, rollout.max_response - response) * token(1)
    prefill = each * forward_flops / (gpu.flops(config.model.dtype) * mfu * rollout.tensor)
    return Rollouts(rounds * prompts * group, rounds, engines, at_once, rounds * (decode + prefill))


def _read_weights(hf: HFConfig, experts: Experts, weights: float, tokens: float) -> float:
    """Return the bytes of weights that `tokens` tokens read: experts that no token is routed to are not read."""
    size = weights / all_parameters(hf)
    expert_bytes = 3 * experts.ffn * hf.hidden * experts.count * hf.layers * size
    missed = (1 - experts.per_token / experts.count) ** tokens
    return weights - expert_bytes * missed
