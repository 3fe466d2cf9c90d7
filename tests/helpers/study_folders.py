"""Write run folders of a study by hand, without training, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

STEP_SFT, STEP_RL = 2e-9, 4e-9  # EFLOPs per step, close to the quick start's
# (step, validation loss): adaptive, stable with one transient point, mild, severe.
LOSSES = [
    (0, 4.0),
    (30, 1.2),
    (60, 0.7),
    (90, 0.505),
    (120, 0.52),
    (150, 0.500),
    (180, 0.508),
    (210, 0.53),
    (240, 0.58),
    (270, 0.7),
]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def binomial_se(score: float, problems: int = 512) -> float:
    return 100 * math.sqrt(score / 100 * (1 - score / 100) / problems)


def config(kind: str, seed: int = 3, algorithm: str = "grpo") -> dict:
    return {
        "kind": kind,
        "run": {"seed": seed},
        "ceiling": {"delta": 0.02, "delta2": 0.10},
        "rl": {"algorithm": algorithm},
        "fingerprints": {},
    }


def ledger_row(step: int, phase: str, paper: float, exact: float) -> dict:
    return {
        "step": step,
        "phase": phase,
        "sequences": 32,
        "tokens": 800,
        "mean_length": 25.0,
        "paper_flops": paper,
        "exact_flops": exact,
        "seconds": 0.5,
        "device_seconds": 1.0,
    }


def make_sft(folder: Path, scores: dict[int, float], seed: int = 3, shift: float = 0.0) -> None:
    """Write an SFT run folder; `shift` is added to every validation loss."""
    rows = [{"step": s, "kind": "train", "eflops_sft": s * STEP_SFT, "eflops_rl": 0.0, "loss": 1.0} for s in (10, 20)]
    rows += [
        {
            "step": s,
            "kind": "val",
            "eflops_sft": s * STEP_SFT,
            "eflops_rl": 0.0,
            "val_loss": loss + shift,
            "val_tokens": 5000,
            "val_loss_se": 0.01,
        }
        for s, loss in LOSSES
    ]
    rows += [
        {
            "step": s,
            "kind": "eval",
            "eflops_sft": s * STEP_SFT,
            "eflops_rl": 0.0,
            "score": v,
            "score_se": binomial_se(v),
            "problems": 512,
            "truncated_share": 0.0,
            "no_box_share": 0.0,
        }
        for s, v in scores.items()
    ]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(
        folder / "ledger.jsonl",
        [
            ledger_row(30, "sft_update", 6e10, 5e10),
            ledger_row(60, "sft_update", 6e10, 5e10),
            ledger_row(60, "validation", 1e9, 1e9),
        ],
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config("sft", seed)))


def make_rl(
    folder: Path,
    start: int,
    role: str,
    scores: list[float],
    every: int = 2,
    hostile: str = "7-1+9=",
    seed: int = 3,
    algorithm: str = "grpo",
) -> None:
    """Write an RL run folder with one score per `every` steps; `hostile` is text in its rollouts."""
    eflops_sft = start * STEP_SFT
    rows = []
    for i, score in enumerate(scores):
        axes = {"eflops_sft": eflops_sft, "eflops_rl": i * every * STEP_RL}
        if i:
            rows.append({"step": i * every, "kind": "train", **axes, **TRAIN})
        rows.append({"step": i * every, "kind": "eval", **axes, "score": score, "score_se": binomial_se(score), **EVAL})
    write_lines(folder / "metrics.jsonl", rows)
    phases = ("rollout", "rollout_rejected", "logprob", "rl_update", "evaluation")
    write_lines(folder / "ledger.jsonl", [ledger_row(1, phase, 2e10, 3e10) for phase in phases])
    old = rollout("an old step", "", "wrong") | {"answer": ""}
    write_lines(folder / "rollouts" / "step-2.jsonl", [old])
    response = f"7-1=6;6+9=15 so \\boxed{{15}} {hostile}"
    causes = ["right"] * 6 + ["wrong", "no_box"]
    write_lines(folder / "rollouts" / "step-10.jsonl", [rollout(hostile, response, cause) for cause in causes])
    (folder / "config.yaml").write_text(yaml.safe_dump(config("rl", seed, algorithm)))
    start_json = {"start_step": start, "role": role, "sft_run": "../sft", "eflops_sft": eflops_sft}
    (folder / "start.json").write_text(json.dumps(start_json))


TRAIN = {
    "reward": 0.5,
    "kept_prompts": 32,
    "dropped_prompts": 10,
    "carried_prompts": 6,
    "rounds": 2,
    "truncated_share": 0.01,
}
EVAL = {"problems": 512, "truncated_share": 0.08, "no_box_share": 0.02}


def rollout(prompt: str, response: str, cause: str) -> dict:
    kept = cause != "no_box"
    return {
        "prompt": prompt,
        "response": response,
        "answer": "15",
        "reward": float(cause == "right"),
        "cause": cause,
        "finish": "stop",
        "kept": kept,
        "why": "" if kept else "all wrong",
    }


def rising(first: float, top: float, n: int = 26) -> list[float]:
    """Return scores along a sigmoid in compute, with a fixed wobble smaller than the binomial noise."""
    return [
        round(first + (top - first) / (1 + (5 / i) ** 2) + 0.6 * math.sin(3 * i), 2) if i else first for i in range(n)
    ]


def make_study(root: Path, hostile: str = "7-1+9=") -> Path:
    make_sft(root / "sft", {60: 20.0, 120: 40.0, 180: 48.0, 270: 50.0})
    make_rl(root / "rl-step-60", 60, "early", rising(20.0, 34.0))
    make_rl(root / "rl-step-150", 150, "stable", rising(45.0, 72.0), hostile=hostile)
    make_rl(root / "rl-step-270", 270, "overfit", [50.0, 56.0, 60.0, 63.0, 65.0, 66.0], every=10)
    return root
