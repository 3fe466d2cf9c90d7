"""An RL run that is open: what its steps work on, and everything around them (resume, evaluation, checkpoints, end)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pctrain.compute.ledger import Ledger
from pctrain.config.tree import ResolvedConfig
from pctrain.core import Learner
from pctrain.core.session import due, export, finished, leave, open_run, resume, save
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain.rl import replay
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.journal import RLJournal
from pctrain.rl.mismatch import correction
from pctrain.rl.prompts import PromptStream
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.checkpoint_state import read_state
from pctrain.run.checkpoints import checkpoint_step
from pctrain.run.folder import RunFolder
from pctrain.run.names import HF_FOLDER
from pctrain.run.records import best_step, read_values
from pctrain.run.stragglers import RankTimes


@dataclass
class Session:
    """An open RL run. `last_step` is the last one that has ended."""

    config: ResolvedConfig
    run: RunFolder
    worker: RolloutWorker
    learner: Learner
    algorithm: Algorithm
    prompts: PromptStream
    journal: RLJournal
    ranks: RankTimes
    last_step: int
    resumed: bool
    ceiling_identified: bool

    def remaining_steps(self) -> Iterator[int]:
        """Yield the steps that are left, until `rl.steps` or until `rl.stop_within` is met."""
        for step in range(self.last_step + 1, self.config.rl.steps + 1):
            if self.ceiling_identified:
                return
            watchdog.at_step(step)
            yield step
            self.last_step = step

    def evaluate_and_save_if_due(self, step: int) -> None:
        """End a step. Collective. Raises ToBeContinued if the run was asked to stop, after a checkpoint."""
        rl = self.config.rl
        if due(step, rl.eval_every, rl.steps):
            self.journal.evaluate(step, self.learner)
            self.ceiling_identified = self.journal.ceiling_identified()
        self.journal.write_ledger()
        asked_to_stop = self.ranks.end_step(step)
        if self.ceiling_identified or asked_to_stop or due(step, rl.checkpoint_every, rl.steps):
            save(self.run, step, self.learner, {**self.journal.state(step), "prompts": self.prompts.state_dict()})
            parallel.from_rank_zero(lambda: replay.delete_covered(self.run.path, self.run.latest_checkpoint()))
        self.learner.poll_save(wait=asked_to_stop)
        if asked_to_stop:
            leave(self.run, step)
        if self.ceiling_identified:
            self.run.say(
                f"step {step}: the ceiling is identified within {rl.stop_within} points (rl.stop_within), the run stops"
            )

    def finish(self) -> None:
        """Write the final weights and the summary. Collective."""
        self.learner.poll_save(wait=True)
        export(self.run, self.learner, self.worker.encoder.template)
        self.run.finish(self._summary(), f"pctrain report {self.run.path}")

    def _summary(self) -> dict[str, Any]:
        scores = read_values(self.run.path, "eval", "score") if self.run.writes else {}
        summary: dict[str, Any] = {
            "steps": self.last_step,
            "score before RL (%)": scores.get(0),
            "score after RL (%)": scores.get(self.last_step),
        }
        if scores:
            best = max(scores, key=lambda step: scores[step])
            summary["best score (%)"] = f"{scores[best]:.4g} at step {best}"
        best_saved = best_step(self.run.path, "rl") if scores else None
        if best_saved is not None:
            summary["best checkpoint"] = self.run.checkpoint_path(best_saved)
        summary["final weights"] = self.run.path / HF_FOLDER
        return summary | self.ranks.summary()


@contextmanager
def open_session(config: ResolvedConfig, worker: RolloutWorker, role: str) -> Iterator[Session | None]:
    """Open the RL run of `config.run.dir`, new or resumed; None if it had already finished. Collective.

    `role` says what the start is to a study (early, stable, overfit), for its report.
    """
    rl = config.rl
    # What can be refused is refused before there is a run folder, which would be bound to this config.
    start = parallel.from_rank_zero(lambda: _switch_point(config, role))
    algorithm = build_algorithm(config)
    problems, dropped = worker.training_problems(algorithm.options.needs_expert)
    test_problems = len(worker.problems)
    inputs = [config.data.rl_problems(), config.data.test_problems(), *algorithms.source_files(rl.algorithm.name)]
    with open_run(config, "rl", inputs) as run:
        if finished(run):
            yield None
            return
        run.write_start(start)
        learner = make_learner(config, algorithm)
        run.say(f"problems: {len(problems)} to train on, {test_problems} to score on")
        if dropped:
            run.say(
                f"{len(dropped)} more problems are too long and were dropped (data.overlong = {config.data.overlong}); "
                f"the first: {dropped[0]}"
            )
        prompts = PromptStream(problems, config.run.seed)
        first, state = resume(run, learner)
        if state:
            prompts.load_state_dict(state["prompts"])
        journal = RLJournal(rl, config.parallel, run, worker, start["eflops_sft"], state)
        yield Session(
            config,
            run,
            worker,
            learner,
            algorithm,
            prompts,
            journal,
            RankTimes(run),
            last_step=first,
            resumed=bool(state),
            # A run that stopped early may have been killed between its last checkpoint and its end.
            ceiling_identified=first > 0 and journal.ceiling_identified(),
        )


def build_algorithm(config: ResolvedConfig) -> Algorithm:
    """Return the run's algorithm, with `is_correction` resolved for the model's dtype."""
    algorithm = algorithms.build(config.rl, config.rollout.max_response)
    is_correction = correction(algorithm.options.is_correction, config.model.dtype)
    return replace(algorithm, options=algorithm.options.model_copy(update={"is_correction": is_correction}))


def make_learner(config: ResolvedConfig, algorithm: Algorithm) -> Learner:
    """Return the learner with the weights that RL starts from, and the reference if there is a KL. Collective."""
    rl = config.rl
    learner = Learner(
        config.model,
        config.parallel,
        optimizer_config=rl.optimizer,
        total_steps=rl.steps * rl.updates,
        seed=config.run.seed,
    )
    if "ref_logprob" in algorithm.streams_from_pass:
        learner.keep_reference(rl.reference_offload)  # the start weights, also when the run is resumed
    return learner


def _switch_point(config: ResolvedConfig, role: str) -> dict[str, Any]:
    """Return start.json: where this run leaves SFT, and what SFT had cost by then."""
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        return {"start_step": 0, "role": role, "sft_run": None, "eflops_sft": 0.0}
    path = Path(checkpoint)
    ledger = Ledger(HFConfig.read(config.model.path).shape)
    ledger.load_state_dict(read_state(path)["ledger"])
    return {
        "start_step": checkpoint_step(path),
        "role": role,
        "sft_run": str(path.parent.parent),
        "eflops_sft": ledger.eflops_sft,
    }
