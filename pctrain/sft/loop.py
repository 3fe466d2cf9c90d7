"""SFT: batches of expert trajectories through the learner, with an exact validation loss as the control signal."""

from __future__ import annotations

import math
import time
from typing import Any

from pctrain.ceiling.monitor import SURE, Reading
from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.check import schedule_problems
from pctrain.config.tree import Config, ResolvedConfig, SFTConfig
from pctrain.core import Learner
from pctrain.core.session import begin, due, export, finished, leave, open_run, resume, save
from pctrain.data.packing import PackedBatch
from pctrain.data.prefetch import prefetch
from pctrain.data.sampler import ShuffledSampler
from pctrain.data.trajectories import Trajectories
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder
from pctrain.run.names import HF_FOLDER
from pctrain.run.records import read_values
from pctrain.run.stragglers import RankTimes
from pctrain.sft.journal import SFTJournal, TrainedStep
from pctrain.sft.loss import cross_entropy_by_source
from pctrain.sft.open_data import open_trajectories, prepare_sources


def main(config: Config) -> None:
    """Run `pctrain sft`."""
    with begin(config) as prepared, RolloutWorker(prepared) as worker:
        train(prepared, worker)


def train(config: ResolvedConfig, worker: RolloutWorker) -> None:
    """Run or resume the SFT run in `config.run.dir`."""
    sft = config.sft
    longest = min(worker.hf.context, sft.token_budget)
    # What can be refused is refused before there is a run folder, which would be bound to this config.
    training = prepare_sources(config, config.data.train_sources(), longest)
    validation = prepare_sources(config, config.data.validation_sources(), longest)
    test_problems = len(worker.problems) if sft.eval_every else 0
    inputs = [config.data.test_problems()] if sft.eval_every else []
    with open_run(config, "sft", inputs, training.digests | validation.digests) as run:
        if finished(run):
            return
        data = open_trajectories(training, "training")
        held_out = open_trajectories(validation, "validation")
        sampler = ShuffledSampler(data.sizes, sft.batch_size, config.run.seed, data.weights)
        steps = total_steps(sft, sampler)
        learner = Learner(
            config.model, config.parallel, optimizer_config=sft.optimizer, total_steps=steps, seed=config.run.seed
        )
        start, state = resume(run, learner)
        _say_data(run, data, held_out, test_problems)
        journal = SFTJournal(config, run, learner, worker, data, held_out, steps, state)
        if not state:
            journal.validate_and_evaluate_if_due(step=0)

        def make_batch(step: int) -> tuple[list[int], PackedBatch]:
            samples = sampler.indices(step - 1)
            return samples, learner.pack(data.select(samples), sft.token_budget)

        ranks = RankTimes(run)
        token_loss = cross_entropy_by_source(data.names)
        # A run that stopped early may have been killed between its last checkpoint and its end.
        stopped = start > 0 and journal.should_stop()
        last = start
        with progress("SFT", total=steps, start=start, rank=parallel.rank()) as bar:
            for step, (samples, batch), waited in prefetch(make_batch, _remaining(start, steps, stopped)):
                began = time.perf_counter()
                watchdog.at_step(step)
                with watchdog.phase("update"):
                    update = learner.train_step(batch, token_loss, want_entropy=False)
                seconds = time.perf_counter() - began + waited
                journal.record(TrainedStep(step, samples, batch, update, seconds, waited))
                journal.validate_and_evaluate_if_due(step)
                last = step
                stopped = journal.should_stop()
                _save_if_due(run, learner, journal, ranks, step, stopped)
                bar.advance(loss=update.loss)
                if stopped:
                    break
        learner.poll_save(wait=True)
        export(run, learner, worker.encoder.template)
        _finish(run, journal.reading, last, len(data), ranks)


def total_steps(sft: SFTConfig, sampler: ShuffledSampler) -> int:
    """Return the optimizer updates of the run: `sft.steps`, or as many whole batches as cover `sft.epochs` passes.

    UserError if they are too few for the learning rate's schedule.
    """
    if sft.epochs is None:
        return sft.steps
    steps = max(1, math.ceil(sft.epochs * sampler.samples_per_epoch / sft.batch_size))
    problems = list(schedule_problems("sft.optimizer", sft.optimizer, steps))
    if problems:
        epochs = f"sft.epochs = {sft.epochs} of {sampler.samples_per_epoch:g} samples are {steps} steps"
        raise UserError("\n".join([epochs, *problems]))
    return steps


def _remaining(start: int, steps: int, stopped: bool) -> range:
    return range(0) if stopped else range(start + 1, steps + 1)


def _say_data(run: RunFolder, data: Trajectories, held_out: Trajectories, test_problems: int) -> None:
    for purpose, trajectories in (("training", data), ("validation", held_out)):
        for line in trajectories.describe():
            run.say(f"{purpose} data: {line}")
    if test_problems:
        run.say(f"test problems: {test_problems}")


def _save_if_due(
    run: RunFolder, learner: Learner, journal: SFTJournal, ranks: RankTimes, step: int, stopped: bool
) -> None:
    """End a step. Collective. Raises ToBeContinued if the run was asked to stop, after a checkpoint."""
    sft = journal.config.sft
    asked_to_stop = ranks.end_step(step)
    if stopped or asked_to_stop or due(step, sft.checkpoint_every, journal.steps):
        save(run, step, learner, journal.state(step))
    learner.poll_save(wait=asked_to_stop)
    if asked_to_stop:
        leave(run, step)
    if stopped:
        run.say(
            f"step {step}: the validation loss has left the regime {sft.stop_after!r} (sft.stop_after), the run stops"
        )


def _finish(run: RunFolder, reading: Reading, last: int, trajectories: int, ranks: RankTimes) -> None:
    """Write the summary of a run that ended with step `last`, and the command that starts RL from it."""
    summary: dict[str, Any] = {"steps": last, "trajectories": trajectories, "final weights": run.path / HF_FOLDER}
    losses = read_values(run.path, "val", "val_loss") if run.writes else {}
    scores = read_values(run.path, "eval", "score") if run.writes else {}
    speeds = read_values(run.path, "train", "time/tokens_per_second") if run.writes else {}
    if losses:
        lowest = min(losses, key=lambda step: losses[step])
        summary["lowest validation loss"] = f"{losses[lowest]:.4f} at step {lowest}"
        summary["last validation loss"] = losses[max(losses)]
        summary["regime at the end"] = reading.regime
        summary["monitor"] = _conclusion(reading, last)
    if scores:
        summary["last score (%)"] = scores[max(scores)]
    if speeds:
        summary["tokens/s (median)"] = sorted(speeds.values())[len(speeds) // 2]
    summary |= ranks.summary()
    switch_point = last if reading.start is None else reading.start
    start = f"--config {run.path / 'config.yaml'} --model.checkpoint={run.checkpoint_path(switch_point)}"
    run.finish(summary, f"{parallel.launcher()} rl {start} --run.dir={run.path}-rl")


def _conclusion(reading: Reading, last: int) -> str:
    """Return what the monitor concludes about a run that has ended."""
    start = "" if reading.start is None else f"; RL starts from step {reading.start}"
    if reading.passed >= SURE:
        return f"the validation loss has passed its minimum (confidence {reading.passed:.0%}){start}"
    reason = "the loss was still falling at the end" if reading.start == last else "more SFT may lower the loss"
    return (
        "it is not certain that the validation loss has passed its minimum "
        f"(confidence {reading.passed:.0%}): {reason}{start}"
    )
