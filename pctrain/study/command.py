"""Run a study: SFT, RL from its checkpoints, ceilings, report. Every stage is a run folder that resumes after any stop.

`stages.py` says which stages there are, `jobs.py` which one a job does next; this module runs them. docs/study.md is
the guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pctrain.common.errors import ToBeContinued, UserError
from pctrain.common.progress import make_console
from pctrain.config.tree import Config, DataConfig, ResolvedConfig
from pctrain.core.session import asked_to_stop, begin
from pctrain.data.records import Fault
from pctrain.data.sources import iter_records, list_files
from pctrain.distributed import parallel
from pctrain.files.lock import try_lock
from pctrain.report import command as report
from pctrain.report.answers import answers
from pctrain.report.reading import read_study
from pctrain.rl import loop as rl
from pctrain.rl.algorithms.registry import find
from pctrain.rollout.worker import RolloutWorker
from pctrain.sft import loop as sft
from pctrain.study.cost import print_plan
from pctrain.study.jobs import Crew, lock_file
from pctrain.study.stages import REPORT, OnDisk, Stage, algorithm_of, chosen, stage_config, stages_of, start_step

SAMPLE = 1000  # records of data.rl read before anything runs, if they need an expert's trajectory


def main(config: Config, only: Sequence[str] = (), dry_run: bool = False) -> None:
    """Run `pctrain run`.

    Args:
        config: the checked config of the study.
        only: names of stages, sets or seeds that this job runs; all if empty.
        dry_run: print the plan and its cost, and write nothing.
    """
    root, stages = Path(config.run.dir), stages_of(config)
    mine = chosen(stages, only)
    _check_inputs(config, stages)
    disk = OnDisk(config, root)
    crew = Crew(root, stages, mine, disk.ended, _say)
    if dry_run:
        print_plan(config, crew, disk, counts=True)
        return
    with begin(_with_all_sets(config)) as resolved, RolloutWorker(resolved) as worker:
        parallel.from_rank_zero(lambda: print_plan(resolved, crew, disk))
        while (stage := _take(crew)) is not None:
            try:
                _run(resolved, root, stage, worker)
            finally:
                if parallel.rank() == 0:
                    crew.done()
        if asked_to_stop():
            raise ToBeContinued(f"to be continued: {root} was asked to stop; the same command resumes it")
        parallel.from_rank_zero(lambda: _conclude(root, crew))


def _run(config: ResolvedConfig, root: Path, stage: Stage, worker: RolloutWorker) -> None:
    """Run or resume one stage. Collective."""
    step = parallel.from_rank_zero(lambda: _known_start(config, stage, root))
    own = stage_config(config, stage, root, step)
    if stage.kind == "sft":
        sft.train(own, worker)
    else:
        rl.train(own, worker, stage.role)


def _known_start(config: ResolvedConfig, stage: Stage, root: Path) -> int:
    step = start_step(config, stage, root)
    if step is None:
        raise RuntimeError(f"stage {stage.name} has no checkpoint to start from, yet it was claimed")
    return step


def _take(crew: Crew) -> Stage | None:
    """Claim the next stage, and return it on every rank. Collective."""
    parallel.follow_rank_zero(crew.take)
    return parallel.from_rank_zero(lambda: crew.claim.stage if crew.claim is not None else None)


# ---- before the first stage ------------------------------------------------------------------------------------------


def _check_inputs(config: Config, stages: Sequence[Stage]) -> None:
    """Check that every file and algorithm exists, and that problems have trajectories if an algorithm needs them."""
    data = config.data
    for sources in (data.train, data.validation, *config.study.sets.values()):
        for source in sources or []:
            list_files(source.path)
    for path in (data.rl, data.test):
        if path is not None:
            list_files(path)
    names = {stage.algorithm for stage in stages if stage.kind == "rl"}
    for name in names:
        find(name)
    with_experts = sorted(name for name in names if algorithm_of(config, name).needs_expert)
    if with_experts and data.rl is not None:
        _check_experts(data, data.rl, with_experts)


def _check_experts(data: DataConfig, problems: Path, algorithms: Sequence[str]) -> None:
    for record in islice(iter_records(problems, data.fields, ("answer", "response")), SAMPLE):
        if isinstance(record, Fault):
            raise UserError(
                f"{record.where}: {record.message} ({', '.join(algorithms)} learn from an expert's trajectory for "
                "every problem of data.rl; name other study.algorithms, or give problems with responses)"
            )


def _with_all_sets(config: Config) -> Config:
    """Return a copy with all sets as `data.train`: a tokenizer that is still to be made is trained on all of them."""
    config = config.model_copy(deep=True)
    if config.study.sets:
        config.data.train = [source for sources in config.study.sets.values() for source in sources]
    return config


# ---- after the last stage --------------------------------------------------------------------------------------------


def _conclude(root: Path, crew: Crew) -> None:
    """Write the report if this job ends last; otherwise say who still runs what."""
    for stage in crew.stages:
        if crew.ended(stage) == "left out":
            _say(
                f"{stage.name}: left out, because no checkpoint of {stage.sft_folder(root)} is in the regime of the "
                f"{stage.start!r} start"
            )
    if not crew.all_ended:
        states = [(stage.name, *crew.state(stage)) for stage in crew.stages]
        left = [f"{name} ({who or state})" for name, state, who in states if state in ("running", "to do")]
        _say(f"not run by this job: {', '.join(left)}. The last job to end writes the report")
        return
    if not any(stage.kind == "rl" and crew.ended(stage) == "done" for stage in crew.stages):
        raise UserError(
            f"{root}: no checkpoint is in a regime that study.starts names, so no RL was run; raise sft.steps, lower "
            "sft.checkpoint_every, or name other starts"
        )
    release = try_lock(lock_file(root, REPORT))
    if release is None:
        return  # another job ended at the same moment and writes it
    try:
        report.main(root)
        print_answers(root)
    finally:
        release()


def print_answers(root: Path) -> None:
    """Print the study's answers, and what to look at next."""
    console = make_console()
    for answer in answers(read_study(root)):
        console.print(answer.question, style="bold", markup=False)
        console.print(f"  {answer.text}", markup=False, highlight=False)
    console.print("Next:", style="bold")
    console.print(
        f"  pctrain fit {root} --out {root / 'report' / 'fits.json'}   # the ceilings as a table and as JSON",
        soft_wrap=True,
        markup=False,
    )


def _say(line: str) -> None:
    make_console().print(line, markup=False, highlight=False, soft_wrap=True)
