"""One training step, pctrain against plain transformers + torch's AdamW: tokens/s, model FLOPs utilisation, peak memory; CPU or GPU.

    python benchmarks/train_step.py [--models quickstart 30m] [--lengths equal varied] [--turns N] [--dtype float32]

Both start from the same weights and train on the same sequences, loss on the responses only, gradients clipped to 1. A step goes from
token rows to updated weights: packing or padding, forward, backward, gradient norm, update. pctrain: `core.step` at world size 1, through
megatron-core's schedule, data parallel wrapper and distributed optimizer. Rivals: `LlamaForCausalLM` with SDPA on the padded batch, loss
by its `labels`, `clip_grad_norm_` and AdamW as torch makes it by default and with `fused=True`. Before any timing loss and gradient norm
are compared.

Providers take turns in one process, so that what else the machine does meets all of them; the table holds medians. On a CPU one thread
works and time is CPU time of the process (other processes disturb it less than wall time, which stands beside it); on a GPU it is wall
time. Utilisation is FLOPs of the model by the paper's and by the exact formula (`pctrain.compute.flops`) over time, as a share of the
fastest matrix product seen in the same run. Peak memory is that of tensors: weights, gradients and Adam's moments, and what a step
allocates on top.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for _name, _value in {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)  # as `pctrain sft` sets them, before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from pctrain.common.device import device, on_gpu  # noqa: E402
from pctrain.compute import flops  # noqa: E402
from pctrain.compute.model_shape import ModelShape  # noqa: E402
from pctrain.config.tree import ArchitectureConfig, ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from pctrain.data.packing import NO_LABEL, pack_rows  # noqa: E402
from pctrain.data.rows import Row, make_row  # noqa: E402
from pctrain.data.scratch_model import initial_weights  # noqa: E402

# name: (shape, vocabulary, sequences a step, their mean length)
MODELS = {
    "quickstart": (ArchitectureConfig(), 300, 32, 31),
    "30m": (ArchitectureConfig(layers=8, hidden=512, heads=8, kv_heads=8, ffn=1408, context=2048), 8000, 16, 128),
    "500m": (
        ArchitectureConfig(layers=24, hidden=1024, heads=16, kv_heads=4, ffn=4096, context=4096, tied=False),
        32000,
        32,
        1024,
    ),
}
OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=0.1, clip=1.0)
BATCHES = 8  # different batches that the steps go through in turn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_model(folder: Path, architecture: ArchitectureConfig, vocab: int) -> Path:
    """A Hugging Face directory of random weights (no tokenizer: the benchmark draws token ids)."""
    from transformers import LlamaConfig

    a = architecture
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=vocab, hidden_size=a.hidden, intermediate_size=a.ffn, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, max_position_embeddings=a.context, tie_word_embeddings=a.tied,
        dtype="float32", bos_token_id=1, eos_token_id=2,
    ).save_pretrained(folder)  # fmt: skip
    save_file(initial_weights(a, vocab, seed=0), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_batches(vocab: int, sequences: int, mean: int, lengths: str, longest: int) -> list[list[Row]]:
    """Random ids; a third of each sequence is prompt. `varied`: log-normal lengths (sigma 0.8) around the same mean."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        sizes = np.full(sequences, mean)
        if lengths == "varied":
            sizes = np.clip(rng.lognormal(np.log(mean) - 0.8**2 / 2, 0.8, sequences).round().astype(int), 4, longest)
        batches.append(
            [
                make_row(rng.integers(3, vocab, n // 3).tolist(), rng.integers(3, vocab, n - n // 3).tolist())
                for n in sizes
            ]
        )
    return batches


class Pctrain:
    """`core.step`, a pack a batch (of at most 16384 positions)."""

    def __init__(self, directory: Path, batches: list[list[Row]], dtype: str):
        from pctrain.core import Learner

        model = ModelConfig(path=directory, dtype=dtype)
        self.learner = Learner(model, ParallelConfig(), optimizer_config=OPTIMIZER, total_steps=10**6, seed=0)
        self.budget = min(16384, -(-max(sum(len(row) for row in rows) for rows in batches) // 16) * 16)

    def step(self, rows: list[Row]) -> tuple[float, float]:
        from pctrain.sft.loss import cross_entropy

        update = self.learner.train_step(pack_rows(rows, self.budget), cross_entropy, want_entropy=False)
        return update.loss, update.grad_norm

    def positions(self, rows: list[Row]) -> int:
        return pack_rows(rows, self.budget).positions

    def held(self) -> int:
        """Bytes of weights, gradient buffers and optimizer state. (A master or gradient that shares memory with another counts once.)"""
        [wrapped] = self.learner.chunks  # one process, one stage
        tensors = [*wrapped.parameters()]
        tensors += [b.grad_data for b in [*wrapped.buffers, *wrapped.expert_parallel_buffers]]
        for inner in getattr(self.learner._optimizer, "chained_optimizers", [self.learner._optimizer]):
            tensors += [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            tensors += [p for group in inner.optimizer.param_groups for p in group["params"]]
        return storage_bytes(tensors)


class Transformers:
    """The same model as transformers trains it: a batch padded to its longest sequence."""

    def __init__(self, directory: Path, dtype: str, fused: bool):
        from transformers import AutoModelForCausalLM

        self.model = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], attn_implementation="sdpa")
            .to(device())
            .train()
        )
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.eps, fused=fused or None)

    def step(self, rows: list[Row]) -> tuple[float, float]:
        lengths = [len(row) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        labels = np.full_like(ids, NO_LABEL)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row.tokens
            labels[i, : len(row)] = np.where(row.weights > 0, row.tokens, NO_LABEL)
            mask[i, : len(row)] = 1
        ids, labels, mask = (torch.from_numpy(x).to(device()) for x in (ids, labels, mask))
        # Without padding no mask: transformers then takes the faster causal path without looking.
        loss = self.model(
            ids, attention_mask=mask if min(lengths) < max(lengths) else None, labels=labels, use_cache=False
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.item(), norm.item()

    def positions(self, rows: list[Row]) -> int:
        return len(rows) * max(len(row) for row in rows)

    def held(self) -> int:
        state = [t for state in self.adamw.state.values() for t in state.values() if torch.is_tensor(t)]
        return storage_bytes([*self.model.parameters(), *state])  # gradients are made anew in every step


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors, memory that several share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes of tensors that one step holds on top of what was there before it."""
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not changes:
        raise SystemExit("FAIL: torch's profiler reported no allocation, so peak memory cannot be told")
    changes.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in changes]).max())


def clock() -> tuple[float, float]:
    """(wall seconds, seconds that the table is about: CPU time of the process, on a GPU wall time)."""
    if on_gpu():
        torch.cuda.synchronize()
        now = time.perf_counter()
        return now, now
    return time.perf_counter(), time.process_time()


def matmul_rate(dtype: torch.dtype) -> Callable[[], float]:
    """A function that times one matrix product and returns its FLOP/s."""
    n = 8192 if on_gpu() else 768
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    torch.mm(a, b)

    def measure() -> float:
        _, began = clock()
        torch.mm(a, b)
        return 2 * n**3 / (clock()[1] - began)

    return measure


def bench(name: str, lengths: str, turns: int, dtype: str, fused_rival: bool) -> None:
    architecture, vocab, sequences, mean = MODELS[name]
    shape = ModelShape(architecture.layers, architecture.hidden, architecture.ffn, architecture.heads, architecture.kv_heads,
                             architecture.hidden // architecture.heads, vocab, architecture.tied)  # fmt: skip
    batches = make_batches(vocab, sequences, mean, lengths, min(8 * mean, architecture.context))
    with tempfile.TemporaryDirectory() as folder:
        directory = make_model(Path(folder), architecture, vocab)
        providers = {
            "pctrain": Pctrain(directory, batches, dtype),
            "transformers": Transformers(directory, dtype, fused=False),
        }
        if fused_rival:
            providers["transformers, fused AdamW"] = Transformers(directory, dtype, fused=True)

    first = {label: provider.step(batches[0]) for label, provider in providers.items()}
    loose = 1e-4 if dtype == "float32" else 3e-2  # the same sums in another order
    for label, values in first.items():
        if not np.allclose(values, first["transformers"], rtol=loose):
            raise SystemExit(
                f"FAIL: (loss, gradient norm) of {label} are {values}, of transformers {first['transformers']}"
            )
    for provider in providers.values():
        for rows in batches[1:3]:
            provider.step(rows)

    rate, fastest = matmul_rate(DTYPES[dtype]), 0.0
    wall: dict[str, list[float]] = {label: [] for label in providers}
    own: dict[str, list[float]] = {label: [] for label in providers}
    order = [*providers.items()]
    for turn in range(turns):
        fastest = max(fastest, rate())
        order.append(order.pop(0))  # who goes first changes: a provider pays for the caches its forerunner filled
        for label, provider in order:
            wall_began, began = clock()
            provider.step(batches[turn % BATCHES])
            wall_ended, ended = clock()
            wall[label].append(wall_ended - wall_began)
            own[label].append(ended - began)

    used = [batches[turn % BATCHES] for turn in range(turns)]
    tokens = statistics.fmean(sum(len(row) for row in rows) for rows in used)
    paper = statistics.fmean(
        flops.paper_sft(shape, steps=1, batch=sequences, mean_length=np.mean([len(r) for r in rows])) for rows in used
    )
    exact = statistics.fmean(flops.exact_training(shape, [len(row) for row in rows]) for rows in used)
    print(
        f"\n{name}: {shape.parameters / 1e6:.1f}M parameters, {sequences} sequences of {lengths} length, {tokens:.0f} tokens a step, "
        f"{dtype}, {turns} turns; fastest matrix product {fastest / 1e9:.0f} GFLOP/s"
    )
    print(
        "| provider | step, ms | quartiles | wall, ms | tokens/s | MFU paper | MFU exact | padding | peak memory, MB | of transformers |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for label, provider in providers.items():
        low, median, high = statistics.quantiles(own[label], n=4)
        ratio = statistics.median(a / b for a, b in zip(own[label], own["transformers"], strict=True))
        measured = batches if lengths == "varied" else batches[:1]
        memory = provider.held() + max(peak_bytes(lambda: provider.step(rows)) for rows in measured)
        padding = 1 - tokens / statistics.fmean(provider.positions(rows) for rows in used)
        print(
            f"| {label} | {median * 1e3:.1f} | {low * 1e3:.1f} - {high * 1e3:.1f} | {statistics.median(wall[label]) * 1e3:.1f} "
            f"| {tokens / median:.0f} | {paper / median / fastest:.1%} | {exact / median / fastest:.1%} | {padding:.0%} "
            f"| {memory / 1e6:.0f} | {ratio:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["quickstart", "30m"], help="500m is meant for a GPU"
    )
    parser.add_argument(
        "--lengths", nargs="+", choices=["equal", "varied"], default=["equal", "varied"], help="of the sequences"
    )
    parser.add_argument(
        "--turns", type=int, help="timed steps a provider; default 200 for quickstart, 24 for the others"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations (pctrain keeps fp32 masters)"
    )
    parser.add_argument("--no-fused-rival", action="store_true", help="leave out transformers with fused AdamW")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import megatron.core
    import transformers

    machine = torch.cuda.get_device_name() if on_gpu() else f"{cpu_name()}, one thread"
    print(
        f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, megatron-core {megatron.core.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for name in options.models:
        for lengths in options.lengths:
            turns = options.turns or (200 if name == "quickstart" else 24)
            bench(name, lengths, turns, options.dtype, not options.no_fused_rival)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
