"""RL: sample with the learner's own weights, verify, update; the same `core.step` as SFT."""

from __future__ import annotations

import time
from pathlib import Path

from pctrain.common.progress import progress
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config, RLConfig
from pctrain.core import Learner
from pctrain.core.session import begin, due, export, finished, leave, open_run, record_ledger, resume, save
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain.rl import replay
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.journal import Journal, shortage
from pctrain.rl.mismatch import correction
from pctrain.rl.sampling import GroupSampler, PromptStream, Sampled
from pctrain.rl.update import update
from pctrain.rollout import Swap
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.checkpoint_state import read_state
from pctrain.run.checkpoints import checkpoint_step
from pctrain.run.folder import RunFolder
from pctrain.run.names import HF_FOLDER
from pctrain.run.records import best_step, read_values
from pctrain.run.stragglers import RankTimes


def main(config: Config, rollout_only: bool = False) -> None:
    """`pctrain rl`."""
    algorithms.find(config.rl.algorithm)  # before anything is written
    with begin(config) as config, RolloutWorker(config) as worker:
        train(config, worker, rollout_only=rollout_only)


def train(config: Config, worker: RolloutWorker, role: str = "none", rollout_only: bool = False) -> None:
    """Runs, or goes on with, the RL run of `config.run.dir`, from `model.checkpoint` or else from the weights of `model.path`.

    `role`: what the start is to a study (early, stable, overfit), for its report. `rollout_only`: ends after the sampling of a step.
    """
    rl = config.rl
    joint = parallel.from_rank_zero(lambda: _joint(config, role))
    algorithm = _algorithm(config)
    problems, left_out = worker.training_problems(algorithm.needs_expert)
    scored = len(
        worker.problems
    )  # before there is a run folder: it would be bound to a config with which they are too long
    with open_run(config, "rl", [config.data.rl, config.data.test, *algorithms.source_files(rl.algorithm)]) as run:
        if finished(run):
            return
        run.write_start(joint)
        learner = _core(config, algorithm)
        run.say(f"problems: {len(problems)} to train on, {scored} to score on")
        if left_out:
            run.say(
                f"{len(left_out)} more are too long and left out (data.overlong = {config.data.overlong}), the first: {left_out[0]}"
            )
        prompts = PromptStream(problems, config.run.seed)
        start, state = resume(run, learner)
        journal = Journal(config, run, worker, joint, state)
        if state:
            prompts.load_state_dict(state["prompts"])
        elif not rollout_only:
            journal.score(0, learner)

        ranks = RankTimes(run)
        last = (
            start if start and journal.ceiling_found() else rl.steps
        )  # killed after the checkpoint that it had stopped at
        with progress(f"RL ({rl.algorithm})", total=rl.steps, start=start, rank=parallel.rank()) as bar:
            for step in range(start + 1, last + 1):
                watchdog.at_step(step)
                sampled, swap = _rollouts(config, run, learner, worker, algorithm, prompts, step)
                if rollout_only:
                    _say_rollouts(run, sampled, step)
                    return
                began = time.perf_counter()
                updates = update(config, learner, algorithm, sampled, journal.ledger, step)
                values = journal.record(step, sampled, updates, swap, time.perf_counter() - began)
                if not sampled.kept:
                    run.say(f"step {step}: no update, {shortage(sampled, rl.prompts)}")
                found = False
                if due(step, rl.eval_every, rl.steps):
                    journal.score(step, learner)
                    found = journal.ceiling_found()
                record_ledger(run, journal.ledger)
                leaving = ranks.end_step(step)
                if found or leaving or due(step, rl.checkpoint_every, rl.steps):
                    save(run, step, learner, {**journal.state(step), "prompts": prompts.state_dict()})
                    parallel.from_rank_zero(lambda: replay.forget(run.path, run.latest_checkpoint()))
                learner.poll_save(wait=leaving)
                bar.advance(reward=values["reward"])
                if leaving:
                    leave(run, step)
                if found:
                    run.say(
                        f"step {step} the ceiling is identified within {rl.stop_within} points (rl.stop_within): stopped"
                    )
                    last = step
                    break
        learner.poll_save(wait=True)
        export(run, learner, worker.encoder.template)
        _finish(run, last, ranks)


def _algorithm(config: Config) -> Algorithm:
    return algorithms.build(_with_correction(config), config.rollout.max_response)


def _core(config: Config, algorithm: Algorithm) -> Learner:
    """With the weights of the start. Collective."""
    rl = config.rl
    learner = Learner(
        config.model,
        config.parallel,
        optimizer_config=rl.optimizer,
        total_steps=rl.steps * rl.updates,
        seed=config.run.seed,
    )
    if "ref_logprob" in algorithm.streams_from_pass:
        learner.keep_reference(rl.reference_offload)  # the weights of the start, also where the run is resumed
    return learner


def _rollouts(
    config: Config,
    run: RunFolder,
    learner: Learner,
    worker: RolloutWorker,
    algorithm: Algorithm,
    prompts: PromptStream,
    step: int,
) -> tuple[Sampled, Swap | None]:
    """The groups of a step: sampled, and written down; or read, where a killed start had sampled them. Collective."""
    path = replay.path_of(run.path, step)
    if parallel.from_rank_zero(path.exists):
        _, sampled, state = parallel.from_rank_zero(lambda: replay.load(path, prompts.problems))
        prompts.load_state_dict(state)
        run.log(f"step {step} its rollouts were sampled before: {path.name}")
        return sampled, None
    swap = worker.load(learner)
    sampled = GroupSampler(config, worker.engine, worker.verifier, worker.tokenizer, algorithm).sample(prompts, step)
    worker.engine.sleep()  # its GPU memory is the learner's until the next swap
    parallel.from_rank_zero(lambda: replay.save(path, step, sampled, prompts.state_dict()))
    return sampled, swap


def _say_rollouts(run: RunFolder, sampled: Sampled, step: int) -> None:
    """`--debug-rollout-only`: where the rollouts are, and what can be done with them."""
    rewards = [reward for group in sampled.groups for reward in group.rewards]
    path = replay.path_of(run.path, step)
    run.say(
        f"step {step} rollouts only: {len(rewards)} of {len(sampled.groups)} prompts, reward {sum(rewards) / len(rewards):.3f}: {path}"
    )
    run.say(
        f"train on them: pctrain rl --config {run.path / 'config.yaml'} --debug-train-only {path}; or go on: the same command without "
        "--debug-rollout-only"
    )


def debug_train(config: Config, file: Path) -> None:
    """`pctrain rl --debug-train-only FILE`: the updates of one step on rollouts that lie in a file. No engine, and nothing is written."""
    algorithms.find(config.rl.algorithm)
    with begin(config) as config, RolloutWorker(config) as worker:
        algorithm = _algorithm(config)
        problems, _ = worker.training_problems(algorithm.needs_expert)
        learner = _core(config, algorithm)
        step, sampled, _ = parallel.from_rank_zero(lambda: replay.load(file, problems))
        ledger = Ledger(worker.hf.shape)
        began = time.perf_counter()
        made = update(config, learner, algorithm, sampled, ledger, step).made
        seconds = time.perf_counter() - began
    if parallel.rank() == 0:
        for number, one in enumerate(made, start=1):
            metrics = " ".join(f"{name} {value:.6g}" for name, value in one.metrics.items())
            print(
                f"update {number} of {len(made)}: loss {one.loss:.6g} grad_norm {one.grad_norm:.6g} lr {one.lr:.3g} {metrics}"
            )
        print(
            f"step {step} of {file}: {len(made)} update(s) of {len(sampled.kept)} prompts in {seconds:.2f} s; nothing was written"
        )


def _with_correction(config: Config) -> RLConfig:
    """`rl.is_correction` as it comes out for the model's dtype."""
    return config.rl.model_copy(update={"is_correction": correction(config.rl.is_correction, config.model.dtype)})


def _joint(config: Config, role: str) -> dict:
    """start.json: where this run leaves SFT, and what SFT had cost by then."""
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        return {"start_step": 0, "role": role, "sft_run": None, "eflops_sft": 0.0}
    path = Path(checkpoint)
    state = read_state(path)
    ledger = Ledger(HFConfig.read(config.model.path).shape)
    ledger.load_state_dict(state["ledger"])
    return {
        "start_step": checkpoint_step(path),
        "role": role,
        "sft_run": str(path.parent.parent),
        "eflops_sft": ledger.eflops_sft,
    }


def _finish(run: RunFolder, last: int, ranks: RankTimes) -> None:
    """`last`: the step that the run ended with."""
    scores = read_values(run.path, "eval", "score") if run.writes else {}
    summary = {"steps": last, "score before RL (%)": scores.get(0), "score after RL (%)": scores.get(last)}
    if scores:
        summary["best score (%)"] = f"{max(scores.values()):.4g} at step {max(scores, key=scores.get)}"
        summary["best checkpoint"] = run.checkpoint_path(best_step(run.path, "rl"))
    summary["final weights"] = run.path / HF_FOLDER
    summary |= ranks.summary()
    run.finish(summary, f"pctrain report {run.path}")
