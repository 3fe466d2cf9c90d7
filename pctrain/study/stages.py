"""The stages of a study, what each needs, and where its run folder is. Nothing is run here, and no torch is imported.

    sft                  SFT on the only set                            hard/sft             SFT on the set `hard`
    rl-stable            RL from its best checkpoint, by rl.algorithm   hard/luffy-stable    by another algorithm
    rl-base              RL without SFT, with run.seed                  seed-1/rl-base       with another seed

The names leave out rl.algorithm and run.seed. A study that grows by algorithms and seeds finds what it has done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pctrain.ceiling import regimes
from pctrain.common.errors import UserError
from pctrain.config.algorithm import AlgorithmOptions, built_in, with_shared
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.run import layout
from pctrain.run.checkpoints import checkpoint_step, list_checkpoints
from pctrain.run.documents import is_finished
from pctrain.run.records import read_values

REPORT = "report"
BASE = "base"  # the start of RL without SFT
State = Literal["done", "left out", "running", "to do"]


@dataclass(frozen=True)
class Stage:
    """A run of a study.

    Attributes:
        name: its name in the plan, and for `--only`.
        kind: "sft" or "rl".
        set: the set it trains on; empty for the only set, and for RL without SFT.
        seed: its run.seed.
        needs: names of the stages that come before it.
        start: where RL starts: early, stable or overfit, `step-N`, or `base`.
        algorithm: the name of the RL algorithm.
        seed_folder: the seed in its path; None for the seed of the config.
        algorithm_folder: the algorithm in its path; None for that of the config.
    """

    name: str
    kind: Literal["sft", "rl"]
    set: str
    seed: int
    needs: tuple[str, ...] = ()
    start: str = ""
    algorithm: str = ""
    seed_folder: int | None = None
    algorithm_folder: str | None = None

    @property
    def role(self) -> str:
        """Return the role of its start in start.json."""
        return self.start if self.start in ("early", "stable", "overfit") else "none"

    def sft_folder(self, root: Path) -> Path:
        """Return the folder of the SFT run: its own, or the one that RL starts from."""
        return layout.sft_folder(root, self.set, self.seed_folder)

    def folder(self, root: Path, step: int) -> Path:
        """Return the run folder; `step` is the SFT step that RL starts from (`start_step`)."""
        if self.kind == "sft":
            return self.sft_folder(root)
        return layout.rl_folder(root, step, self.set, self.seed_folder, self.algorithm_folder)


def stages_of(config: Config) -> list[Stage]:
    """Return all stages but the report, in the order in which one job runs them: a stage follows what it needs."""
    study = config.study
    runs = _rl_runs(config)
    has_sft = any(start != BASE for _, start in runs) or study.policy == "compare"
    stages: dict[str, Stage] = {}
    for seed in study.seeds or [config.run.seed]:
        seed_folder = None if seed == config.run.seed else seed
        for name in list(study.sets) or [""]:
            sft = _sft_stage(name, seed, seed_folder)
            if has_sft:
                stages[sft.name] = sft
            for algorithm, start in runs:
                rl = _rl_stage(config, sft, algorithm, start)
                stages.setdefault(rl.name, rl)  # RL without SFT is the same for every set
    return list(stages.values())


def _sft_stage(name: str, seed: int, seed_folder: int | None) -> Stage:
    return Stage(f"{_prefix(name, seed_folder)}sft", "sft", name, seed, seed_folder=seed_folder)


def _rl_stage(config: Config, sft: Stage, algorithm: str, start: str) -> Stage:
    """Return the RL stage that follows an SFT stage, or that starts from the base model."""
    set_name = "" if start == BASE else sft.set
    algorithm_folder = None if algorithm == config.rl.algorithm.name else algorithm.replace(":", ".")
    return Stage(
        f"{_prefix(set_name, sft.seed_folder)}{algorithm_folder or 'rl'}-{start}",
        "rl",
        set_name,
        sft.seed,
        needs=() if start == BASE else (sft.name,),
        start=start,
        algorithm=algorithm,
        seed_folder=sft.seed_folder,
        algorithm_folder=algorithm_folder,
    )


def _prefix(set_name: str, seed_folder: int | None) -> str:
    seed = "" if seed_folder is None else f"seed-{seed_folder}/"
    return f"{seed}{set_name}/" if set_name else seed


def _rl_runs(config: Config) -> list[tuple[str, str]]:
    """Return (algorithm, start) of the RL runs of one set and seed."""
    study = config.study
    names = [options.name for options in study.algorithms]
    if study.policy == "compare":
        pure = [(config.rl.algorithm.name, BASE)]
        return pure + [
            (name, BASE if algorithm_of(config, name).needs_expert else "stable") for name in names or built_in()
        ]
    return [(name, start) for start in _starts(config) for name in names or [config.rl.algorithm.name]]


def _starts(config: Config) -> list[str]:
    study = config.study
    if study.policy == "recommended":
        return ["stable"]
    if study.checkpoints:
        return [f"step-{step}" if step else BASE for step in sorted(study.checkpoints)]
    return list(study.starts)


def algorithm_of(config: Config, name: str) -> AlgorithmOptions:
    """Return the options of an algorithm of the study. What `rl.algorithm` changes holds for the others too."""
    listed = {options.name: options for options in config.study.algorithms}
    if name in listed:
        return with_shared(listed[name], config.rl.algorithm)
    if name == config.rl.algorithm.name:
        return config.rl.algorithm
    return with_shared(built_in()[name].model_validate({}), config.rl.algorithm)


def stage_config(config: ResolvedConfig, stage: Stage, root: Path, step: int) -> ResolvedConfig:
    """Return the config of a stage, from the config of the study; `step` is the SFT step that RL starts from."""
    own = config.model_copy(deep=True)
    own.study = type(config.study)()  # the study may grow without its runs knowing
    own.run.dir, own.run.seed = stage.folder(root, step), stage.seed
    own.data.cache = config.data.cache or root / "tokens"  # a set is tokenized once for all of its runs
    if stage.set:
        own.data.train = config.study.sets[stage.set]
    if stage.kind == "sft":
        own.run.keep_last = None  # RL may start from any of its checkpoints
        if config.study.policy == "recommended" and own.sft.stop_after == "never":
            own.sft.stop_after = "stable"
        return own
    own.rl.algorithm = algorithm_of(config, stage.algorithm)
    if step:
        own.model.checkpoint = stage.sft_folder(root) / "checkpoints" / f"step-{step}"
    return own


def start_step(config: Config, stage: Stage, root: Path) -> int | None:
    """Return the SFT step that RL starts from, by the regimes of the SFT run; None if its regime did not occur."""
    if stage.kind == "sft" or stage.start == BASE:
        return 0
    sft = stage.sft_folder(root)
    checkpoints = [checkpoint_step(path) for path in list_checkpoints(sft)]
    if stage.role == "none":
        step = int(stage.start.removeprefix("step-"))
        return step if step in checkpoints else None
    losses = read_values(sft, "val", "val_loss")
    bounds = config.ceiling.delta, config.ceiling.delta2
    return regimes.starts(list(losses), list(losses.values()), checkpoints, *bounds)[stage.role]


class OnDisk:
    """The state of the stages in the study's folder."""

    def __init__(self, config: Config, root: Path):
        self.config, self.root = config, root
        self._steps: dict[str, int | None] = {}  # start steps of RL whose SFT has ended, which do not change any more

    def ended(self, stage: Stage) -> State:
        """Return "done", "left out" if the regime that RL was to start from did not occur, or "to do"."""
        if not self._is_known(stage):
            return "to do"
        folder = self.folder(stage)
        if folder is None:
            return "left out"
        return "done" if is_finished(folder) else "to do"

    def folder(self, stage: Stage) -> Path | None:
        """Return the run folder; None until the start step of RL is known, and if the stage is left out."""
        step = self._steps[stage.name] if self._is_known(stage) else None
        return None if step is None else stage.folder(self.root, step)

    def _is_known(self, stage: Stage) -> bool:
        if stage.name not in self._steps and (not stage.needs or is_finished(stage.sft_folder(self.root))):
            self._steps[stage.name] = start_step(self.config, stage, self.root)
        return stage.name in self._steps


def chosen(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    """Return the stages that `--only` names, by whole name, set or seed (`hard`, `seed-1`); all without patterns.

    Raises:
        UserError: a pattern that names no stage; the message lists the stages.
    """
    if not patterns:
        return list(stages)
    names: set[str] = set()
    for pattern in patterns:
        named = set(_named_by(pattern, stages))
        if not named:
            raise UserError(
                f"--only {pattern} names no stage, set or seed of this study; its stages are: "
                f"{', '.join(stage.name for stage in stages)}"
            )
        names |= named
    return [stage for stage in stages if stage.name in names]


def _named_by(pattern: str, stages: Sequence[Stage]) -> Iterator[str]:
    return (stage.name for stage in stages if stage.name == pattern or pattern in stage.name.split("/")[:-1])
