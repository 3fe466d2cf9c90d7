"""The plan of a study as a table: which stages are done, running or to do, and what they cost by the paper's formulas.

Spent compute comes from the ledgers. The cost of a stage to do is an estimate from the first trajectories of its set:
the configured number of SFT steps, and RL whose responses are as long as the experts', with one sampling round per
step.
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
from pctrain.config.algorithm import AlgorithmOptions
from pctrain.config.tree import Config, RLConfig, SourceConfig
from pctrain.data import arithmetic
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.records import Record
from pctrain.data.sources import iter_records
from pctrain.hf.config import HFConfig
from pctrain.report.looks import flops_text
from pctrain.run.records import has_ledger, read_ledger
from pctrain.study.stages import OnDisk, Stage, State, algorithm_of

if TYPE_CHECKING:
    from pctrain.study.jobs import Crew

SAMPLE = 200  # trajectories whose lengths are measured
CHARACTERS_PER_TOKEN = 2.0  # assumed for a tokenizer that is still to be trained


@dataclass(frozen=True)
class TrajectoryLengths:
    """Lengths of sampled trajectories in tokens, int64 [n] each: whole, and the part before the response."""

    whole: np.ndarray
    prompt: np.ndarray


class Costs:
    """Estimates for the stages of a study. `counts` allows counting sets for `sft.epochs`, which takes time."""

    def __init__(self, config: Config, counts: bool):
        self.config, self.counts = config, counts
        self._lengths: dict[str, TrajectoryLengths] = {}

    def of(self, stage: Stage) -> float | None:
        """Return the FLOPs of a whole stage by the paper's formulas; None if that needs a count."""
        if stage.kind == "sft" and self.config.sft.epochs is not None and not self.counts:
            return None
        if stage.set not in self._lengths:
            self._lengths[stage.set] = self._measure(stage.set)
        lengths = self._lengths[stage.set]
        if stage.kind == "sft":
            return self._sft(stage.set, float(lengths.whole.mean()))
        length = float(np.minimum(lengths.whole, lengths.prompt + self.config.rollout.max_response).mean())
        rl = self.config.rl
        return rl.steps * rl_step(self.shape, algorithm_of(self.config, stage.algorithm), rl, length)

    def _sft(self, set_name: str, mean_length: float) -> float:
        sft = self.config.sft
        steps = sft.steps if sft.epochs is None else sft.epochs * self._samples(set_name) / sft.batch_size
        return flops.paper_sft(self.shape, steps=steps, batch=sft.batch_size, mean_length=mean_length)

    @cached_property
    def shape(self) -> ModelShape:
        """Return the sizes of the model, before it is made if `model.path` is not given."""
        model = self.config.model
        if model.path is not None:
            return HFConfig.read(model.path).shape
        a = model.architecture
        vocab = self.config.data.problems.vocab_size
        return ModelShape(a.layers, a.hidden, a.ffn, a.heads, a.kv_heads, a.hidden // a.heads, vocab, a.tied)

    def _measure(self, set_name: str) -> TrajectoryLengths:
        lengths = [self._length(record) for record in islice(self._records(set_name), SAMPLE)]
        usable = [pair for pair in lengths if pair is not None]
        whole, prompt = np.array(usable or [(1, 1)]).T
        return TrajectoryLengths(whole, prompt)

    def _records(self, set_name: str) -> Iterable[Record]:
        data, sources = self.config.data, self._sources(set_name)
        if sources is None:
            return arithmetic.generate(data.problems, self.config.run.seed)["train"]
        items = (item for source in sources for item in iter_records(source.path, data.fields, ("response",)))
        return (item for item in items if isinstance(item, Record))

    def _sources(self, set_name: str) -> list[SourceConfig] | None:
        """Return the sources of a set, of the first one for RL without SFT; None if problems are generated."""
        sets = self.config.study.sets
        return sets[set_name] if set_name else next(iter(sets.values()), self.config.data.train)

    def _samples(self, set_name: str) -> float:
        """Return the trajectories of one epoch."""
        data, sources = self.config.data, self._sources(set_name)
        if sources is None:
            return data.problems.train
        return sum(
            source.weight * sum(1 for _ in iter_records(source.path, data.fields, ("response",))) for source in sources
        )

    def _length(self, record: Record) -> tuple[int, int] | None:
        """Return the tokens of a trajectory and of its prompt; None if the record is not usable."""
        if self._encoder is None:
            question, trajectory = len(record.question), len(record.trajectory or "")
            tokens = int((question + trajectory) / CHARACTERS_PER_TOKEN) + 2
            return tokens, int(question / CHARACTERS_PER_TOKEN) + 1
        try:
            sample = self._encoder.encode(record)
        except Unusable:
            return None
        return len(sample.tokens), int(sample.spans[-1][0])

    @cached_property
    def _encoder(self) -> Encoder | None:
        path = self.config.model.path
        return None if path is None else Encoder(path, self.config.data, self.config.sft.token_budget)


def rl_step(shape: ModelShape, algorithm: AlgorithmOptions, rl: RLConfig, length: float) -> float:
    """Return the FLOPs of one RL step by the paper's formula for an algorithm with these traits.

    Every sequence has `length` tokens. An algorithm that sometimes learns from experts instead (UPT) is counted as if
    it learned from every rollout.
    """
    rollouts = algorithm.rollouts(rl.group)
    if algorithm.dynamic_sampling:
        step = flops.paper_dapo_step(
            shape,
            rounds=1,
            batch_generated=rl.round_prompts,
            batch_trained=rl.prompts,
            group=rollouts,
            mean_length=length,
        )
    else:
        step = flops.paper_grpo_step(shape, batch=rl.prompts, group=rollouts, mean_length=length)
    if algorithm.expert_in_group:
        step += flops.paper_luffy_step(shape, batch=rl.prompts, group=0, length=length, experts=1, expert_length=length)
    return step


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A stage with its state and cost. `estimate` is None if it needs a count, and 0 for a stage that has ended."""

    stage: Stage
    state: State
    runner: str
    spent: float
    estimate: float | None

    @property
    def ahead(self) -> float:
        return max(0.0, (self.estimate or 0.0) - self.spent)

    @property
    def cost(self) -> str:
        if self.state == "done":
            return flops_text(self.spent / EFLOP)
        if self.state == "left out":
            return "-"
        return "see --dry-run" if self.estimate is None else f"~ {flops_text(self.estimate / EFLOP)}"


def print_plan(config: Config, crew: Crew, disk: OnDisk, counts: bool = False) -> None:
    """Print every stage with its state and cost, estimated if it has not ended. For `counts` see `Costs`."""
    costs = Costs(config, counts)
    lines = [_line(stage, crew, disk, costs) for stage in crew.stages]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("stage", "algorithm", "state", "needs", "steps", "cost"):
        table.add_column(name, justify="right" if name in ("steps", "cost") else "left", overflow="fold")
    for line in lines:
        stage = line.stage
        needs = Text(", ".join(stage.needs) or "-")
        state = _state_text(line, is_mine=stage in crew.mine)
        table.add_row(Text(stage.name), stage.algorithm or "-", state, needs, _steps_text(config, stage), line.cost)
    console = make_console()
    plural = "s" if len(lines) > 1 else ""
    title = f"{crew.root}: {len(lines)} stage{plural}, policy {config.study.policy}"
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    spent, ahead = sum(line.spent for line in lines), sum(line.ahead for line in lines)
    console.print(
        f"Spent {flops_text(spent / EFLOP)}, about {flops_text(ahead / EFLOP)} of training compute left (by the "
        "paper's formulas; RL as if responses were as long as the experts', with one sampling round per step).",
        highlight=False,
        soft_wrap=True,
    )


def _line(stage: Stage, crew: Crew, disk: OnDisk, costs: Costs) -> _Line:
    state, runner = crew.state(stage)
    estimate = costs.of(stage) if state in ("to do", "running") else 0.0
    return _Line(stage, state, runner, spent_in(disk.folder(stage)), estimate)


def _state_text(line: _Line, is_mine: bool) -> str:
    if line.runner:
        return f"{line.state}: {line.runner}"
    return line.state if is_mine or line.state != "to do" else f"{line.state} (not by this job)"


def _steps_text(config: Config, stage: Stage) -> str:
    if stage.kind == "rl":
        return str(config.rl.steps)
    return str(config.sft.steps) if config.sft.epochs is None else f"{config.sft.epochs:g} epochs"


def spent_in(folder: Path | None) -> float:
    """Return the training FLOPs in the ledger of a run folder so far, 0 if there is none yet."""
    if folder is None or not has_ledger(folder):
        return 0.0
    return sum(line["paper_flops"] for line, _ in read_ledger(folder) if PHASES[line["phase"]].axis is not None)
