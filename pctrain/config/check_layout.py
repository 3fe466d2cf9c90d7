"""Checks of the model's shape and of its layout over ranks: which sizes divide which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from pctrain.config.model import ModelConfig, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import CONFIG


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that the checks need. `experts` is 0 for a dense model; `source` says their origin."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    experts: int
    source: str


def model_shape(model: ModelConfig) -> Shape:
    """Return the sizes in config.json of `model.path`, or else those of `model.architecture`."""
    if model.path is None:
        a = model.architecture
        return Shape(a.layers, a.hidden, a.heads, a.kv_heads, a.ffn, a.context, 0, "model.architecture")
    hf = HFConfig.read(model.path)
    ffn, experts = (hf.experts.ffn, hf.experts.count) if hf.experts else (hf.ffn, 0)
    return Shape(hf.layers, hf.hidden, hf.heads, hf.kv_heads, ffn, hf.context, experts, str(model.path / CONFIG))


def check_shape(shape: Shape) -> Iterator[str]:
    """Yield what cannot work in `model.architecture`. A published model may have another head size (head_dim)."""
    if shape.source != "model.architecture":
        return
    if shape.hidden % shape.heads:
        yield f"model.architecture.heads = {shape.heads} does not divide model.architecture.hidden = {shape.hidden}"
    elif shape.hidden // shape.heads % 2:
        yield (
            f"model.architecture: hidden / heads = {shape.hidden // shape.heads} is odd; rotary embeddings rotate "
            "pairs of channels and need an even head size"
        )
    if shape.heads % shape.kv_heads:
        yield f"model.architecture.kv_heads = {shape.kv_heads} does not divide model.architecture.heads = {shape.heads}"


def check_layout(model: ModelConfig, parallel: ParallelConfig, shape: Shape, world_size: int) -> Iterator[str]:
    """Yield what does not divide, over `world_size` ranks."""
    yield from _check_world(parallel, world_size)
    sizes = {"attention heads": shape.heads, "key/value heads": shape.kv_heads, "feed-forward width": shape.ffn}
    for name, value in sizes.items():
        if value % parallel.tensor:
            yield f"parallel.tensor = {parallel.tensor} does not divide the {name}: {value} ({shape.source})"
    yield from _check_spec(model, parallel)
    yield from _check_stages(parallel, shape)
    yield from _check_expert_ranks(parallel, shape, world_size)
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel = true needs parallel.tensor above 1: it shards the sequence over the tensor "
            "parallel ranks"
        )


def _check_world(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    sizes = {"parallel.tensor": parallel.tensor, "parallel.pipeline": parallel.pipeline}
    if parallel.context > 1:
        sizes["parallel.context"] = parallel.context
    ranks = prod(sizes.values())
    if world_size % ranks:
        yield (
            f"{' x '.join(sizes)} = {' x '.join(map(str, sizes.values()))} = {ranks} does not divide the world size "
            f"{world_size}; start a multiple of {ranks} ranks (torchrun --nproc-per-node={ranks} -m pctrain ...) or "
            f"lower them"
        )


def _check_spec(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what needs Transformer Engine. (Whether `auto` finds it is known when the model is built.)"""
    if model.fp8 is not None and model.dtype != "bfloat16":
        yield f"model.fp8 = {model.fp8} needs model.dtype = bfloat16, not {model.dtype}"
    if model.spec in ("auto", "te"):
        return
    needs: dict[str, object] = {}
    if parallel.context > 1:
        needs["parallel.context"] = parallel.context
    if model.fp8 is not None:
        needs["model.fp8"] = model.fp8
    for key, value in needs.items():
        yield (
            f"{key} = {value} needs Transformer Engine, but model.spec = {model.spec}; set model.spec to te, or leave "
            f"{key} out"
        )


def _check_expert_ranks(parallel: ParallelConfig, shape: Shape, world_size: int) -> Iterator[str]:
    expert = parallel.expert
    if expert > 1 and not shape.experts:
        yield f"parallel.expert = {expert}, but the model has no experts ({shape.source})"
    elif shape.experts % expert:
        yield f"parallel.expert = {expert} does not divide the experts: {shape.experts} ({shape.source})"
    elif world_size % (parallel.tensor * parallel.pipeline * expert):
        yield (
            f"parallel.expert = {expert} does not divide the data parallel size: {world_size} ranks / (parallel.tensor "
            f"{parallel.tensor} x parallel.pipeline {parallel.pipeline})"
        )


def check_experts(model: ModelConfig, parallel: ParallelConfig, shape: Shape, trains: bool) -> Iterator[str]:
    """Yield what cannot work with, or without, a mixture of experts."""
    if model.router_aux_loss and not shape.experts:
        yield (
            f"model.router_aux_loss = {model.router_aux_loss}, but the model has no experts ({shape.source}); set it "
            f"to 0"
        )
    if trains and shape.experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.tensor = {parallel.tensor} for a mixture of experts ({shape.source}) trains with sequence "
            "parallel only: set parallel.sequence_parallel to true"
        )


def _check_stages(parallel: ParallelConfig, shape: Shape) -> Iterator[str]:
    """Yield what does not fit the layers to the pipeline stages.

    The first and the last stage may have their own number of layers. The others share the rest evenly.
    """
    given: dict[str, int] = {}
    if parallel.first_stage_layers is not None:
        given["parallel.first_stage_layers"] = parallel.first_stage_layers
    if parallel.last_stage_layers is not None:
        given["parallel.last_stage_layers"] = parallel.last_stage_layers
    if parallel.pipeline == 1:
        virtual = {"parallel.virtual_pipeline": parallel.virtual_pipeline} if parallel.virtual_pipeline > 1 else {}
        yield from (f"{key} = {value} needs parallel.pipeline above 1" for key, value in (virtual | given).items())
    elif parallel.pipeline > shape.layers:
        yield (
            f"parallel.pipeline = {parallel.pipeline} stages, but the model has {shape.layers} layers ({shape.source})"
        )
    else:
        yield from _check_stage_layers(parallel, shape, given)


def _check_stage_layers(parallel: ParallelConfig, shape: Shape, given: dict[str, int]) -> Iterator[str]:
    rest = shape.layers - sum(given.values())
    stages = parallel.pipeline - len(given)
    if not given and rest % stages:
        yield (
            f"parallel.pipeline = {parallel.pipeline} does not divide the layers: {shape.layers} ({shape.source}); "
            "give parallel.first_stage_layers or parallel.last_stage_layers for an uneven share"
        )
        return
    is_even = rest % stages == 0 if stages else rest == 0
    if rest < stages or not is_even:
        taken = " and ".join(f"{key} = {value}" for key, value in given.items())
        yield (
            f"{taken} leave {rest} of the {shape.layers} layers ({shape.source}) for the other {stages} of "
            f"parallel.pipeline = {parallel.pipeline} stages, which must have equally many, at least one"
        )
        return
    per_stage = [*given.values(), *([rest // stages] if stages else [])]
    for layers in dict.fromkeys(per_stage):
        if layers % parallel.virtual_pipeline:
            yield (
                f"parallel.virtual_pipeline = {parallel.virtual_pipeline} does not divide the {layers} layers of a "
                "pipeline stage"
            )
