"""Hugging Face weights <-> megatron-core shards, at any tensor x pipeline x expert layout.

One table, `units`, lists for every megatron-core parameter which Hugging Face tensors it holds and how they are laid
out in it. Loading and exporting read the same table, so they cannot disagree.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from pctrain.common.device import on_gpu
from pctrain.distributed.health import watchdog
from pctrain.hf import weight_files, weight_names
from pctrain.hf.config import HFConfig, set_dtype

MCORE_EMBEDDING = "embedding.word_embeddings.weight"

# (group, {parameter: global rank that sends it to the group})
Route = tuple[dist.ProcessGroup, dict[str, int]]


@dataclass(frozen=True)
class Unit:
    """One megatron-core parameter and the Hugging Face tensors in it.

    `shard(tensors, r, tp)` lays out the part of rank r; `whole(shards)` is its inverse over all ranks. `shard` only
    slices its tensors along rows (`t[a:b]`) or columns (`t[:, a:b]`), so they may be on disk. `whole` takes the parts
    as one tensor [tp, ...]; its results are views of that only where tp > 1.
    """

    name: str  # in megatron-core, with the global index of layer and expert
    hf: dict[str, tuple[int, ...]]  # Hugging Face name -> shape
    shard: Callable[[Sequence[Any], int, int], torch.Tensor]
    whole: Callable[[torch.Tensor], list[torch.Tensor]]
    replicated: bool = False


def units(hf: HFConfig, te: bool) -> list[Unit]:
    """Return every parameter of the whole model, in the order of the layers.

    With `te`, Transformer Engine fuses norms into the linear layers after them.
    """
    table = [_vocab(MCORE_EMBEDDING, weight_names.EMBEDDING, hf)]
    for i in range(hf.layers):
        table += _attention(f"decoder.layers.{i}", f"model.layers.{i}", hf, te)
        table += _mlp(f"decoder.layers.{i}", f"model.layers.{i}", hf, te)
    table.append(_replicated("decoder.final_layernorm.weight", "model.norm.weight", (hf.hidden,)))
    if not hf.tied:
        table.append(_vocab("output_layer.weight", weight_names.LM_HEAD, hf))
    return table


def _attention(layer: str, hf_layer: str, hf: HFConfig, te: bool) -> list[Unit]:
    attention, hf_attention = f"{layer}.self_attention", f"{hf_layer}.self_attn"
    input_norm = f"{attention}.linear_qkv.layer_norm_weight" if te else f"{layer}.input_layernorm.weight"
    projections = [f"{hf_attention}.{p}_proj" for p in "qkv"]
    table = [
        _replicated(input_norm, f"{hf_layer}.input_layernorm.weight", (hf.hidden,)),
        _qkv(f"{attention}.linear_qkv.weight", [f"{p}.weight" for p in projections], (hf.hidden,), hf),
    ]
    if hf.qkv_bias:
        table.append(_qkv(f"{attention}.linear_qkv.bias", [f"{p}.bias" for p in projections], (), hf))
    if hf.qk_norm:
        table += [
            _replicated(f"{attention}.{p}_layernorm.weight", f"{hf_attention}.{p}_norm.weight", (hf.head_dim,))
            for p in "qk"
        ]
    output_shape = (hf.hidden, hf.heads * hf.head_dim)
    table.append(_row(f"{attention}.linear_proj.weight", f"{hf_attention}.o_proj.weight", output_shape))
    return table


def _mlp(layer: str, hf_layer: str, hf: HFConfig, te: bool) -> list[Unit]:
    # A mixture of experts has no single linear layer that the norm could be fused into.
    fused = te and not hf.experts
    norm = f"{layer}.mlp.linear_fc1.layer_norm_weight" if fused else f"{layer}.pre_mlp_layernorm.weight"
    table = [_replicated(norm, f"{hf_layer}.post_attention_layernorm.weight", (hf.hidden,))]
    if hf.experts is None:
        return table + _feed_forward(f"{layer}.mlp", f"{hf_layer}.mlp", hf.hidden, hf.ffn)
    router_shape = (hf.experts.count, hf.hidden)
    table.append(_replicated(f"{layer}.mlp.router.weight", f"{hf_layer}.mlp.gate.weight", router_shape))
    for j in range(hf.experts.count):
        expert = f"{layer}.mlp.experts.local_experts.{j}"
        table += _feed_forward(expert, f"{hf_layer}.mlp.experts.{j}", hf.hidden, hf.experts.ffn)
    return table


def _replicated(name: str, hf_name: str, shape: tuple[int, ...]) -> Unit:
    return Unit(name, {hf_name: shape}, lambda t, r, tp: t[0][:], lambda shards: [shards[0].clone()], replicated=True)


def _row(name: str, hf_name: str, shape: tuple[int, ...]) -> Unit:
    """Return a row parallel matrix, which is split along the input dimension."""

    def shard(t: Sequence[Any], r: int, tp: int) -> torch.Tensor:
        part = shape[1] // tp
        return t[0][:, r * part : (r + 1) * part]

    return Unit(name, {hf_name: shape}, shard, lambda shards: [torch.cat(list(shards), 1)])


def _vocab(name: str, hf_name: str, hf: HFConfig) -> Unit:
    """Return the embedding or the head.

    The vocabulary is padded with zero rows to a multiple of the tensor parallel size, and cut again on export.
    """

    def shard(t: Sequence[Any], r: int, tp: int) -> torch.Tensor:
        part = hf.padded_vocab(tp) // tp
        rows = t[0][r * part : min((r + 1) * part, hf.vocab)]
        return F.pad(rows, (0, 0, 0, part - len(rows))) if len(rows) < part else rows

    def whole(shards: torch.Tensor) -> list[torch.Tensor]:
        rows = shards.flatten(0, 1)[: hf.vocab]
        return [rows if len(shards) > 1 else rows.clone()]  # avoids a second copy of the largest tensor

    return Unit(name, {hf_name: (hf.vocab, hf.hidden)}, shard, whole)


def _feed_forward(mlp: str, hf_mlp: str, hidden: int, ffn: int) -> list[Unit]:
    down = _row(f"{mlp}.linear_fc2.weight", f"{hf_mlp}.down_proj.weight", (hidden, ffn))
    return [_gate_up(f"{mlp}.linear_fc1.weight", hf_mlp, (ffn, hidden)), down]


def _gate_up(name: str, hf_mlp: str, shape: tuple[int, ...]) -> Unit:
    """Return SwiGLU's two matrices in one, of which rank r holds [gate_r; up_r]."""

    def shard(t: Sequence[Any], r: int, tp: int) -> torch.Tensor:
        part = shape[0] // tp
        return torch.cat([x[r * part : (r + 1) * part] for x in t])

    def whole(shards: torch.Tensor) -> list[torch.Tensor]:
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]

    return Unit(name, {f"{hf_mlp}.gate_proj.weight": shape, f"{hf_mlp}.up_proj.weight": shape}, shard, whole)


def _qkv(name: str, hf_names: list[str], tail: tuple[int, ...], hf: HFConfig) -> Unit:
    """Return query, key and value in one, its rows by key/value group: [query heads, key, value] of each group.

    The groups are split over the ranks.
    """
    per_group, D = hf.heads // hf.kv_heads, hf.head_dim
    rows = [per_group * D, D, D]  # of one group, in q, k and v

    def shard(t: Sequence[Any], r: int, tp: int) -> torch.Tensor:
        groups = hf.kv_heads // tp
        grouped = [
            x[r * groups * n : (r + 1) * groups * n].view(groups, n, *tail) for x, n in zip(t, rows, strict=True)
        ]
        return torch.cat(grouped, 1).flatten(0, 1)

    def whole(shards: torch.Tensor) -> list[torch.Tensor]:
        grouped = [s.view(-1, sum(rows), *tail).split(rows, 1) for s in shards]  # [groups, rows of a group, ...] each
        return [torch.cat([g[k].flatten(0, 1) for g in grouped]) for k in range(3)]

    return Unit(name, {n: (hf.kv_heads * s, *tail) for n, s in zip(hf_names, rows, strict=True)}, shard, whole)


def load_hf(modules: list[torch.nn.Module], hf: HFConfig, directory: Path, te: bool) -> None:
    """Copy the safetensors of `directory` into this rank's shards (`modules`), reading this rank's parts only.

    Raises UserError that lists missing or unknown tensors, wrong shapes and dtypes; a partial load is never silent.
    """
    table = units(hf, te)
    with weight_files.HFReader(directory) as source:
        shapes = {name: shape for unit in table for name, shape in unit.hf.items()}
        tied_copy = frozenset({weight_names.LM_HEAD} if hf.tied else ())  # which some writers keep
        source.check(shapes, hf.architecture, ignored=tied_copy)
        tp = parallel_state.get_tensor_model_parallel_world_size()
        r = parallel_state.get_tensor_model_parallel_rank()
        local = local_parameters(modules)
        for unit in table:
            targets = [local[unit.name]] if unit.name in local else []
            # The last pipeline stage keeps a copy of a tied matrix.
            if hf.tied and unit.name == MCORE_EMBEDDING and "output_layer.weight" in local:
                targets.append(local["output_layer.weight"])
            for target in targets:
                value = unit.shard([source[name] for name in unit.hf], r, tp)
                with torch.no_grad():
                    target.copy_(value)


def export_hf(
    modules: list[torch.nn.Module], hf: HFConfig, te: bool, *, tied_head: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor on this rank, that shares no storage). Collective over all ranks.

    With `tied_head` and tied embeddings, `lm_head.weight` follows the embedding.
    """
    local = local_parameters(modules)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    all_routes = routes(set(local))
    sample = next(iter(local.values()))
    for unit in units(hf, te):
        tensors = None
        if unit.name in local:
            shard = local[unit.name].detach()
            shards = shard[None]
            if tp_group.size() > 1 and not unit.replicated:
                shards = _gather(shard, tp_group)
            tensors = unit.whole(shards)
            del shards
        for k, (name, shape) in enumerate(unit.hf.items()):
            full = torch.empty(shape, dtype=sample.dtype, device=sample.device) if tensors is None else tensors[k]
            for group, source in all_routes:
                if unit.name in source:
                    dist.broadcast(full, src=source[unit.name], group=group)
            watchdog.beat()
            yield name, full
            if tied_head and hf.tied and name == weight_names.EMBEDDING:
                yield (
                    weight_names.LM_HEAD,
                    full.clone(),
                )  # an engine that shares the matrix in name only would keep its old head
            del full


def _gather(shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the shards of all ranks of the group, [ranks, *shape of shard]."""
    gathered = shard.new_empty((group.size(), *shard.shape))
    if on_gpu():
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
        return gathered
    # gloo's all_gather would hold everything twice.
    gathered[group.rank()] = shard
    for part, source in zip(gathered, dist.get_process_group_ranks(group), strict=True):
        dist.broadcast(part, src=source, group=group)
    return gathered


def routes(held: set[str]) -> list[Route]:
    """Return the broadcasts that bring every parameter to every rank, in order. Collective.

    `held` names this rank's parameters. A parameter may be on one pipeline stage only, and there on one expert parallel
    rank only; it is sent to the others from there.
    """
    in_order = []
    for group in (parallel_state.get_expert_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        source, held = _sources(held, group)
        in_order.append((group, source))
    return in_order


def _sources(held: set[str], group: dist.ProcessGroup) -> tuple[dict[str, int], set[str]]:
    """Return the sender of each parameter that only some ranks of the group hold, and all names in the group."""
    if group.size() == 1:
        return {}, held
    names: list = [None] * group.size()
    dist.all_gather_object(names, held, group=group)
    ranks = dist.get_process_group_ranks(group)
    everything, everywhere = set.union(*names), set.intersection(*names)
    sources = {}
    for name in everything - everywhere:
        sources[name] = next(rank for rank, held_there in zip(ranks, names, strict=True) if name in held_there)
    return sources, everything


def save_hf(
    modules: list[torch.nn.Module],
    hf: HFConfig,
    te: bool,
    source: Path,
    folder: Path,
    *,
    writes: bool,
    dtypes: Mapping[str, torch.dtype] | None = None,
    shard_bytes: int = weight_files.SHARD_BYTES,
) -> None:
    """Write `folder`, a Hugging Face directory: the weights as safetensors, config and tokenizer as in `source`.

    Collective; the rank that `writes` holds one full tensor at a time. The folder appears complete or not at all.

    Args:
        modules: this rank's part of the model.
        hf: the model's config.
        te: whether the model has Transformer Engine's layers.
        source: the Hugging Face directory of the other files.
        folder: the directory to write.
        writes: True on the one rank that writes.
        dtypes: of the tensors in the files, by name; None for the model's dtype.
        shard_bytes: most bytes of one file.
    """
    own_dtype = next(modules[0].parameters()).dtype
    shapes = [(name, shape) for unit in units(hf, te) for name, shape in unit.hf.items()]
    entries = [weight_files.Entry(name, dtypes[name] if dtypes else own_dtype, shape) for name, shape in shapes]
    tensors = export_hf(modules, hf, te, tied_head=False)  # transformers stores a tied matrix once
    if not writes:
        for _ in tensors:
            pass
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    weights_of_source = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")
    shutil.copytree(source, temporary, ignore=weights_of_source)
    names = {str(entry.dtype).removeprefix("torch.") for entry in entries}
    if len(names) == 1:  # where dtypes are mixed, as they were in the source, config.json stays as it is
        set_dtype(temporary, names.pop())
    weight_files.write(temporary, entries, tensors, shard_bytes=shard_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def round_to(modules: list[torch.nn.Module], hf: HFConfig, te: bool, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round this rank's parameters to the values that they have in files of these dtypes."""
    local = local_parameters(modules)
    for unit in units(hf, te):
        copies = [unit.name] + (["output_layer.weight"] if hf.tied and unit.name == MCORE_EMBEDDING else [])
        for parameter in (local[name] for name in copies if name in local):
            for dtype in {dtypes[name] for name in unit.hf}:
                parameter.data.copy_(parameter.data.to(dtype))


def local_parameters(modules: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters by name, with the global index of layers and experts.

    `modules` has one module for each virtual pipeline stage.
    """
    named = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = module.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if "local_experts" in parts:
                    at = parts.index("local_experts") + 1
                    parts[at] = str(layer.mlp.local_expert_indices[int(parts[at])])
            named[".".join(parts)] = parameter
    return named
