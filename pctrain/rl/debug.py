"""Half a step at a time: `pctrain rl --debug-rollout-only` samples, `--debug-train-only FILE` trains on the sample."""

from __future__ import annotations

import time
from pathlib import Path

from pctrain.config.tree import Config
from pctrain.core.session import begin
from pctrain.distributed import parallel
from pctrain.rl import replay
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.batch import make_batch
from pctrain.rl.groups import Sampled
from pctrain.rl.sampling import GroupSampler
from pctrain.rl.session import build_algorithm, make_learner, open_session
from pctrain.rl.update import Updates, train_on
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder


def sample_only(config: Config) -> None:
    """Sample the groups of the run's next step, write them to its replay file, and stop. Collective."""
    algorithms.find(config.rl.algorithm.name)  # a wrong name is an error before anything is written
    with (
        begin(config) as prepared,
        RolloutWorker(prepared) as worker,
        open_session(prepared, worker, role="none") as session,
    ):
        if session is None:
            return
        step = next(session.remaining_steps(), None)
        if step is None:
            return
        sampled = replay.read_step(session.run, session.prompts, step)
        if sampled is None:
            worker.update_weights(session.learner)
            max_response = prepared.rollout.max_response
            sampler = GroupSampler(
                worker, session.algorithm, prepared.rl, max_response=max_response, seed=prepared.run.seed
            )
            sampled = sampler.sample_groups(session.prompts, step)
            replay.write_step(session.run, session.prompts, step, sampled)
        _say_where(session.run, sampled, step)


def train_only(config: Config, file: Path) -> None:
    """Make the updates of one step on the rollouts in `file`. No engine starts, nothing is written. Collective."""
    algorithms.find(config.rl.algorithm.name)
    with begin(config) as prepared, RolloutWorker(prepared) as worker:
        rl = prepared.rl
        temperature = prepared.rollout.temperature
        algorithm = build_algorithm(prepared)
        problems, _ = worker.training_problems(algorithm.options.needs_expert)
        learner = make_learner(prepared, algorithm)
        step, sampled, _ = parallel.from_rank_zero(lambda: replay.load(file, problems))
        began = time.perf_counter()
        batch = make_batch(algorithm, sampled.kept, learner, rl, temperature)
        updates = train_on(batch, learner, algorithm, rl, temperature)
        seconds = time.perf_counter() - began
    if parallel.rank() == 0:
        _print_updates(updates)
        print(
            f"step {step} of {file}: {len(updates.made)} update(s) on {len(sampled.kept)} prompts in {seconds:.2f} s; "
            "nothing was written"
        )


def _say_where(run: RunFolder, sampled: Sampled, step: int) -> None:
    """Say where the rollouts are, and what can be done with them."""
    path = replay.path_of(run.path, step)
    run.say(
        f"step {step} rollouts only: {len(sampled.completions)} rollouts of {len(sampled.groups)} prompts, reward "
        f"{sampled.mean_reward:.3f}: {path}"
    )
    run.say(
        f"to train on them: pctrain rl --config {run.path / 'config.yaml'} --debug-train-only {path}; to continue the "
        "run: the same command without --debug-rollout-only"
    )


def _print_updates(updates: Updates) -> None:
    for number, made in enumerate(updates.made, start=1):
        update = made.update
        metrics = " ".join(f"{name} {value:.6g}" for name, value in update.metrics.items())
        print(
            f"update {number} of {len(updates.made)}: loss {update.loss:.6g} grad_norm {update.grad_norm:.6g} "
            f"lr {update.lr:.3g} {metrics}"
        )
