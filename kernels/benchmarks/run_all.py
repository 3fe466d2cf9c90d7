"""Measure every operation against its rivals and its floor, in one process; write JSON rows and pictures to `results/`.

    python kernels/benchmarks/run_all.py [--ops NAME ...] [--shapes T,V,H ...] [--seconds S] [--out FOLDER]
    pip install -r kernels/benchmarks/requirements.txt      (the rivals; the JSON names a missing one with the reason)

On a GPU it measures wall time in bf16, at the shapes of real models, with whole vocabularies and shards of them.
Without a GPU it measures CPU time of the process in fp32, at small shapes, with one thread. Providers take turns, so
that other work on the machine affects all of them. Before any timing, results are compared with float64: a wrong one
prints FAIL and gets no time. `--seconds` covers the timed turns of the whole run. The exit status is 1 if an operation
of pctrain_kernels has no time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pctrain_kernels of this checkout, installed or not

import cross_entropy
import linear_logprob_entropy
import linear_policy_loss
import linear_token_loss
import logprob_entropy
import report
import torch
from harness import HeadShape, Op, Row, Setting, check_memory_events, run_point, skipped

OPS = {
    op.name: op
    for op in (
        logprob_entropy.OP,
        cross_entropy.OP,
        linear_logprob_entropy.OP,
        linear_token_loss.OP,
        linear_policy_loss.OP,
    )
}
EXTRA_OPS = {linear_token_loss.CHUNKS.name: linear_token_loss.CHUNKS}  # by name only

GPU_SHAPES = tuple(
    HeadShape(tokens, vocab // shards, width)
    for shards in (1, 2, 4, 8)
    for width, vocab in ((3584, 152064), (4096, 128256))
    for tokens in (8192, 2048, 16384)
)
CPU_SHAPES = (HeadShape(1024, 8000, 256), HeadShape(2048, 8000, 256))
CPU_LARGE = HeadShape(4096, 32000, 512)  # a call takes seconds: only for the operation that has a target at this shape
LOGITS_COST = 256  # cost of a logit without products, in units of a product's H; sets the shares of the time


def default_points(ops: Sequence[Op], gpu: bool) -> list[tuple[Op, HeadShape]]:
    """Return the points to measure, the most important first: the whole vocabulary before its shards."""
    points = [(op, shape) for shape in (GPU_SHAPES if gpu else CPU_SHAPES) for op in ops]
    return points if gpu else points + [(op, CPU_LARGE) for op in ops if op.name == linear_token_loss.OP.name]


def run(
    points: Sequence[tuple[Op, HeadShape]],
    setting: Setting,
    seconds: float,
    limit: float,
    stem: Path,
    on_rows: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Measure all points, print a line per row, extend the JSON file, and call `on_rows` after every point.

    After `limit` seconds no further point begins.
    """
    # The root gives small shapes more turns and large ones more time.
    costs = [
        (shape.tokens * shape.vocab * (shape.width if op.products else LOGITS_COST)) ** 0.5 for op, shape in points
    ]
    rows: list[Row] = []
    began = time.perf_counter()
    for (op, shape), cost in zip(points, costs, strict=True):
        if time.perf_counter() - began > limit:
            new_rows = skipped(op, shape, setting, f"the run's limit of {limit:.0f} s was reached")
        else:
            new_rows = run_point(op, shape, setting, seconds * cost / sum(costs))
        for row in new_rows:
            print(report.line(row), flush=True)
        rows += new_rows
        report.write_json(rows, stem.with_name(f"{stem.name}.json"))
        on_rows(new_rows)
    files = [f"{stem}.json"]
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
    else:
        files += [path.name for path in report.pictures(rows, stem)]
    print(f"{time.perf_counter() - began:.0f} s; {', '.join(files)}")
    return rows


def parse_shape(text: str) -> HeadShape:
    """Parse T,V,H."""
    return HeadShape(*map(int, text.split(",")))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", nargs="+", choices=[*OPS, *EXTRA_OPS], default=[*OPS], metavar="NAME", help=f"of {', '.join(OPS)}"
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="T,V,H", help="instead of the device's own")
    parser.add_argument("--seconds", type=float, help="of timed turns; default 240 on a GPU, 60 on a CPU")
    parser.add_argument("--limit", type=float, default=450.0, help="wall seconds after which no further point begins")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def run_options(options: argparse.Namespace, on_rows: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """Run the benchmarks that the options name, and call `on_rows` with the rows of every point."""
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if not gpu:
        torch.set_num_threads(1)
        check_memory_events()
    setting = Setting(device, torch.bfloat16 if gpu else torch.float32, report.about(device))
    ops = [(OPS | EXTRA_OPS)[name] for name in options.ops]
    points = [(op, shape) for op in ops for shape in options.shapes] if options.shapes else default_points(ops, gpu)
    seconds = options.seconds if options.seconds is not None else 240.0 if gpu else 60.0
    return run(points, setting, seconds, options.limit, options.out / report.file_stem(setting.about), on_rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    rows = run_options(parse(arguments))
    own_rows = [row for row in rows if row["provider"].startswith("pctrain_kernels")]
    untimed = [row["op"] for row in own_rows if row["status"] not in ("ok", "skipped")]
    if untimed:
        raise SystemExit(f"{len(untimed)} points of pctrain_kernels have no time: {', '.join(sorted(set(untimed)))}")


if __name__ == "__main__":
    main()
