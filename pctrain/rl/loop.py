"""RL: sample with the learner's own weights, score, train. docs/rl_step.md follows a prompt through one step."""

from __future__ import annotations

from pctrain.common.progress import progress
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.core.session import begin
from pctrain.distributed import parallel
from pctrain.rl import replay
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.batch import make_batch
from pctrain.rl.sampling import GroupSampler
from pctrain.rl.session import open_session
from pctrain.rl.update import train_on
from pctrain.rollout.worker import RolloutWorker


def main(config: Config) -> None:
    """Run `pctrain rl`."""
    algorithms.find(config.rl.algorithm.name)  # a wrong name is an error before anything is written
    with begin(config) as prepared, RolloutWorker(prepared) as worker:
        train(prepared, worker)


def train(config: ResolvedConfig, worker: RolloutWorker, role: str = "none") -> None:
    """Run or resume the RL run in `config.run.dir`, from `model.checkpoint` or else from the weights of `model.path`.

    `role` says what the start is to a study (early, stable, overfit), for its report.
    """
    rl = config.rl
    temperature = config.rollout.temperature
    with open_session(config, worker, role) as session:
        if session is None:
            return  # it had already finished
        learner = session.learner
        algorithm = session.algorithm
        max_response = config.rollout.max_response
        sampler = GroupSampler(worker, algorithm, rl, max_response=max_response, seed=config.run.seed)
        if not session.resumed:
            session.journal.evaluate(0, learner)

        with progress(f"RL ({rl.algorithm.name})", rl.steps, start=session.last_step, rank=parallel.rank()) as bar:
            for step in session.remaining_steps():
                weight_update = None
                sampled = replay.read_step(session.run, session.prompts, step)  # from before a kill
                if sampled is None:
                    weight_update = worker.update_weights(learner)
                    sampled = sampler.sample_groups(session.prompts, step)  # generate, score, select
                    replay.write_step(session.run, session.prompts, step, sampled)

                batch = make_batch(algorithm, sampled.kept, learner, rl, temperature)
                updates = train_on(batch, learner, algorithm, rl, temperature)
                session.journal.record(step, sampled, batch, updates, weight_update)
                session.evaluate_and_save_if_due(step)
                bar.advance(reward=sampled.mean_reward)
        session.finish()
