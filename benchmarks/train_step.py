"""Time one training step of pctrain against plain transformers with torch's AdamW: tokens/s, MFU and peak memory.

    python benchmarks/train_step.py [--models quickstart 30m] [--lengths equal varied] [--turns N] [--dtype float32]

It runs on a CPU or a GPU. Both start from the same weights and train on the same sequences, with the loss on the
responses only and gradients clipped to 1. A step takes token rows to updated weights: packing or padding, forward,
backward, gradient norm, update. pctrain runs one learner step at world size 1, through megatron-core's schedule, data
parallel wrapper and distributed optimizer. Its rivals run `LlamaForCausalLM` with SDPA on the padded batch, the loss
from its `labels`, `clip_grad_norm_`, and torch's AdamW by default and with `fused=True`. The benchmark compares loss
and gradient norm before any timing.

Providers take turns in one process, so that other work on the machine affects all of them; the table holds medians. On
a CPU one thread works, and time is CPU time of the process, which other processes disturb less than wall time; the
table has both. On a GPU it is wall time. Utilization is the model's FLOPs, by the formula of the paper (arXiv
2512.11470) and exactly (`pctrain.compute.flops`), over time, as a share of the fastest matrix product of the same run.
Peak memory counts tensors: weights, gradients, Adam's moments, and a step's own allocations.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

for _name, _value in {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)  # as `pctrain sft` sets them, before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from pctrain.common.device import DTYPES, device, on_gpu  # noqa: E402
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
BATCHES = 8  # different batches, which the steps cycle through


def make_model(folder: Path, architecture: ArchitectureConfig, vocab: int) -> Path:
    """Write a Hugging Face directory of random weights, without a tokenizer: the benchmark draws token ids."""
    from transformers import LlamaConfig

    a = architecture
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=a.context,
        tie_word_embeddings=a.tied,
        dtype="float32",
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)
    save_file(initial_weights(a, vocab, seed=0), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_batches(vocab: int, sequences: int, mean: int, lengths: str, longest: int) -> list[list[Row]]:
    """Return batches of random ids, a third of each sequence a prompt.

    `varied` draws log-normal lengths (sigma 0.8) around the same mean.
    """
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
    """The learner's step, with one pack per batch (of at most 16384 positions)."""

    def __init__(self, directory: Path, batches: list[list[Row]], dtype: str):
        from pctrain.core import Learner

        model = ModelConfig(path=directory, dtype=dtype)
        self.learner = Learner(model, ParallelConfig(), optimizer_config=OPTIMIZER, total_steps=10**6, seed=0)
        self.budget = min(16384, -(-max(sum(len(row) for row in rows) for rows in batches) // 16) * 16)

    def step(self, rows: list[Row]) -> tuple[float, float]:
        """Train on a batch; return loss and gradient norm."""
        from pctrain.sft.loss import cross_entropy

        update = self.learner.train_step(pack_rows(rows, self.budget), cross_entropy, want_entropy=False)
        return update.loss, update.grad_norm

    def positions(self, rows: list[Row]) -> int:
        """Return the number of positions of a batch, padding included."""
        return pack_rows(rows, self.budget).positions

    def held(self) -> int:
        """Return the bytes of weights, gradient buffers and optimizer state; memory that tensors share counts once."""
        [wrapped] = self.learner.chunks  # one process, one stage
        tensors = [*wrapped.parameters()]
        tensors += [b.grad_data for b in [*wrapped.buffers, *wrapped.expert_parallel_buffers]]
        for inner in getattr(self.learner.optimizer, "chained_optimizers", [self.learner.optimizer]):
            tensors += [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            tensors += [p for group in inner.optimizer.param_groups for p in group["params"]]
        return storage_bytes(tensors)


class Transformers:
    """The same model trained with transformers, on batches padded to their longest sequence."""

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
        """Train on a batch; return loss and gradient norm."""
        lengths = [len(row) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        labels = np.full_like(ids, NO_LABEL)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row.tokens
            labels[i, : len(row)] = np.where(row.weights > 0, row.tokens, NO_LABEL)
            mask[i, : len(row)] = 1
        ids, labels, mask = (torch.from_numpy(x).to(device()) for x in (ids, labels, mask))
        # Without a mask, transformers takes the faster causal path.
        loss = self.model(
            ids, attention_mask=mask if min(lengths) < max(lengths) else None, labels=labels, use_cache=False
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.item(), norm.item()

    def positions(self, rows: list[Row]) -> int:
        """Return the number of positions of a batch, padding included."""
        return len(rows) * max(len(row) for row in rows)

    def held(self) -> int:
        """Return the bytes of weights and optimizer state."""
        state = [t for state in self.adamw.state.values() for t in state.values() if torch.is_tensor(t)]
        return storage_bytes([*self.model.parameters(), *state])  # gradients are allocated in every step


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the tensors; memory that several share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes of tensors that one step holds in addition to those before it."""
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
        raise SystemExit("FAIL: torch's profiler reported no allocation, so peak memory cannot be measured")
    changes.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in changes]).max())


def clock() -> tuple[float, float]:
    """Return wall seconds, and the seconds of the table: CPU time of the process, or wall time on a GPU."""
    if on_gpu():
        torch.cuda.synchronize()
        now = time.perf_counter()
        return now, now
    return time.perf_counter(), time.process_time()


def matmul_rate(dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that times one matrix product and returns its FLOP/s."""
    n = 8192 if on_gpu() else 768
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    torch.mm(a, b)

    def measure() -> float:
        _, began = clock()
        torch.mm(a, b)
        return 2 * n**3 / (clock()[1] - began)

    return measure


Provider = Pctrain | Transformers


@dataclass(frozen=True)
class Times:
    """Seconds of each provider's turns, and the fastest matrix product (FLOP/s) between them."""

    wall: dict[str, list[float]]
    own: dict[str, list[float]]
    fastest: float


def bench(name: str, lengths: str, turns: int, dtype: str, fused_rival: bool) -> None:
    """Compare all providers on one model and print a table."""
    architecture, vocab, sequences, mean = MODELS[name]
    batches = make_batches(vocab, sequences, mean, lengths, min(8 * mean, architecture.context))
    with tempfile.TemporaryDirectory() as folder:
        directory = make_model(Path(folder), architecture, vocab)
        providers: dict[str, Provider] = {
            "pctrain": Pctrain(directory, batches, dtype),
            "transformers": Transformers(directory, dtype, fused=False),
        }
        if fused_rival:
            providers["transformers, fused AdamW"] = Transformers(directory, dtype, fused=True)
    _check_first_step(providers, batches, dtype)
    for provider in providers.values():
        for rows in batches[1:3]:
            provider.step(rows)
    times = _take_turns(providers, batches, turns, dtype)
    shape = ModelShape(
        architecture.layers,
        architecture.hidden,
        architecture.ffn,
        architecture.heads,
        architecture.kv_heads,
        architecture.hidden // architecture.heads,
        vocab,
        architecture.tied,
    )
    used = [batches[turn % BATCHES] for turn in range(turns)]
    tokens = statistics.fmean(sum(len(row) for row in rows) for rows in used)
    print(
        f"\n{name}: {shape.parameters / 1e6:.1f}M parameters, {sequences} sequences of {lengths} length, "
        f"{tokens:.0f} tokens per step, {dtype}, {turns} turns; "
        f"fastest matrix product {times.fastest / 1e9:.0f} GFLOP/s"
    )
    measured = batches if lengths == "varied" else batches[:1]
    _print_table(providers, times, shape, used, measured)


def _check_first_step(providers: dict[str, Provider], batches: list[list[Row]], dtype: str) -> None:
    """End the benchmark if losses or gradient norms of the first step differ."""
    first = {label: provider.step(batches[0]) for label, provider in providers.items()}
    tolerance = 1e-4 if dtype == "float32" else 3e-2  # the same sums in another order
    for label, values in first.items():
        if not np.allclose(values, first["transformers"], rtol=tolerance):
            raise SystemExit(
                f"FAIL: (loss, gradient norm) of {label} are {values}, of transformers {first['transformers']}"
            )


def _take_turns(providers: dict[str, Provider], batches: list[list[Row]], turns: int, dtype: str) -> Times:
    measure_rate, fastest = matmul_rate(DTYPES[dtype]), 0.0
    wall: dict[str, list[float]] = {label: [] for label in providers}
    own: dict[str, list[float]] = {label: [] for label in providers}
    order = [*providers.items()]
    for turn in range(turns):
        fastest = max(fastest, measure_rate())
        order.append(order.pop(0))  # the order rotates: a provider pays for the caches that the one before it filled
        for label, provider in order:
            wall_began, began = clock()
            provider.step(batches[turn % BATCHES])
            wall_ended, ended = clock()
            wall[label].append(wall_ended - wall_began)
            own[label].append(ended - began)
    return Times(wall, own, fastest)


def _print_table(
    providers: dict[str, Provider],
    times: Times,
    shape: ModelShape,
    used: list[list[Row]],
    measured: list[list[Row]],
) -> None:
    """Print a row per provider; `used` are the timed batches, `measured` those of the peak memory."""
    tokens = statistics.fmean(sum(len(row) for row in rows) for rows in used)
    paper = statistics.fmean(
        flops.paper_sft(shape, steps=1, batch=len(rows), mean_length=np.mean([len(r) for r in rows])) for rows in used
    )
    exact = statistics.fmean(flops.exact_training(shape, [len(row) for row in rows]) for rows in used)
    columns = ("provider", "step, ms", "quartiles", "wall, ms", "tokens/s", "MFU paper", "MFU exact", "padding",
               "peak memory, MB", "of transformers")  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for label, provider in providers.items():
        low, median, high = statistics.quantiles(times.own[label], n=4)
        ratio = statistics.median(a / b for a, b in zip(times.own[label], times.own["transformers"], strict=True))
        memory = provider.held() + max(peak_bytes(partial(provider.step, rows)) for rows in measured)
        padding = 1 - tokens / statistics.fmean(provider.positions(rows) for rows in used)
        print(
            f"| {label} | {median * 1e3:.1f} | {low * 1e3:.1f} - {high * 1e3:.1f} "
            f"| {statistics.median(times.wall[label]) * 1e3:.1f} | {tokens / median:.0f} "
            f"| {paper / median / times.fastest:.1%} | {exact / median / times.fastest:.1%} | {padding:.0%} "
            f"| {memory / 1e6:.0f} | {ratio:.3f} |",
            flush=True,
        )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["quickstart", "30m"], help="500m is meant for a GPU"
    )
    parser.add_argument(
        "--lengths", nargs="+", choices=["equal", "varied"], default=["equal", "varied"], help="of the sequences"
    )
    parser.add_argument(
        "--turns", type=int, help="timed steps of each provider; default 200 for quickstart, 24 for the others"
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
        f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__}, transformers {transformers.__version__}"
    )
    for name in options.models:
        for lengths in options.lengths:
            turns = options.turns or (200 if name == "quickstart" else 24)
            bench(name, lengths, turns, options.dtype, not options.no_fused_rival)


def cpu_name() -> str:
    """Return the model of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
