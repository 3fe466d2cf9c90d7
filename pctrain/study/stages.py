"""The stages of a study, what each needs, and where it lies. Nothing is run here, and no torch is imported.

    sft                  SFT on the only set                            hard/sft             SFT on the set `hard`
    rl-stable            RL from its best checkpoint, by rl.algorithm   hard/luffy-stable    by another algorithm
    rl-base              RL without SFT, of run.seed                    seed-1/rl-base       of another seed

rl.algorithm and run.seed are not in the names, so that a plan that grows by algorithms and seeds finds what it has done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pctrain.ceiling import regimes
from pctrain.common.errors import UserError
from pctrain.config.tree import SYNCHRONISED, BuiltIn, Config, ResolvedConfig
from pctrain.run import layout
from pctrain.run.checkpoints import checkpoint_step, list_checkpoints
from pctrain.run.documents import is_finished
from pctrain.run.records import read_values

REPORT = "report"
BASE = "base"  # the start of RL without SFT
State = Literal["done", "left out", "running", "to do"]


@dataclass(frozen=True)
class Stage:
    """A run folder that is to be made. `start`: of RL, a role (early, stable, overfit), `step-N`, or `base`.

    `seed_folder`, `algorithm_folder`: what its path says of seed and algorithm; None where they are the config's own.
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
        """As start.json has it."""
        return self.start if self.start in ("early", "stable", "overfit") else "none"

    def sft_folder(self, root: Path) -> Path:
        """Of the SFT run itself, or of the one that RL starts from."""
        return layout.sft_folder(root, self.set, self.seed_folder)

    def folder(self, root: Path, step: int) -> Path:
        """`step`: that RL starts from (`start_step`)."""
        if self.kind == "sft":
            return self.sft_folder(root)
        return layout.rl_folder(root, step, self.set, self.seed_folder, self.algorithm_folder)


def stages_of(config: Config) -> list[Stage]:
    """All stages but the report, in the order in which one job runs them: a stage follows what it needs."""
    study = config.study
    seeds, sets = study.seeds or [config.run.seed], list(study.sets) or [""]
    runs = _rl_runs(config)
    found: dict[str, Stage] = {}
    for seed in seeds:
        seed_folder = None if seed == config.run.seed else seed
        prefix = f"seed-{seed}/" if seed_folder is not None else ""
        trained = any(start != BASE for _, start in runs) or study.policy == "compare"
        for name in sets:
            sft = Stage(f"{prefix}{name + '/' if name else ''}sft", "sft", name, seed, seed_folder=seed_folder)
            found |= {sft.name: sft} if trained else {}
            for algorithm, start in runs:
                of_set, needs = (name, (sft.name,)) if start != BASE else ("", ())
                algorithm_folder = None if algorithm == config.rl.algorithm else algorithm.replace(":", ".")
                rl = Stage(
                    f"{prefix}{of_set + '/' if of_set else ''}{algorithm_folder or 'rl'}-{start}",
                    "rl",
                    of_set,
                    seed,
                    needs,
                    start,
                    algorithm,
                    seed_folder,
                    algorithm_folder,
                )
                found.setdefault(rl.name, rl)  # RL without SFT is the same for every set
    return list(found.values())


def _rl_runs(config: Config) -> list[tuple[str, str]]:
    """(algorithm, start) of the RL runs of one set and seed."""
    study, every = config.study, list(get_args(BuiltIn))
    if study.policy == "compare":
        algorithms = study.algorithms or every
        pure = [(config.rl.algorithm, BASE)]
        return pure + [(name, BASE if name in SYNCHRONISED else "stable") for name in algorithms]
    algorithms = study.algorithms or [config.rl.algorithm]
    starts = (
        ["stable"]
        if study.policy == "recommended"
        else [f"step-{step}" if step else BASE for step in sorted(study.checkpoints)] or list(study.starts)
    )
    return [(name, start) for start in starts for name in algorithms]


def stage_config(config: ResolvedConfig, stage: Stage, root: Path, step: int) -> ResolvedConfig:
    """What the stage runs with. `config`: of the study, its data and model all named; `step`: that RL starts from."""
    own = config.model_copy(deep=True)
    own.study = type(config.study)()  # the plan may grow; its runs do not know of it
    own.run.dir, own.run.seed = stage.folder(root, step), stage.seed
    own.data.cache = config.data.cache or root / "tokens"  # sets are tokenised once for all their runs
    if stage.set:
        own.data.train = config.study.sets[stage.set]
    if stage.kind == "sft":
        own.run.keep_last = None  # RL starts from any of its checkpoints
        if config.study.policy == "recommended" and own.sft.stop_after == "never":
            own.sft.stop_after = "stable"
        return own
    own.rl.algorithm = stage.algorithm
    if step:
        own.model.checkpoint = stage.sft_folder(root) / "checkpoints" / f"step-{step}"
    return own


def start_step(config: Config, stage: Stage, root: Path) -> int | None:
    """The SFT step that a stage of RL starts from, by the regimes of the finished SFT run; None: its regime did not occur."""
    if stage.kind == "sft" or stage.start == BASE:
        return 0
    sft = stage.sft_folder(root)
    checkpoints = [checkpoint_step(path) for path in list_checkpoints(sft)]
    if stage.role == "none":
        step = int(stage.start.removeprefix("step-"))
        return step if step in checkpoints else None
    losses = read_values(sft, "val", "val_loss")
    return regimes.starts(
        list(losses), list(losses.values()), checkpoints, config.ceiling.delta, config.ceiling.delta2
    )[stage.role]


class OnDisk:
    """What has become of the stages: a function of what lies in the study's folder."""

    def __init__(self, config: Config, root: Path):
        self.config, self.root = config, root
        self._steps: dict[str, int | None] = {}  # of RL whose SFT has ended: that does not change any more

    def ended(self, stage: Stage) -> State:
        """`done`; `left out` where the regime that RL was to start from did not occur; else `to do`."""
        if not self._known(stage):
            return "to do"
        folder = self.folder(stage)
        if folder is None:
            return "left out"
        return "done" if is_finished(folder) else "to do"

    def folder(self, stage: Stage) -> Path | None:
        """None as long as nobody knows which step RL starts from, and where it is left out."""
        step = self._steps[stage.name] if self._known(stage) else None
        return None if step is None else stage.folder(self.root, step)

    def _known(self, stage: Stage) -> bool:
        if stage.name not in self._steps and (not stage.needs or is_finished(stage.sft_folder(self.root))):
            self._steps[stage.name] = start_step(self.config, stage, self.root)
        return stage.name in self._steps


def chosen(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    """Those that `--only` names: whole names, or names of sets, or of seeds (`hard`, `seed-1`). All where there are no patterns.

    UserError naming the stages there are, where one names none.
    """
    found = {}
    for pattern in patterns:
        mine = [stage for stage in stages if stage.name == pattern or pattern in stage.name.split("/")[:-1]]
        if not mine:
            raise UserError(
                f"--only {pattern} names no stage, set or seed of this study; its stages are: "
                f"{', '.join(stage.name for stage in stages)}"
            )
        found |= {stage.name: stage for stage in mine}
    return [stage for stage in stages if stage.name in found] if patterns else list(stages)
