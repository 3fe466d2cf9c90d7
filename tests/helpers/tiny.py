"""A study small enough for a test in which every reward still occurs: two-term sums, learned in seconds."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from pctrain.config.load import load
from pctrain.config.tree import Config

OPTIONS = [
    "--data.problems.min_terms=2",
    "--data.problems.max_terms=3",
    "--data.problems.train=200",
    "--data.problems.validation=40",
    "--data.problems.test=64",
    "--data.problems.rl=200",
    "--model.architecture.layers=2",
    "--model.architecture.hidden=64",
    "--model.architecture.heads=2",
    "--model.architecture.kv_heads=2",
    "--model.architecture.ffn=128",
    "--model.architecture.context=160",
    "--sft.steps=120",
    "--sft.batch_size=16",
    "--sft.token_budget=512",
    "--sft.val_every=20",
    "--sft.eval_every=60",
    "--sft.checkpoint_every=20",
    "--sft.optimizer.lr=5e-3",
    "--sft.optimizer.warmup=10",
    "--rl.steps=4",
    "--rl.prompts=8",
    "--rl.round_prompts=12",
    "--rl.max_rounds=3",
    "--rl.group=4",
    "--rl.token_budget=1024",
    "--rl.eval_every=2",
    "--rl.checkpoint_every=2",
    "--rl.optimizer.lr=1e-3",
    "--rollout.max_response=24",
    "--rollout.kv_cache_mb=64",
]


def config(folder: Path, *options: str) -> Config:
    return load(None, [*OPTIONS, f"--run.dir={folder}", *options])


def metrics(folder: Path, kind: str | None = None) -> list[dict]:
    """Return the lines of a run without the times, the only values in which two runs of one config differ."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines if kind in (None, line["kind"])
    ]


def ledger(folder: Path) -> list[dict]:
    lines = (Path(folder) / "ledger.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def cli(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return (exit status, stderr)."""
    from pctrain.cli.main import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(list(arguments))
    return status, errors.getvalue()


def command(*arguments: str | Path) -> tuple[int, str]:
    """Run one command on this rank; return (exit status, output)."""
    from pctrain.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue() + err.getvalue()


def rl_options(sft_run: Path, folder: Path, *more: str) -> list[str]:
    data = [f"--data.{name}={sft_run}/data/{name}.jsonl" for name in ("train", "validation", "test", "rl")]
    start = [
        f"--model.path={sft_run}/model",
        f"--model.checkpoint={sft_run}/checkpoints/step-120",
        f"--run.dir={folder}",
    ]
    return [*OPTIONS, *data, *start, *more]


def sft(folder: Path) -> tuple[int, str]:
    """Run SFT without benchmarks; return (exit status, stderr)."""
    return cli("sft", *OPTIONS, f"--run.dir={folder}", "--sft.eval_every=0")
