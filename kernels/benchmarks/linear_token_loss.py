"""Time of `linear_token_loss` against full logits and `F.cross_entropy`, forward and backward, plain loss: one thread on a CPU.

    python kernels/benchmarks/linear_token_loss.py [--repeats N] [--chunks]

Providers take turns; the table holds medians of the turns and quartiles, in milliseconds of CPU time (other
processes disturb it less than wall time). Before any timing the gradients are compared with the naive ones.
`--chunks` shows the fused loss at several chunk sizes instead (what `CPU_LOGITS_BYTES` was chosen from).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from pctrain_kernels import linear_token_loss
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((1024, 320, 128), (1024, 8000, 256), (4096, 32000, 512))  # T, V, H
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, target, reduction="sum") / target.numel()


def fused(*, want_entropy: bool, chunk_tokens: int | None = None) -> Step:
    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss, _ = linear_token_loss(
            hidden, weight, target, lambda logprob, entropy, streams: (-logprob, {}),
            streams={}, denom=target.numel(), want_entropy=want_entropy, chunk_tokens=chunk_tokens,
        )  # fmt: skip
        return loss

    return step


def gradients(step: Step, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(step(*tensors), tensors[:2])


def measure(providers: dict[str, Step], tensors: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each turn."""
    expected = gradients(naive, tensors)
    for name, step in providers.items():
        for got, want in zip(gradients(step, tensors), expected, strict=True):
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item()):
                raise SystemExit(f"FAIL: gradients of {name} differ from the naive ones by {(got - want).abs().max()}")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(repeats):
        first = turn % len(providers)  # who goes first changes: a provider pays for the caches its forerunner filled
        for name, step in [*providers.items()][first:] + [*providers.items()][:first]:
            start = time.process_time()
            gradients(step, tensors)
            times[name].append((time.process_time() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31, help="turns a provider, fewer for large shapes")
    parser.add_argument("--chunks", action="store_true", help="the fused loss at several chunk sizes")
    parser.add_argument("--large", action="store_true", help="also T 4096, V 32000, H 512 (minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'T':>5} {'V':>6} {'H':>4}  {'provider':<28} {'median ms':>10} {'quartiles':>18} {'of naive':>9}")
    for tokens, vocab, width in SHAPES if options.large else SHAPES[:2]:
        hidden = torch.randn(tokens, width, requires_grad=True)
        weight = (torch.randn(vocab, width) / width**0.5).requires_grad_()
        target = torch.randint(vocab, (tokens,))
        providers = {"naive F.cross_entropy": naive}
        if options.chunks:
            for mib in (1, 2, 4, 8, 16, 32, 64, 128):
                rows = mib * 2**20 // (4 * vocab)
                providers[f"fused, {mib} MiB ({rows} rows)"] = fused(want_entropy=False, chunk_tokens=rows)
        else:
            providers |= {"fused": fused(want_entropy=False), "fused, entropy computed": fused(want_entropy=True)}
        flops = 6 * tokens * vocab * width
        times = measure(providers, (hidden, weight, target), max(3, min(options.repeats, int(1e12 / flops))))
        base = statistics.median(times["naive F.cross_entropy"])
        for name, turns in times.items():
            low, median, high = statistics.quantiles(turns, n=4)
            print(f"{tokens:>5} {vocab:>6} {width:>4}  {name:<28} {median:>10.2f} {low:>8.2f} {high:>9.2f} {median / base:>9.3f}")


if __name__ == "__main__":
    main()
