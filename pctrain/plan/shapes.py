"""The parameters that a rank holds at any layout, in megatron-core's GPTModel as core/model.py builds it.

tests/plan/test_plan_shards.py compares them with real shards on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from pctrain.config.tree import Config, ParallelConfig
from pctrain.hf.config import HFConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 40_000_000  # elements: megatron-core's smallest bucket of overlapped reductions
BUCKET_END = 128  # a bucket ends at a multiple of this, and of the ranks that share it


def hf_config(config: Config) -> HFConfig:
    """Return config.json of `model.path`, or the sizes of `model.architecture` with the largest vocabulary."""
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
    """How `gpus` ranks share the work.

    Expert parallel ranks are taken from the data parallel ones, and experts are also sharded over the tensor parallel
    ranks.
    """

    parallel: ParallelConfig
    gpus: int

    @property
    def data(self) -> int:
        """Return the data parallel size."""
        par = self.parallel
        return self.gpus // (par.tensor * par.pipeline * par.context)

    @property
    def copies(self) -> int:
        """Return the ranks that hold the same dense parameters, over which the optimizer state is sharded."""
        return self.data * self.parallel.context

    @property
    def expert_copies(self) -> int:
        """Return the ranks that hold the same expert parameters."""
        return self.copies // self.parallel.expert

    def stage_layers(self, layers: int) -> list[int]:
        """Return the layers of every pipeline stage."""
        par = self.parallel
        given = {0: par.first_stage_layers, par.pipeline - 1: par.last_stage_layers} if par.pipeline > 1 else {}
        ends = {stage: count for stage, count in given.items() if count is not None}
        others = par.pipeline - len(ends)
        rest = layers - sum(ends.values())
        return [ends[stage] if stage in ends else rest // others for stage in range(par.pipeline)]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `_chunk` makes each only once
class ModelChunk:
    """One module of a rank (a stage or a virtual stage): elements of each parameter, in the order of the module.

    `own_bucket` is the index in `dense` of an embedding that is tied to the head of the last stage.
    """

    dense: tuple[int, ...]
    expert: tuple[int, ...]
    own_bucket: int | None = None

    @property
    def parameters(self) -> int:
        """Return the number of elements."""
        return sum(self.dense) + sum(self.expert)


def chunks(hf: HFConfig, layout: Layout, stage: int) -> list[ModelChunk]:
    """Return the modules of a pipeline stage."""
    par = layout.parallel
    layers, v = layout.stage_layers(hf.layers)[stage], par.virtual_pipeline
    modules = []
    for part in range(v):
        first = stage == 0 and part == 0
        last = stage == par.pipeline - 1 and part == v - 1
        modules.append(_chunk(hf, par.tensor, par.expert, layers // v, first, last, hf.tied and par.pipeline > 1))
    return modules


@lru_cache  # a search asks for the same ones repeatedly
def _chunk(
    hf: HFConfig, tensor: int, ranks_of_experts: int, layers: int, first: bool, last: bool, tied_over_stages: bool
) -> ModelChunk:
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
    return ModelChunk(tuple(dense), tuple(expert), own)


def _dense_of_layer(hf: HFConfig, tensor: int) -> list[int]:
    """Return the elements of norm, attention, norm, and feed-forward or router."""
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
    """Elements of a rank's parameter buffers, padding included. The optimizer owns `owned` of them."""

    dense: int
    expert: int
    owned: int

    @property
    def elements(self) -> int:
        """Return the elements of all buffers."""
        return self.dense + self.expert


def buffers(hf: HFConfig, layout: Layout, stage: int) -> Buffers:
    """Return the buffers that megatron-core's DistributedDataParallel makes for a stage."""
    dense = expert = 0
    for index, chunk in enumerate(chunks(hf, layout, stage)):
        overlapped = layout.parallel.overlap_grad_reduce and stage == 0 and index == 0
        bucket = max(BUCKET, 1_000_000 * layout.data) if overlapped else None
        dense += _padded(chunk, False, layout.copies, bucket)
        expert += _padded(chunk, True, layout.expert_copies, bucket)
    return Buffers(dense, expert, dense // layout.copies + expert // layout.expert_copies)


@lru_cache
def _padded(chunk: ModelChunk, of_experts: bool, ranks: int, bucket: int | None) -> int:
    """Return the elements of one buffer (megatron-core 0.16.1, distributed/param_and_grad_buffer.py).

    Parameters are laid out from the last to the first, each from a multiple of 64. Each bucket ends at a multiple of
    `ranks` and of 128.
    """
    sizes, own = (chunk.expert, None) if of_experts else (chunk.dense, chunk.own_bucket)
    multiple = lcm(ranks, BUCKET_END)
    begin = 0  # of the bucket
    end = 0  # of what is in it
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
    """Return the elements of the whole model; a tied matrix counts once."""
    single_rank = Layout(ParallelConfig(), 1)
    return sum(chunk.parameters for chunk in chunks(hf, single_rank, 0))


def largest_matrix(hf: HFConfig, par: ParallelConfig) -> int:
    """Return the elements of the largest matrix of a layer on one rank."""
    return max(_dense_of_layer(hf, par.tensor) + _experts_of_layer(hf, par.tensor, par.expert))
