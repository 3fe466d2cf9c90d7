"""Hugging Face weights <-> megatron-core shards, at any tensor x pipeline x expert layout.

One table, `units`, says for every megatron-core parameter which Hugging Face tensors it holds and how they are laid out in it.
Loading and exporting read the same table, so they cannot disagree.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from pctrain.common.device import on_gpu
from pctrain.distributed.health import watchdog
from pctrain.hf import weight_files, weight_names
from pctrain.hf.config import HFConfig, set_dtype

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Unit:
    """One megatron-core parameter. `shard(tensors, r, tp)` lays out the part of rank r; `whole(shards)` is its inverse over all ranks.

    `shard` only slices its tensors along rows (`t[a:b]`) or columns (`t[:, a:b]`): they may lie on the disk. `whole` takes the parts as
    one tensor [tp, ...]; what it returns is a view of that only where tp > 1.
    """

    name: str  # in megatron-core, with the global index of layer and expert
    hf: dict[str, tuple[int, ...]]  # Hugging Face name -> shape
    shard: Callable[[list, int, int], torch.Tensor]
    whole: Callable[[torch.Tensor], list[torch.Tensor]]
    replicated: bool = False


def units(hf: HFConfig, te: bool) -> list[Unit]:
    """Every parameter of the whole model, in the order of the layers. `te`: Transformer Engine fuses norms into the linears after them."""
    H, attention = hf.hidden, hf.heads * hf.head_dim
    table = [_vocab(EMBEDDING, weight_names.EMBEDDING, hf)]
    for i in range(hf.layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
        # Before experts there is no one linear that the norm could be fused into.
        mlp_norm = "mlp.linear_fc1.layer_norm_weight" if te and not hf.experts else "pre_mlp_layernorm.weight"
        qkv_names = [f"{theirs}.self_attn.{p}_proj" for p in "qkv"]
        table += [
            _replicated(f"{ours}.{input_norm}", f"{theirs}.input_layernorm.weight", (H,)),
            _qkv(f"{ours}.self_attention.linear_qkv.weight", [f"{n}.weight" for n in qkv_names], (H,), hf),
            *(
                [_qkv(f"{ours}.self_attention.linear_qkv.bias", [f"{n}.bias" for n in qkv_names], (), hf)]
                if hf.qkv_bias
                else []
            ),
            *(
                _replicated(
                    f"{ours}.self_attention.{p}_layernorm.weight", f"{theirs}.self_attn.{p}_norm.weight", (hf.head_dim,)
                )
                for p in ("qk" if hf.qk_norm else "")
            ),
            _row(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (H, attention)),
            _replicated(f"{ours}.{mlp_norm}", f"{theirs}.post_attention_layernorm.weight", (H,)),
        ]
        if hf.experts is None:
            table += _feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, hf.ffn)
        else:
            table.append(_replicated(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", (hf.experts.count, H)))
            for j in range(hf.experts.count):
                table += _feed_forward(
                    f"{ours}.mlp.experts.local_experts.{j}", f"{theirs}.mlp.experts.{j}", H, hf.experts.ffn
                )
    table.append(_replicated("decoder.final_layernorm.weight", "model.norm.weight", (H,)))
    if not hf.tied:
        table.append(_vocab("output_layer.weight", weight_names.LM_HEAD, hf))
    return table


def _replicated(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    return Unit(name, {theirs: shape}, lambda t, r, tp: t[0][:], lambda shards: [shards[0].clone()], replicated=True)


def _row(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    """Row parallel: split along the input dimension."""

    def shard(t, r, tp):
        part = shape[1] // tp
        return t[0][:, r * part : (r + 1) * part]

    return Unit(name, {theirs: shape}, shard, lambda shards: [torch.cat(list(shards), 1)])


def _vocab(name: str, theirs: str, hf: HFConfig) -> Unit:
    """Embedding and head: the vocabulary is padded with zero rows to a multiple of the tensor parallel size, cut again on export."""

    def shard(t, r, tp):
        part = hf.padded_vocab(tp) // tp
        rows = t[0][r * part : min((r + 1) * part, hf.vocab)]
        return F.pad(rows, (0, 0, 0, part - len(rows))) if len(rows) < part else rows

    def whole(shards):
        rows = shards.flatten(0, 1)[: hf.vocab]
        return [rows if len(shards) > 1 else rows.clone()]  # the largest of all tensors is not copied once more

    return Unit(name, {theirs: (hf.vocab, hf.hidden)}, shard, whole)


def _feed_forward(ours: str, theirs: str, hidden: int, ffn: int) -> list[Unit]:
    down = _row(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", (hidden, ffn))
    return [_gate_up(f"{ours}.linear_fc1.weight", theirs, (ffn, hidden)), down]


def _gate_up(name: str, theirs: str, shape: tuple[int, ...]) -> Unit:
    """SwiGLU's two matrices: rank r holds [gate_r; up_r]."""

    def shard(t, r, tp):
        part = shape[0] // tp
        return torch.cat([x[r * part : (r + 1) * part] for x in t])

    def whole(shards):
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]

    return Unit(name, {f"{theirs}.gate_proj.weight": shape, f"{theirs}.up_proj.weight": shape}, shard, whole)


def _qkv(name: str, theirs: list[str], tail: tuple[int, ...], hf: HFConfig) -> Unit:
    """Rows by key/value group: [its query heads, its key, its value], groups split over the ranks."""
    per_group, D = hf.heads // hf.kv_heads, hf.head_dim
    rows = [per_group * D, D, D]  # of one group, in q, k and v

    def shard(t, r, tp):
        groups = hf.kv_heads // tp
        grouped = [
            x[r * groups * n : (r + 1) * groups * n].view(groups, n, *tail) for x, n in zip(t, rows, strict=True)
        ]
        return torch.cat(grouped, 1).flatten(0, 1)

    def whole(shards):
        grouped = [s.view(-1, sum(rows), *tail).split(rows, 1) for s in shards]  # [groups, rows of a group, ...] each
        return [torch.cat([g[k].flatten(0, 1) for g in grouped]) for k in range(3)]

    return Unit(name, {n: (hf.kv_heads * s, *tail) for n, s in zip(theirs, rows, strict=True)}, shard, whole)


def load_hf(modules: list[torch.nn.Module], hf: HFConfig, directory: Path, te: bool) -> None:
    """Copies the safetensors of `directory` into this rank's shards (`modules`); of a tensor only this rank's part is read.

    Raises UserError that lists missing or unknown tensors, wrong shapes and dtypes: nothing is loaded by halves in silence.
    """
    table = units(hf, te)
    with weight_files.HFReader(directory) as source:
        # Some writers keep the tied copy.
        source.check(
            {name: shape for unit in table for name, shape in unit.hf.items()},
            hf.architecture,
            ignored=frozenset({weight_names.LM_HEAD} if hf.tied else ()),
        )
        tp = parallel_state.get_tensor_model_parallel_world_size()
        r = parallel_state.get_tensor_model_parallel_rank()
        mine = local_parameters(modules)
        for unit in table:
            targets = [mine[unit.name]] if unit.name in mine else []
            if hf.tied and unit.name == EMBEDDING and "output_layer.weight" in mine:
                targets.append(
                    mine["output_layer.weight"]
                )  # the last pipeline stage keeps its own copy of a tied matrix
            for target in targets:
                value = unit.shard([source[name] for name in unit.hf], r, tp)
                with torch.no_grad():
                    target.copy_(value)


def export_hf(
    modules: list[torch.nn.Module], hf: HFConfig, te: bool, *, tied_head: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, full tensor on this rank, storage of its own). Collective over all ranks of a model.

    `tied_head`: with tied embeddings, `lm_head.weight` follows the embedding.
    """
    mine = local_parameters(modules)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    ways = routes(set(mine))
    dtype, device = next(iter(mine.values())).dtype, next(iter(mine.values())).device
    for unit in units(hf, te):
        tensors = None
        if unit.name in mine:
            local = mine[unit.name].detach()
            shards = local[None]
            if tp_group.size() > 1 and not unit.replicated:
                shards = _gather(local, tp_group)
            tensors = unit.whole(shards)
            del shards
        for k, (name, shape) in enumerate(unit.hf.items()):
            full = torch.empty(shape, dtype=dtype, device=device) if tensors is None else tensors[k]
            for group, source in ways:
                if unit.name in source:
                    dist.broadcast(full, src=source[unit.name], group=group)
            watchdog.beat()
            yield name, full
            if tied_head and hf.tied and name == weight_names.EMBEDDING:
                yield weight_names.LM_HEAD, full.clone()  # an engine that shares the matrix in name only would keep its old head
            del full


def _gather(local: torch.Tensor, group) -> torch.Tensor:
    """[ranks of the group, *shape of local], on all of them."""
    gathered = local.new_empty((group.size(), *local.shape))
    if on_gpu():
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered
    # gloo's all_gather holds everything twice
    gathered[group.rank()] = local
    for part, source in zip(gathered, dist.get_process_group_ranks(group), strict=True):
        dist.broadcast(part, src=source, group=group)
    return gathered


def routes(held: set[str]) -> list[tuple]:
    """[(group, {name: global rank that sends it to the group})] in the order of the broadcasts; `held`: this rank's parameters. Collective.

    A parameter may lie on one pipeline stage alone, and of that on one expert parallel rank alone; from there it goes to the others.
    """
    ways = []
    for group in (parallel_state.get_expert_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        source, held = _sources(held, group)
        ways.append((group, source))
    return ways


def _sources(held: set[str], group) -> tuple[dict[str, int], set[str]]:
    """({name: global rank of the group that sends it}, for parameters that only some ranks of the group hold; all names of the group)."""
    if group.size() == 1:
        return {}, held
    names: list = [None] * group.size()
    dist.all_gather_object(names, held, group=group)
    ranks = dist.get_process_group_ranks(group)
    everything, everywhere = set.union(*names), set.intersection(*names)
    return {
        name: next(r for r, n in zip(ranks, names, strict=True) if name in n) for name in everything - everywhere
    }, everything


def save_hf(
    modules: list[torch.nn.Module], hf: HFConfig, te: bool, source: Path, folder: Path, *, writes: bool,
    dtypes: Mapping[str, torch.dtype] | None = None, shard_bytes: int = weight_files.SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes `folder`, a Hugging Face directory: the weights as safetensors, everything else (config, tokenizer) as in `source`.

    Collective; the rank that `writes` holds one full tensor at a time. The folder is there whole or not at all.

    Args:
        dtypes: of the tensors in the files, by name; None: all as they are in the model.
        shard_bytes: most bytes of one file.
    """
    ours = next(modules[0].parameters()).dtype
    shapes = [(name, shape) for unit in units(hf, te) for name, shape in unit.hf.items()]
    entries = [weight_files.Entry(name, dtypes[name] if dtypes else ours, shape) for name, shape in shapes]
    tensors = export_hf(modules, hf, te, tied_head=False)  # transformers stores a tied matrix once
    if not writes:
        for _ in tensors:
            pass
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        source, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")
    )
    names = {str(entry.dtype).removeprefix("torch.") for entry in entries}
    if len(names) == 1:  # where they are mixed, as in the source, config.json stays
        set_dtype(temporary, names.pop())
    weight_files.write(temporary, entries, tensors, shard_bytes=shard_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def round_to(modules: list[torch.nn.Module], hf: HFConfig, te: bool, dtypes: Mapping[str, torch.dtype]) -> None:
    """Gives this rank's parameters the values that they have in files of these dtypes."""
    mine = local_parameters(modules)
    for unit in units(hf, te):
        wanted = {dtypes[name] for name in unit.hf}
        copies = [unit.name] + (["output_layer.weight"] if hf.tied and unit.name == EMBEDDING else [])
        for parameter in (mine[name] for name in copies if name in mine):
            for dtype in wanted:
                parameter.data.copy_(parameter.data.to(dtype))


def local_parameters(modules: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, layers and experts renumbered to their global index. `modules`: one for each virtual stage."""
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
