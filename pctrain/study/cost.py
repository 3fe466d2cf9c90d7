"""The plan of a study as a table: which stages are done, running or still to do, and what they cost by the paper's formulas.

What has been spent is in the ledgers. What a stage will cost is an estimate from LOOKED_AT trajectories of its set: as many SFT steps as
the config says, and RL whose responses are as long as the experts', in one sampling round a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from pctrain.common.progress import make_console
from pctrain.compute import flops
from pctrain.compute.flops import EFLOP
from pctrain.compute.ledger import PHASES
from pctrain.compute.model_shape import ModelShape
from pctrain.config.tree import Config, SourceConfig
from pctrain.data import arithmetic
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.records import Record
from pctrain.data.sources import iter_records
from pctrain.hf.config import HFConfig
from pctrain.report.looks import flops_text
from pctrain.run.records import has_ledger, read_ledger
from pctrain.study.stages import OnDisk, Stage

if TYPE_CHECKING:
    from pctrain.study.jobs import Crew

LOOKED_AT = 200
CHARACTERS_A_TOKEN = 2.0  # of a tokenizer that is still to be trained


@dataclass(frozen=True)
class Lengths:
    """Of the trajectories looked at, int64 [n] each, tokens: the whole, and the part before the response."""

    whole: np.ndarray
    prompt: np.ndarray


class Costs:
    """Estimates for the stages of one study. `counts`: all records are counted where `sft.epochs` asks for it, which takes time."""

    def __init__(self, config: Config, counts: bool):
        self.config, self.counts = config, counts
        self._lengths: dict[str, Lengths] = {}

    def of(self, stage: Stage) -> float | None:
        """FLOPs of the whole stage, by the paper's formulas; None where that takes a count."""
        if stage.kind == "sft" and self.config.sft.epochs is not None and not self.counts:
            return None
        if stage.set not in self._lengths:
            self._lengths[stage.set] = self._measure(stage.set)
        lengths, sft, rl = self._lengths[stage.set], self.config.sft, self.config.rl
        if stage.kind == "sft":
            steps = sft.steps if sft.epochs is None else sft.epochs * self._samples(stage.set) / sft.batch_size
            return flops.paper_sft(
                self.shape, steps=steps, batch=sft.batch_size, mean_length=float(lengths.whole.mean())
            )
        length = float(np.minimum(lengths.whole, lengths.prompt + self.config.rollout.max_response).mean())
        if stage.algorithm in ("luffy", "srft"):
            step = flops.paper_luffy_step(
                self.shape, batch=rl.prompts, group=rl.group - 1, length=length, experts=1, expert_length=length
            )
        elif stage.algorithm in ("dapo_d", "dapo_dc"):
            step = flops.paper_dapo_step(
                self.shape,
                rounds=1,
                batch_generated=rl.round_prompts,
                batch_trained=rl.prompts,
                group=rl.group,
                mean_length=length,
            )
        else:  # upt: as if it learnt from every rollout
            step = flops.paper_grpo_step(self.shape, batch=rl.prompts, group=rl.group, mean_length=length)
        return rl.steps * step

    @cached_property
    def shape(self) -> ModelShape:
        model = self.config.model
        if model.path is not None:
            return HFConfig.read(model.path).shape
        a = model.architecture
        return ModelShape(
            a.layers,
            a.hidden,
            a.ffn,
            a.heads,
            a.kv_heads,
            a.hidden // a.heads,
            self.config.data.problems.vocab_size,
            a.tied,
        )

    def _measure(self, name: str) -> Lengths:
        found = [self._length(record) for record in islice(self._records(name), LOOKED_AT)]
        whole, prompt = np.array([pair for pair in found if pair is not None] or [(1, 1)]).T
        return Lengths(whole, prompt)

    def _records(self, name: str) -> Iterable[Record]:
        data, sources = self.config.data, self._sources(name)
        if sources is None:
            return arithmetic.generate(data.problems, self.config.run.seed)["train"]
        found = (record for source in sources for record in iter_records(source.path, data.fields, ("response",)))
        return (record for record in found if isinstance(record, Record))

    def _sources(self, name: str) -> list[SourceConfig] | None:
        """Of a set; of the only one, or for RL without SFT the first. None: problems are generated."""
        sets = self.config.study.sets
        return sets[name] if name else next(iter(sets.values()), self.config.data.train)

    def _samples(self, name: str) -> float:
        """Of one epoch."""
        data, sources = self.config.data, self._sources(name)
        if sources is None:
            return data.problems.train
        return sum(
            source.weight * sum(1 for _ in iter_records(source.path, data.fields, ("response",))) for source in sources
        )

    def _length(self, record: Record) -> tuple[int, int] | None:
        """(whole, prompt) in tokens; None where the record is not usable."""
        if self._encoder is None:
            parts = len(record.question), len(record.trajectory)
            return int(sum(parts) / CHARACTERS_A_TOKEN) + 2, int(parts[0] / CHARACTERS_A_TOKEN) + 1
        try:
            sample = self._encoder.encode(record)
        except Unusable:
            return None
        return len(sample.tokens), int(sample.spans[-1][0])

    @cached_property
    def _encoder(self) -> Encoder | None:
        path = self.config.model.path
        return None if path is None else Encoder(path, self.config.data, self.config.sft.token_budget)


def print_plan(config: Config, crew: Crew, disk: OnDisk, counts: bool = False) -> None:
    """Every stage with its state; of those to do the estimate, of the others what their ledgers say. `counts`: as in `Costs`."""
    costs = Costs(config, counts)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("stage", "algorithm", "state", "needs", "steps", "cost"):
        table.add_column(name, justify="right" if name in ("steps", "cost") else "left", overflow="fold")
    spent = ahead = 0.0
    for stage in crew.stages:
        state, who = crew.state(stage)
        paid = spent_in(disk.folder(stage))
        estimate = costs.of(stage) if state in ("to do", "running") else 0.0
        spent, ahead = spent + paid, ahead + max(0.0, (estimate or 0.0) - paid)
        if state in ("done", "left out"):
            cost = flops_text(paid / EFLOP) if state == "done" else "-"
        else:
            cost = "--dry-run tells" if estimate is None else f"~ {flops_text(estimate / EFLOP)}"
        steps = config.sft.steps if stage.kind == "sft" else config.rl.steps
        planned = (
            f"{config.sft.epochs:g} epochs" if stage.kind == "sft" and config.sft.epochs is not None else str(steps)
        )
        shown = (
            f"{state}: {who}"
            if who
            else state
            if stage in crew.mine or state != "to do"
            else f"{state} (not by this job)"
        )
        table.add_row(
            Text(stage.name), stage.algorithm or "-", shown, Text(", ".join(stage.needs) or "-"), planned, cost
        )
    console = make_console()
    title = f"{crew.root}: {len(crew.stages)} stage{'s' if len(crew.stages) > 1 else ''}, policy {config.study.policy}"
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"Spent {flops_text(spent / EFLOP)}, ahead about {flops_text(ahead / EFLOP)} of training compute (the paper's formulas; "
        "RL as if responses were as long as the experts', in one sampling round a step).",
        highlight=False,
        soft_wrap=True,
    )


def spent_in(folder: Path | None) -> float:
    """FLOPs of training in the ledger of a run folder, so far; 0 where there is none yet."""
    if folder is None or not has_ledger(folder):
        return 0.0
    return sum(line["paper_flops"] for line, _ in read_ledger(folder) if PHASES[line["phase"]].axis is not None)
