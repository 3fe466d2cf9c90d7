"""Which parameters a rank holds: of megatron-core's GPTModel, as core/model.py builds it, at any layout.

Held against real shards on the meta device by tests/plan/test_plan_shards.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from pctrain.config.tree import Config, ParallelConfig
from pctrain.hf.config import HFConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 40_000_000  # elements; megatron-core's least, of overlapped reductions
BUCKET_END = 128  # elements that the end of a bucket is a multiple of, beside the ranks that share it


def hf_config(config: Config) -> HFConfig:
    """From `model.path`/config.json, else the model that `model.architecture` makes (its vocabulary is then an upper bound). No torch."""
    if config.model.path is not None:
        return HFConfig.read(config.model.path)
    a = config.model.architecture
    return HFConfig(
        architecture="LlamaForCausalLM",
        layers=a.layers,
        hidden=a.hidden,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.hidden // a.heads,
        ffn=a.ffn,
        vocab=config.data.problems.vocab_size,
        context=a.context,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tied=a.tied,
        qkv_bias=False,
    )


@dataclass(frozen=True)
class Layout:
    """How `gpus` ranks share the work. `expert` parallel ranks are taken from the data parallel ones; experts are cut over the tensor
    parallel ranks too."""

    parallel: ParallelConfig
    gpus: int

    @property
    def data(self) -> int:
        par = self.parallel
        return self.gpus // (par.tensor * par.pipeline * par.context)

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense parameters: over them the optimizer's state is cut."""
        return self.data * self.parallel.context

    @property
    def expert_copies(self) -> int:
        return self.copies // self.parallel.expert

    def stage_layers(self, layers: int) -> list[int]:
        """Layers of every pipeline stage."""
        par = self.parallel
        own = {0: par.first_stage_layers, par.pipeline - 1: par.last_stage_layers} if par.pipeline > 1 else {}
        own = {stage: count for stage, count in own.items() if count is not None}
        others = par.pipeline - len(own)
        return [own[s] if s in own else (layers - sum(own.values())) // others for s in range(par.pipeline)]


@dataclass(frozen=True, eq=False)  # compared and hashed as the object that it is: `_chunk` makes each but once
class Chunk:
    """One module of a rank (a virtual pipeline stage, or all of a stage): elements of each parameter, in the order of the module."""

    dense: tuple[int, ...]
    expert: tuple[int, ...]
    own_bucket: int | None = None  # which of `dense` is an embedding that the head of the last stage is tied to

    @property
    def parameters(self) -> int:
        return sum(self.dense) + sum(self.expert)


def chunks(hf: HFConfig, layout: Layout, stage: int) -> list[Chunk]:
    """The modules of the ranks of a pipeline stage."""
    par = layout.parallel
    layers, v = layout.stage_layers(hf.layers)[stage], par.virtual_pipeline
    found = []
    for part in range(v):
        first = stage == 0 and part == 0
        last = stage == par.pipeline - 1 and part == v - 1
        found.append(_chunk(hf, par.tensor, par.expert, layers // v, first, last, hf.tied and par.pipeline > 1))
    return found


@lru_cache  # a search asks for the same again and again
def _chunk(
    hf: HFConfig, tensor: int, ranks_of_experts: int, layers: int, first: bool, last: bool, tied_over_stages: bool
) -> Chunk:
    embedding = hf.padded_vocab(tensor) // tensor * hf.hidden
    dense, expert = [embedding] if first else [], []
    own = 0 if first and tied_over_stages else None
    for _ in range(layers):
        dense += _dense_of_layer(hf, tensor)
        expert += _experts_of_layer(hf, tensor, ranks_of_experts)
    if last:
        dense.append(hf.hidden)
        if not hf.tied or not first:  # tied in one stage: the head reads the embedding
            if tied_over_stages:
                own = len(dense)
            dense.append(embedding)
    return Chunk(tuple(dense), tuple(expert), own)


def _dense_of_layer(hf: HFConfig, tensor: int) -> list[int]:
    """Norm, attention, norm, and feed-forward or router."""
    queries, all_three = hf.heads * hf.head_dim // tensor, (hf.heads + 2 * hf.kv_heads) * hf.head_dim // tensor
    attention = [hf.hidden, queries * hf.hidden, all_three * hf.hidden]
    if hf.qkv_bias:
        attention.append(all_three)
    if hf.qk_norm:
        attention += [hf.head_dim, hf.head_dim]
    if hf.experts is not None:
        return [*attention, hf.hidden, hf.experts.count * hf.hidden]
    return [*attention, hf.hidden, 2 * hf.ffn // tensor * hf.hidden, hf.hidden * (hf.ffn // tensor)]


def _experts_of_layer(hf: HFConfig, tensor: int, ranks_of_experts: int) -> list[int]:
    if hf.experts is None:
        return []
    width = hf.experts.ffn // tensor
    return [2 * width * hf.hidden, hf.hidden * width] * (hf.experts.count // ranks_of_experts)


@dataclass(frozen=True)
class Buffers:
    """Elements, with padding, of a rank's buffers: parameters lie in them, and gradients in float32; the optimizer holds `owned`."""

    dense: int
    expert: int
    owned: int

    @property
    def elements(self) -> int:
        return self.dense + self.expert


def buffers(hf: HFConfig, layout: Layout, stage: int) -> Buffers:
    """What megatron-core's DistributedDataParallel makes for the parameters of that stage."""
    dense = expert = 0
    for index, chunk in enumerate(chunks(hf, layout, stage)):
        overlapped = layout.parallel.overlap_grad_reduce and stage == 0 and index == 0
        bucket = max(BUCKET, 1_000_000 * layout.data) if overlapped else None
        dense += _padded(chunk, False, layout.copies, bucket)
        expert += _padded(chunk, True, layout.expert_copies, bucket)
    return Buffers(dense, expert, dense // layout.copies + expert // layout.expert_copies)


@lru_cache
def _padded(chunk: Chunk, of_experts: bool, ranks: int, bucket: int | None) -> int:
    """Elements of one of its buffers: from the last parameter to the first, each begins at a multiple of 64, each bucket ends at one of
    `ranks` and of 128 (megatron-core 0.16.1, distributed/param_and_grad_buffer.py)."""
    sizes, own = (chunk.expert, None) if of_experts else (chunk.dense, chunk.own_bucket)
    multiple = lcm(ranks, BUCKET_END)
    begin = end = 0  # of the bucket; of what lies in it
    for index in reversed(range(len(sizes))):
        end = _up(end, 64)
        if index == own and end > begin:
            begin = end = _up(end, multiple)
        end += sizes[index]
        if index == own or (bucket is not None and end - begin >= bucket):
            begin = end = _up(end, multiple)
    return _up(end, multiple)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@lru_cache
def all_parameters(hf: HFConfig) -> int:
    """Elements of the whole model; a tied matrix counts once."""
    one = Layout(ParallelConfig(), 1)
    return sum(chunk.parameters for chunk in chunks(hf, one, 0))


def largest_matrix(hf: HFConfig, par: ParallelConfig) -> int:
    """Elements of the largest matrix of a layer on one rank."""
    return max(_dense_of_layer(hf, par.tensor) + _experts_of_layer(hf, par.tensor, par.expert))
