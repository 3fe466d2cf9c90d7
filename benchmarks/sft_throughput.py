"""Time SFT as a user runs it: real tokens/s of `pctrain sft` against TRL's SFTTrainer, on equal data and weights.

    python benchmarks/sft_throughput.py [--models quickstart 30m] [--turns N] [--steps N] [--batch N]

Every provider is a separate process with one thread and a complete trainer: loader, padding or packing, forward,
backward, gradient norm, AdamW, metrics, logs. They take turns of a few steps, while the others block on a pipe, so that
other work on the machine affects all of them. Time is CPU time of the process with all its threads (the table also has
wall time). Tokens are real ones, without padding. Nothing is validated or saved in a turn. All run float32 without
recomputation.

TRL runs with its default padding (to the longest sequence of a batch) and with batches of similar lengths
(`group_by_length`), its fastest way on a CPU. `sorted loop` is not a trainer: it is a plain torch loop over
transformers' model, with batches cut from the data sorted by length.

The data are arithmetic problems of 2 to 12 terms with their working: 20 to 130 tokens. The loss covers the responses
with their EOS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)  # as `pctrain sft` sets them, before torch is imported

from pctrain.config.tree import ArchitectureConfig, Config, ProblemsConfig  # noqa: E402

MODELS = {
    "quickstart": ArchitectureConfig(),
    "30m": ArchitectureConfig(layers=8, hidden=512, heads=8, kv_heads=8, ffn=1408, context=2048),
}
PROBLEMS = ProblemsConfig(
    min_terms=2, max_terms=12, max_operand=99, train=4000, validation=32, test=1, rl=1, vocab_size=320
)
LR = 1e-4
WEIGHT_DECAY = 0.1
CLIP = 1.0
TOKEN_BUDGET = 4096


class Turns:
    """The worker's side of the turns: after the last step of a turn it reports, and waits for the next turn."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.left, self.tokens = 0, 0
        self.cpu, self.wall = 0.0, 0.0

    def start(self) -> None:
        """Wait for the first turn."""
        self._wait()

    def done(self, tokens: int) -> None:
        """Count a step."""
        self.left, self.tokens = self.left - 1, self.tokens + tokens
        if not self.left:
            self.pipe.send(
                {"tokens": self.tokens, "cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}
            )
            self._wait()

    def _wait(self) -> None:
        if self.pipe.recv() is None:
            self.pipe.close()
            sys.stdout.flush()
            os._exit(0)  # the trainer is in its loop, and nothing needs to be finished
        self.left, self.tokens = self.steps, 0
        self.cpu, self.wall = time.process_time(), time.perf_counter()


# ---- the providers
# -----------------------------------------------------------------------------------------------------


def pctrain(turns: Turns, config: Config) -> None:
    """Run `pctrain sft`, with its journal wrapped to count steps."""
    from pctrain.sft import journal, loop

    record = journal.SFTJournal.record

    def counted(self: journal.SFTJournal, trained: journal.TrainedStep) -> None:
        record(self, trained)
        turns.done(trained.batch.tokens)

    journal.SFTJournal.record = counted
    measure = journal.SFTJournal.validate_and_evaluate_if_due
    journal.SFTJournal.validate_and_evaluate_if_due = lambda self, step: (
        turns.start() if step == 0 else measure(self, step)
    )
    loop.main(config)


def trl(turns: Turns, config: Config, group_by_length: bool) -> None:
    """Run TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    samples = tokenised(config)
    rows = {
        "input_ids": [s.tokens.tolist() for s in samples],
        "completion_mask": [(s.weights > 0).astype(int).tolist() for s in samples],
    }
    if group_by_length:
        rows["length"] = [len(s) for s in samples]
    options = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"} if group_by_length else {}
    arguments = SFTConfig(
        output_dir=str(config.run.dir),
        per_device_train_batch_size=config.sft.batch_size,
        max_steps=10**6,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        max_length=None,
        completion_only_loss=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype="float32", attn_implementation="sdpa")

    class Stop(TrainerCallback):
        seen = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens = int(trainer._total_train_tokens)
            turns.done(tokens - self.seen)
            self.seen = tokens

    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=hf_tokenizer(config),
        callbacks=[Stop()],
    )
    trainer.train()


def sorted_loop(turns: Turns, config: Config) -> None:
    """Train in a plain torch loop."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    samples = sorted(tokenised(config), key=len)
    size = config.sft.batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95), fused=True)
    rng = np.random.default_rng(0)
    turns.start()
    while True:
        for i in rng.permutation(len(batches)):
            batch = batches[i]
            longest = len(batch[-1])
            ids, mask = (torch.zeros(size, longest, dtype=torch.long) for _ in range(2))
            labels = torch.full((size, longest), -100)
            for j, s in enumerate(batch):
                n = len(s)
                tokens = torch.from_numpy(s.tokens)
                ids[j, :n], mask[j, :n] = tokens, 1
                labels[j, :n] = torch.where(torch.from_numpy(s.weights) > 0, tokens, -100)
            whole = len(batch[0]) == longest  # without padding transformers takes the faster causal path
            model(ids, attention_mask=None if whole else mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            adamw.step()
            adamw.zero_grad()
            turns.done(sum(len(s) for s in batch))


PROVIDERS: dict[str, tuple[Callable, dict]] = {
    "pctrain": (pctrain, {}),
    "TRL, default padding": (trl, {"group_by_length": False}),
    "TRL, group_by_length": (trl, {"group_by_length": True}),
    "sorted loop": (sorted_loop, {}),
}


# ---- data and models
# ---------------------------------------------------------------------------------------------------


def tokenised(config: Config) -> list:
    """Return the training samples as pctrain tokenizes them."""
    from pctrain.data.build import TokenJob, build, folder_of
    from pctrain.data.store import TokenStore

    job = TokenJob([config.data.train[0].path], config.model.path, config.data, config.sft.token_budget)
    folder = folder_of(config.run.dir / "tokens", job)
    for _ in build(job, folder):
        pass
    store = TokenStore(folder)
    return [store[i] for i in range(len(store))]


def hf_tokenizer(config: Config) -> Any:
    """Return the model's tokenizer, which pads with EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(folder: Path, name: str, problems: ProblemsConfig) -> Config:
    """Generate problems and a new model in `folder`; return the config that names them."""
    from pctrain.data import prepare

    config = Config()
    config.run.dir = folder
    config.run.seed = 0
    config.data.problems = problems
    config.model.architecture = MODELS[name]
    return prepare.prepare(config, folder)


def make_config(folder: Path, name: str, batch: int) -> Config:
    """Return the config of all providers."""
    config = base_config(folder, name, PROBLEMS)
    sft = config.sft
    sft.steps = 10**6
    sft.batch_size = batch
    sft.token_budget = TOKEN_BUDGET
    sft.val_every = sft.checkpoint_every = 10**6
    sft.optimizer.lr = LR
    sft.optimizer.weight_decay = WEIGHT_DECAY
    sft.optimizer.clip = CLIP
    return config


# ---- the race
# ----------------------------------------------------------------------------------------------------------


def own_place(config: Config, folder: Path) -> Config:
    """Send this worker's output to log.txt; return a config that writes to `run`."""
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    config = config.model_copy(deep=True)
    config.run.dir = folder / "run"
    return config


def worker(pipe: Connection, label: str, config: Config, steps: int, folder: Path) -> None:
    """Run a provider in its process."""
    import torch

    torch.set_num_threads(1)
    config = own_place(config, folder)
    provider, options = PROVIDERS[label]
    provider(Turns(pipe, steps), config, **options)


def race(name: str, labels: list[str], turns: int, steps: int, batch: int) -> None:
    """Let the providers take turns on one model, and print the table."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(Path(scratch) / "shared", name, batch)
        pipes, workers = {}, []
        for number, label in enumerate(labels):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            pipes[label], worker_end = context.Pipe()
            workers.append(context.Process(target=worker, args=(worker_end, label, config, steps, folder), daemon=True))
            workers[-1].start()
            worker_end.close()
        results_of: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
        order = list(labels)
        for turn in range(turns + 1):  # the first turn warms up
            order.append(order.pop(0))
            for label in order:
                pipes[label].send("go")
                try:
                    result = pipes[label].recv()
                except EOFError:
                    log = Path(scratch) / str(labels.index(label)) / "log.txt"
                    sys.exit(f"{label} ended:\n{log.read_text()[-3000:]}")
                if turn:
                    results_of[label].append(result)
        for label, process in zip(labels, workers, strict=True):
            pipes[label].send(None)
            process.join(30)
    print(f"\n{name}: {turns} turns of {steps} steps of {batch} trajectories")
    print("| provider | tokens/s of CPU time | quartiles | tokens/s of wall time | pctrain / provider, per turn |")
    print("|---|---|---|---|---|")
    speed = {label: [r["tokens"] / r["cpu"] for r in results] for label, results in results_of.items()}
    for label, results in results_of.items():
        low, median, high = statistics.quantiles(speed[label], n=4)
        wall = statistics.median(r["tokens"] / r["wall"] for r in results)
        ratio = statistics.median(a / b for a, b in zip(speed[labels[0]], speed[label], strict=True))
        print(f"| {label} | {median:.0f} | {low:.0f} - {high:.0f} | {wall:.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        default=list(PROVIDERS),
        help="the first is compared with the others",
    )
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, help="steps per turn; default 20 for quickstart, 2 for 30m")
    parser.add_argument("--batch", type=int, default=32, help="trajectories per step")
    options = parser.parse_args()
    import torch
    import transformers
    import trl as trl_package
    from train_step import cpu_name  # in this folder

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl_package.__version__}"
    print(f"{cpu_name()}, one thread; Python {platform.python_version()}, {versions}")
    print(f"problems {json.dumps(PROBLEMS.model_dump())}")
    for name in options.models:
        race(
            name, options.providers, options.turns, options.steps or (20 if name == "quickstart" else 2), options.batch
        )


if __name__ == "__main__":
    main()
