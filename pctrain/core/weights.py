"""Hugging Face weights <-> megatron-core shards, at any tensor x pipeline layout.

One table, `units`, says for every megatron-core parameter which Hugging Face tensors it holds and how they are laid out in it.
Loading and exporting read the same table, so they cannot disagree.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pctrain.core.model import HFConfig
from pctrain.errors import UserError


@dataclass(frozen=True)
class Unit:
    """One megatron-core parameter. `shard(tensors, r, tp)` lays out the part of rank r; `whole(shards)` is its inverse over all ranks."""

    name: str  # in megatron-core, with the layer's global index
    hf: dict[str, tuple[int, ...]]  # Hugging Face name -> shape
    shard: Callable[[list[torch.Tensor], int, int], torch.Tensor]
    whole: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    replicated: bool = False


def units(hf: HFConfig, te: bool) -> list[Unit]:
    """Every parameter of the whole model, in the order of the layers. `te`: Transformer Engine fuses norms into the linears after them."""
    H, attention = hf.hidden, hf.heads * hf.head_dim
    table = [_vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", hf)]
    for i in range(hf.layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
        mlp_norm = "mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight"
        qkv_names = [f"{theirs}.self_attn.{p}_proj" for p in "qkv"]
        table += [
            _replicated(f"{ours}.{input_norm}", f"{theirs}.input_layernorm.weight", (H,)),
            _qkv(f"{ours}.self_attention.linear_qkv.weight", [f"{n}.weight" for n in qkv_names], (H,), hf),
            *([_qkv(f"{ours}.self_attention.linear_qkv.bias", [f"{n}.bias" for n in qkv_names], (), hf)] if hf.qkv_bias else []),
            _row(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (H, attention)),
            _replicated(f"{ours}.{mlp_norm}", f"{theirs}.post_attention_layernorm.weight", (H,)),
            _gate_up(f"{ours}.mlp.linear_fc1.weight", f"{theirs}.mlp", (hf.ffn, H)),
            _row(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (H, hf.ffn)),
        ]
    table.append(_replicated("decoder.final_layernorm.weight", "model.norm.weight", (H,)))
    if not hf.tied:
        table.append(_vocab("output_layer.weight", "lm_head.weight", hf))
    return table


def _replicated(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    return Unit(name, {theirs: shape}, lambda t, r, tp: t[0], lambda shards: [shards[0]], replicated=True)


def _row(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    """Row parallel: split along the input dimension."""
    return Unit(name, {theirs: shape}, lambda t, r, tp: t[0].chunk(tp, 1)[r], lambda shards: [torch.cat(shards, 1)])


def _vocab(name: str, theirs: str, hf: HFConfig) -> Unit:
    """Embedding and head: the vocabulary is padded with zero rows to a multiple of the tensor parallel size, cut again on export."""

    def shard(t, r, tp):
        return F.pad(t[0], (0, 0, 0, hf.padded_vocab(tp) - hf.vocab)).chunk(tp)[r]

    return Unit(name, {theirs: (hf.vocab, hf.hidden)}, shard, lambda shards: [torch.cat(shards)[: hf.vocab]])


def _gate_up(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    """SwiGLU's two matrices: rank r holds [gate_r; up_r]."""

    def shard(t, r, tp):
        return torch.cat([x.chunk(tp)[r] for x in t])

    def whole(shards):
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]

    return Unit(name, {f"{theirs}.gate_proj.weight": shape, f"{theirs}.up_proj.weight": shape}, shard, whole)


def _qkv(name: str, theirs: list[str], tail: tuple[int, ...], hf: HFConfig) -> Unit:
    """Rows by key/value group: [its query heads, its key, its value], groups split over the ranks."""
    per_group, D = hf.heads // hf.kv_heads, hf.head_dim
    sizes = [hf.heads * D, hf.kv_heads * D, hf.kv_heads * D]

    def shard(t, r, tp):
        grouped = [x.view(hf.kv_heads, -1, *tail) for x in t]  # [groups, rows of a group, ...]
        return torch.cat(grouped, 1).flatten(0, 1).chunk(tp)[r]

    def whole(shards):
        grouped = torch.cat(shards).view(hf.kv_heads, (per_group + 2) * D, *tail)
        return [x.flatten(0, 1) for x in grouped.split([per_group * D, D, D], 1)]

    return Unit(name, {n: (s, *tail) for n, s in zip(theirs, sizes, strict=True)}, shard, whole)


def load_hf(modules: list[torch.nn.Module], hf: HFConfig, directory: Path, te: bool) -> None:
    """Copies the safetensors of `directory` into this rank's shards.

    Raises UserError that lists missing or unknown tensors and wrong shapes: nothing is loaded by halves in silence.
    """
    with _Checkpoint(Path(directory)) as source:
        table = units(hf, te)
        source.check({name: shape for unit in table for name, shape in unit.hf.items()}, hf)
        tp = parallel_state.get_tensor_model_parallel_world_size()
        r = parallel_state.get_tensor_model_parallel_rank()
        mine = _local_parameters(modules)
        for unit in table:
            targets = [mine[unit.name]] if unit.name in mine else []
            if hf.tied and unit.name == "embedding.word_embeddings.weight" and "output_layer.weight" in mine:
                targets.append(mine["output_layer.weight"])  # the last pipeline stage keeps its own copy of a tied matrix
            for target in targets:
                value = unit.shard([source.read(name) for name in unit.hf], r, tp)
                with torch.no_grad():
                    target.copy_(value)


def export_hf(modules: list[torch.nn.Module], hf: HFConfig, te: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, full tensor on this rank, storage of its own). Collective over tensor and pipeline ranks."""
    mine = _local_parameters(modules)
    tp_group, pp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    tp, pp = tp_group.size(), pp_group.size()
    owners = _owners(mine, pp_group) if pp > 1 else {}
    dtype, device = next(iter(mine.values())).dtype, next(iter(mine.values())).device
    for unit in units(hf, te):
        tensors = None
        if unit.name in mine:
            local = mine[unit.name].detach()
            shards = [local]
            if tp > 1 and not unit.replicated:
                shards = [torch.empty_like(local) for _ in range(tp)]
                dist.all_gather(shards, local.contiguous(), group=tp_group)
            tensors = unit.whole(shards)
        for k, (name, shape) in enumerate(unit.hf.items()):
            full = tensors[k].clone() if tensors is not None else torch.empty(shape, dtype=dtype, device=device)
            if pp > 1:
                dist.broadcast(full, src=owners[unit.name], group=pp_group)
            yield name, full
            if hf.tied and name == "model.embed_tokens.weight":
                yield "lm_head.weight", full.clone()  # an engine that shares the matrix in name only would keep its old head


def save_hf(weights: Iterator[tuple[str, torch.Tensor]], hf: HFConfig, source: Path, folder: Path, writes: bool) -> None:
    """Writes `folder`, a Hugging Face directory: the weights as safetensors, everything else (config, tokenizer) as in `source`.

    All ranks iterate over the weights; the one that `writes` holds them all. The folder is there whole or not at all.
    """
    state = {}
    for name, tensor in weights:
        if writes and not (hf.tied and name == "lm_head.weight"):  # a tied head is the embedding: transformers stores it once
            state[name] = tensor.cpu()
    if not writes:
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.bin"))
    save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _local_parameters(modules: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, layers renumbered to their global index. `modules`: one for each virtual pipeline stage."""
    named = {}
    for module in modules:
        numbers = [layer.layer_number - 1 for layer in module.decoder.layers]  # megatron-core counts from 1
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(numbers[int(parts[2])])
            named[".".join(parts)] = parameter
    return named


def _owners(names: Iterable[str], pp_group) -> dict[str, int]:
    """{parameter: global rank of the pipeline stage that holds it}, at any spread of the layers. Collective over the stages."""
    held: list = [None] * pp_group.size()
    dist.all_gather_object(held, list(names), group=pp_group)
    ranks = dist.get_process_group_ranks(pp_group)
    return {name: rank for rank, stage in zip(ranks, held, strict=True) for name in stage}


class _Checkpoint:
    """The safetensors of a Hugging Face directory, one file or a sharded index, read one tensor at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self.files = json.loads(index.read_text())["weight_map"]
        elif (directory / "model.safetensors").exists():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(f"{directory}: no model.safetensors and no model.safetensors.index.json; expected a Hugging Face directory")
        self._handles: dict = {}

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self._handles.clear()

    def _open(self, file: str):
        try:
            return safe_open(self.directory / file, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{self.directory / file}: not found, though model.safetensors.index.json names it") from None
        except SafetensorError as error:
            raise UserError(f"{self.directory / file}: not a readable safetensors file: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        return self._handles[file].get_tensor(name)

    def check(self, expected: dict[str, tuple[int, ...]], hf: HFConfig) -> None:
        present = set(self.files) - ({"lm_head.weight"} if hf.tied else set())  # some writers keep the tied copy
        missing, unknown = sorted(set(expected) - present), sorted(present - set(expected))
        if missing or unknown:
            raise UserError(f"{self.directory}: tensors do not fit {hf.architecture}; missing: {_some(missing)}; unknown: {_some(unknown)}")
        for name, shape in expected.items():
            file = self.files[name]
            if file not in self._handles:
                self._handles[file] = self._open(file)
            found = tuple(self._handles[file].get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{self.directory / file}: {name} has shape {list(found)}, config.json asks for {list(shape)}")


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
