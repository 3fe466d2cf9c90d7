"""The samples on which the two verifiers disagree, and the verdicts of a judge of the user's on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.samples import SAMPLES, Verifiers, read, verdict_fields
from pctrain.files.durable import json_line, write_atomically
from pctrain.reward import Verdict
from pctrain.reward.verdict import FAULTS

DISAGREEMENTS = "disagreements.jsonl"
TAIL = 500  # characters of a response that are shown; they contain the answer


def write_disagreements(folder: Path, verifiers: Verifiers, judge: str | None) -> None:
    """Write disagreements.jsonl next to the samples. Collective. Earlier verdicts of the same judge are kept."""
    file = folder / DISAGREEMENTS
    if parallel.from_rank_zero(lambda: _is_done(file, judge)):
        return
    lines = parallel.from_rank_zero(lambda: [line for line in read(folder / SAMPLES) if differs(line)])
    verdicts: list[Verdict] | list[None] = [None] * len(lines)
    if judge is not None:
        with watchdog.phase("reward"):
            asked = [(line["response"], line["answer"], line["prompt"]) for line in lines]
            verdicts = verifiers.score(judge, asked)
    rows = [
        {
            **{key: line[key] for key in ("id", "index", "sample", "prompt")},
            "response_tail": line["response"][-TAIL:],
            **{key: line[key] for key in ("answer", "strict", "lenient")},
            "judge": judge,
            "judged": verdict_fields(verdict) if verdict is not None else None,
        }
        for line, verdict in zip(lines, verdicts, strict=True)
    ]
    parallel.from_rank_zero(lambda: write_atomically(file, "".join(map(json_line, rows))))


def differs(line: dict[str, Any]) -> bool:
    """Return whether the two verifiers gave a sample different rewards."""
    return line["strict"]["reward"] != line["lenient"]["reward"]


def judge_failed(line: dict[str, Any]) -> bool:
    """Return whether the judge was asked and gave no verdict, so that the strict one counts."""
    return line["judged"] is not None and line["judged"]["cause"] in FAULTS


def _is_done(file: Path, judge: str | None) -> bool:
    return file.exists() and all(line["judge"] == judge for line in read(file))
