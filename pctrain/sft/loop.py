"""SFT: batches of expert trajectories through the core, with an exact validation loss as the control signal."""

from __future__ import annotations

import math
import time

from pctrain.ceiling.monitor import SURE, Reading
from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.check import schedule_problems
from pctrain.config.tree import Config
from pctrain.core import Learner
from pctrain.core.session import begin, due, export, finished, leave, open_run, resume, save
from pctrain.data.packing import PackedBatch
from pctrain.data.prefetch import prefetch
from pctrain.data.sampler import ShuffledSampler
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder
from pctrain.run.names import HF_FOLDER
from pctrain.run.records import read_values
from pctrain.run.stragglers import RankTimes
from pctrain.sft.journal import Journal
from pctrain.sft.loss import cross_entropy_by_source
from pctrain.sft.open_data import open_trajectories, prepare_sources


def main(config: Config) -> None:
    """`pctrain sft`."""
    with begin(config) as config, RolloutWorker(config) as worker:
        train(config, worker)


def train(config: Config, worker: RolloutWorker) -> None:
    """Runs, or goes on with, the SFT run of `config.run.dir`."""
    sft, limit = config.sft, min(worker.hf.context, config.sft.token_budget)
    training, validation = (
        prepare_sources(config, sources, limit) for sources in (config.data.train, config.data.validation)
    )
    scored = len(worker.problems) if sft.eval_every else 0  # as the rest of the data before there is a run folder
    with open_run(
        config, "sft", [config.data.test] if sft.eval_every else [], training.digests | validation.digests
    ) as run:
        if finished(run):
            return
        data, held_out = open_trajectories(training, "training"), open_trajectories(validation, "validation")
        sampler = ShuffledSampler(data.sizes, sft.batch_size, config.run.seed, data.weights)
        steps = total_steps(config, sampler)

        learner = Learner(
            config.model, config.parallel, optimizer_config=sft.optimizer, total_steps=steps, seed=config.run.seed
        )
        start, state = resume(run, learner)
        for what, trajectories in (("training", data), ("validation", held_out)):
            for line in trajectories.describe():
                run.say(f"{what} data: {line}")
        if scored:
            run.say(f"test problems: {scored}")
        journal = Journal(config, run, learner, worker, held_out, steps, state)
        if not state:
            journal.measure(step=0)

        def make(step: int) -> tuple[list[int], PackedBatch]:
            chosen = sampler.indices(step - 1)
            return chosen, learner.pack(data.select(chosen), sft.token_budget)

        ranks = RankTimes(run)
        token_loss, last = cross_entropy_by_source(data.names), start
        ahead = (
            range(start + 1, steps + 1) if start == 0 or not journal.should_stop() else range(0)
        )  # killed after its last checkpoint
        with progress("SFT", total=steps, start=start, rank=parallel.rank()) as bar:
            for step, (chosen, batch), waited in prefetch(make, ahead):
                began = time.perf_counter()
                watchdog.at_step(step)
                with watchdog.phase("update"):
                    update = learner.step(batch, token_loss, want_entropy=False)
                journal.record(step, data, chosen, batch, update, time.perf_counter() - began + waited, waited)
                journal.measure(step)
                stop, leaving, last = journal.should_stop(), ranks.end_step(step), step
                if stop or leaving or due(step, sft.checkpoint_every, steps):
                    save(run, step, learner, journal.state(step))
                learner.poll_save(wait=leaving)
                bar.advance(loss=update.loss)
                if leaving:
                    leave(run, step)
                if stop:
                    run.say(
                        f"step {step} the validation loss has left the regime {sft.stop_after!r} (sft.stop_after): stopped"
                    )
                    break
        learner.poll_save(wait=True)
        export(run, learner, worker.encoder.template)
        _finish(run, journal.reading, last, len(data), ranks)


def total_steps(config: Config, sampler: ShuffledSampler) -> int:
    """Optimizer steps of the run: `sft.steps`, or as many whole batches as cover `sft.epochs` passes.

    Raises UserError where they are too few for the learning rate's schedule.
    """
    if config.sft.epochs is None:
        return config.sft.steps
    steps = max(1, math.ceil(config.sft.epochs * sampler.samples_per_epoch / config.sft.batch_size))
    problems = list(schedule_problems("sft.optimizer", config.sft.optimizer, steps))
    if problems:
        epochs = f"sft.epochs = {config.sft.epochs} of {sampler.samples_per_epoch:g} samples are {steps} steps"
        raise UserError("\n".join([epochs, *problems]))
    return steps


def _finish(run: RunFolder, reading: Reading, last: int, trajectories: int, ranks: RankTimes) -> None:
    """`last`: the step that the run ended with; `reading`: the monitor's, of the last validation."""
    summary = {"steps": last, "trajectories": trajectories, "final weights": run.path / HF_FOLDER}
    losses = read_values(run.path, "val", "val_loss") if run.writes else {}
    scores = read_values(run.path, "eval", "score") if run.writes else {}
    if losses:
        best = min(losses, key=losses.get)
        summary |= {
            "lowest validation loss": f"{losses[best]:.4f} at step {best}",
            "last validation loss": losses[max(losses)],
        }
        summary |= {"regime at the end": reading.regime, "monitor": _in_words(reading, last)}
    if scores:
        summary["last score (%)"] = scores[max(scores)]
    speeds = list(read_values(run.path, "train", "time/tokens_per_second").values()) if run.writes else []
    if speeds:
        summary["tokens/s (median)"] = sorted(speeds)[len(speeds) // 2]
    summary |= ranks.summary()
    best = last if reading.start is None else reading.start
    start = f"--config {run.path / 'config.yaml'} --model.checkpoint={run.checkpoint_path(best)}"
    run.finish(summary, f"{parallel.launcher()} rl {start} --run.dir={run.path}-rl")


def _in_words(reading: Reading, last: int) -> str:
    """What the monitor says of a run that has ended."""
    start = "" if reading.start is None else f"; RL starts from step {reading.start}"
    if reading.passed >= SURE:
        return f"the minimum of the validation loss is passed (confidence {reading.passed:.0%}){start}"
    lower = "the loss still fell at the end" if reading.start == last else "more SFT may lower the loss"
    return f"it is not sure that the minimum of the validation loss is passed (confidence {reading.passed:.0%}): {lower}{start}"
