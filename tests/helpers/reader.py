"""A reader's folder with small versions of every file that the pages name, and a runner for the pages' commands."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
from pathlib import Path

from tests.helpers.doc_pages import GUIDES, ROOT, fenced


def lines(path: Path, records: list[dict]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write(text)


def files_of_pages() -> dict[str, str]:
    """Return {name: content} of the pages' YAML and Python files; the first line of each is a comment with its name."""
    found = {}
    for page in GUIDES:
        for _, block in fenced(page.read_text(encoding="utf-8"), ("yaml", "python")):
            name = block.splitlines()[0].removeprefix("# ")
            assert name.endswith((".yaml", ".py")) and name not in found, (
                f"{page}: a block whose first line names no file: {name}"
            )
            found[name] = block
    return found


def lay_out(folder: Path, sft_run: Path) -> None:
    """Build the folder from `sft_run`, a finished run of the small model; its data and weights replace the reader's."""
    import pyarrow
    import pyarrow.parquet

    read = {
        name: [json.loads(line) for line in (sft_run / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test", "rl")
    }
    for name, text in files_of_pages().items():
        (folder / name).write_text(text.replace("/models/", f"{folder}/models/"))
    for name in ("sft.yaml", "rl.yaml"):
        shutil.copy(folder / "mine.yaml", folder / name)
    for name in ("models/Qwen2.5-0.5B", "models/Qwen2.5-7B", "Qwen2.5-0.5B", "Qwen2.5-1.5B"):
        shutil.copytree(sft_run / "hf", folder / name)
        shape = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(
            json.dumps(shape | {"max_position_embeddings": 8192})
        )  # as the pages' responses need
    for name in ("configs", "launch", "kernels"):
        (folder / name).symlink_to(ROOT / name)
    train = read["train"]
    table = pyarrow.Table.from_pylist(train[:60])
    for name in ("openr1/a.parquet", "data/a.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, folder / name)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*train, *train[:3]]), folder / "raw.parquet")
    for name in ("own.jsonl.gz", "easy.jsonl", "hard-1.jsonl", "hard-2.jsonl"):
        lines(folder / name, train[:40])
    lines(folder / "heldout.jsonl", read["validation"][:16])
    for name in ("test.jsonl", "math500.jsonl", "aime.jsonl"):
        lines(folder / name, read["test"][:16])
    lines(folder / "problems.jsonl", [record | {"response": record["response"]} for record in train[:64]])
    _benchmarks(folder, read["test"][:3])
    curve = {
        "eflops": [0.5 * step for step in range(1, 15)],
        "scores": [50 + 30 * step / (step + 3) for step in range(1, 15)],
    }
    (folder / "curves.json").write_text(
        json.dumps({"curves": [{"name": "a", "p_sft": 50.0, "score_se": 0.5, **curve}]})
    )
    rows = [f"{x},{y}" for x, y in zip([0.0, *curve["eflops"]], [50.0, *curve["scores"]], strict=True)]
    (folder / "curves.csv").write_text("\n".join(["eflops,score", *rows]) + "\n")


def _benchmarks(folder: Path, problems: list[dict]) -> None:
    """Write the files of docs/evaluate.md, each with the columns of its layout."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    asked = [(problem["prompt"], problem["answer"]) for problem in problems]
    lines(folder / "gsm8k.jsonl", [{"question": prompt, "answer": f"so #### {answer}"} for prompt, answer in asked])
    math = "".join(json.dumps({"problem": prompt, "answer": answer}) + "\n" for prompt, answer in asked)
    (folder / "math500.jsonl.zst").write_bytes(zstandard.compress(math.encode()))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"problem": p, "answer": a} for p, a in asked]), folder / "aime24.parquet"
    )
    wrong = {f"Incorrect Answer {number}": str(-number) for number in (1, 2, 3)}
    lines(folder / "gpqa.jsonl", [{"Question": prompt, "Correct Answer": answer, **wrong} for prompt, answer in asked])
    lines(folder / "own.jsonl", [{"task": {"question": prompt, "gold": answer}} for prompt, answer in asked])


def cluster(folder: Path, to: Path) -> None:
    """Copy the folder to `to` with config.json files of published shapes, which serve plans but cannot run."""
    for path in folder.iterdir():
        if path.name != "models" and not path.name.startswith("Qwen"):
            (to / path.name).symlink_to(path)
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "vocab_size": 152064,
        "eos_token_id": 151643,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    for name in ("models/Qwen2.5-7B", "Qwen2.5-7B"):
        (to / name).mkdir(parents=True)
        (to / name / "config.json").write_text(json.dumps(shape))
    for name in ("mine.yaml", "sft.yaml", "rl.yaml"):
        (to / name).unlink()
        (to / name).write_text((folder / name).read_text().replace(f"{folder}/models/Qwen2.5-0.5B", "Qwen2.5-7B"))


def run(folder: Path, commands: list[tuple[str, ...]]) -> list[tuple[int, str]]:
    """Run `pctrain` commands until one fails; return (exit status, output)."""
    from pctrain.cli.main import main

    before, found = os.getcwd(), []
    os.chdir(folder)
    try:
        for words in commands:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                try:
                    status = main(list(words))
                except SystemExit as end:
                    status = int(end.code or 0)
            found.append((status, printed.getvalue()))
            if status:
                break
        return found
    finally:
        os.chdir(before)
