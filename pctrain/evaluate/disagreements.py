"""Where the two verifiers disagree: the list, and what a judge of the user's says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.samples import SAMPLES, Verifiers, read, verdict_of
from pctrain.files.durable import json_line, write_beside
from pctrain.reward.verdict import FAULTS

DISAGREEMENTS = "disagreements.jsonl"
TAIL = 500  # characters of a response that are shown: the answer stands at its end


def write_disagreements(folder: Path, verifiers: Verifiers, judge: str | None) -> None:
    """Collective. Writes disagreements.jsonl beside the samples; what this judge has judged before is not asked again."""
    if not parallel.from_rank_zero(lambda: _is_done(folder / DISAGREEMENTS, judge)):
        found = parallel.from_rank_zero(lambda: [line for line in read(folder / SAMPLES) if differs(line)])
        with watchdog.phase("reward"):
            asked = [(line["response"], line["answer"], line["prompt"]) for line in found]
            verdicts = verifiers.score(judge, asked) if judge is not None else [None] * len(found)
        lines = [
            {
                **{key: line[key] for key in ("id", "index", "sample", "prompt")},
                "response_tail": line["response"][-TAIL:],
                **{key: line[key] for key in ("answer", "strict", "lenient")},
                "judge": judge,
                "judged": verdict_of(verdict) if verdict is not None else None,
            }
            for line, verdict in zip(found, verdicts, strict=True)
        ]
        parallel.from_rank_zero(lambda: write_beside(folder / DISAGREEMENTS, "".join(map(json_line, lines))))


def differs(line: dict[str, Any]) -> bool:
    return line["strict"]["reward"] != line["lenient"]["reward"]


def judge_failed(line: dict[str, Any]) -> bool:
    """Whether the judge was asked and gave no verdict: the strict one stays."""
    return line["judged"] is not None and line["judged"]["cause"] in FAULTS


def _is_done(file: Path, judge: str | None) -> bool:
    return file.exists() and all(line["judge"] == judge for line in read(file))
