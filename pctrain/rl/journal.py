"""The record of an RL run: for each step its ledger entries, metrics, rollouts, log line and scores."""

from __future__ import annotations

from typing import Any

from pctrain.compute.ledger import Ledger
from pctrain.config.tree import ParallelConfig, RLConfig
from pctrain.core import Learner
from pctrain.core.session import record_ledger
from pctrain.core.skipped import SkippedUpdates
from pctrain.distributed import parallel
from pctrain.report.reading import fit_run
from pctrain.reward import fault_line
from pctrain.rl import costs
from pctrain.rl.batch import Batch
from pctrain.rl.groups import Sampled
from pctrain.rl.update import Updates, mean_metrics
from pctrain.rollout import WeightUpdate
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder


class RLJournal:
    """The record of an RL run. Every rank holds one; rank 0 writes. A checkpoint stores its `state`."""

    def __init__(
        self,
        rl: RLConfig,
        layout: ParallelConfig,
        run: RunFolder,
        worker: RolloutWorker,
        eflops_sft: float,
        state: dict,
    ):
        """Open the journal.

        Args:
            rl: the section of the config.
            layout: its `recompute` is part of the exact FLOPs.
            run: the run folder.
            worker: evaluates, and decodes tokens.
            eflops_sft: compute of SFT up to the switch point.
            state: from the checkpoint that the run resumes from; {} at the start.
        """
        self.rl = rl
        self.run = run
        self.worker = worker
        self.ledger = Ledger(worker.hf.shape, eflops_sft, parallel.world_size(), layout.recompute)
        if state:
            self.ledger.load_state_dict(state["ledger"])
        self.skipped = SkippedUpdates(rl.optimizer.max_skipped, state.get("skipped_in_a_row", 0))

    def state(self, step: int) -> dict:
        """Return what a checkpoint stores."""
        return {"step": step, "ledger": self.ledger.state_dict(), "skipped_in_a_row": self.skipped.in_a_row}

    def record(
        self, step: int, sampled: Sampled, batch: Batch, updates: Updates, weight_update: WeightUpdate | None
    ) -> None:
        """Record one step. `weight_update` is None if the step's rollouts were already on disk.

        UserError if too many updates in a row were skipped.
        """
        costs.add_step(self.ledger, step, sampled, batch, updates)
        metrics = self._metrics(sampled, batch, updates, weight_update)
        self.run.record(step, "train", metrics)
        self.run.write_rollouts(step, self._rollouts(sampled))
        self.run.log(self._line(step, sampled, metrics))
        if faults := fault_line(sampled.verdicts):
            self.run.log(f"step {step} {faults}")
        for made in updates.made:
            self.skipped.add(made.update, step, made.problem_ids)
        if not sampled.kept:
            self.run.say(f"step {step}: no update, {sampled.shortage(self.rl.prompts)}")

    def evaluate(self, step: int, learner: Learner) -> None:
        """Record the accuracy on the test problems. Collective."""
        score = self.worker.evaluate(learner)
        self.ledger.add(step, "evaluation", score.lengths, score.seconds)
        self.run.record(step, "eval", {**self._axes(), **score.metrics()})
        self.run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")
        if score.faults:
            self.run.log(f"step {step} evaluation: {score.faults}")

    def write_ledger(self) -> None:
        """Write the ledger entries that are new since the last call."""
        record_ledger(self.run, self.ledger)

    def ceiling_identified(self) -> bool:
        """Return whether the scores so far identify the ceiling as closely as `rl.stop_within` asks. Collective."""
        within = self.rl.stop_within
        if within is None or not self.ledger.eflops_rl:
            return False
        return parallel.from_rank_zero(lambda: _identified(self.run, within))

    def _axes(self) -> dict[str, float]:
        return {"eflops_sft": self.ledger.eflops_sft, "eflops_rl": self.ledger.eflops_rl}

    def _metrics(
        self, sampled: Sampled, batch: Batch, updates: Updates, weight_update: WeightUpdate | None
    ) -> dict[str, float]:
        metrics = {**self._axes(), **sampled.metrics(), **mean_metrics([made.update for made in updates.made])}
        if weight_update is not None:
            metrics["time/swap_bytes"] = weight_update.bytes
            metrics["time/swap_seconds"] = weight_update.seconds
        metrics["time/rollout_seconds"] = sampled.rollout_seconds
        metrics["time/rollout_tokens_per_second"] = sampled.tokens / max(sampled.rollout_seconds, 1e-9)
        metrics["time/reward_seconds"] = sampled.reward_seconds
        metrics["time/update_seconds"] = batch.seconds + updates.seconds
        return metrics

    def _rollouts(self, sampled: Sampled) -> list[dict[str, Any]]:
        """Return the lines of rollouts/step-N.jsonl."""
        decode = self.worker.tokenizer.decode
        lines: list[dict[str, Any]] = []
        for number, group in enumerate(sampled.groups):
            advantages: list[float | None] = [None] * len(group.completions)
            if group.advantages is not None:
                advantages = [*group.advantages]
            for prefix, completion, verdict, advantage in zip(
                group.prefixes, group.completions, group.verdicts, advantages, strict=True
            ):
                line: dict[str, Any] = {"id": group.problem.id, "group": number, "prompt": group.problem.prompt}
                if prefix:
                    line["prefix"] = decode(prefix)
                line |= {
                    "response": decode(completion.token_ids),
                    "answer": group.problem.answer,
                    "reward": verdict.reward,
                    "cause": verdict.cause,
                    "advantage": advantage,
                    "tokens": len(completion.token_ids),
                    "finish": completion.finish,
                    "kept": group.rejection is None,
                    "why": group.rejection or "",
                }
                lines.append(line)
        return lines

    def _line(self, step: int, sampled: Sampled, metrics: dict[str, float]) -> str:
        line = f"step {step} reward {metrics['reward']:.3f} length {metrics['response_length']:.1f}"
        line += f" kept {len(sampled.kept)} rounds {sampled.rounds}"
        if "loss" in metrics:
            line += f" loss {metrics['loss']:.4f} grad_norm {metrics['grad_norm']:.3f} entropy {metrics['entropy']:.3f}"
        if shortage := sampled.shortage(self.rl.prompts):
            line += f" | {shortage}"
        return line


def _identified(run: RunFolder, within: float) -> bool:
    fit = fit_run(run.path)
    if fit.verdict != "identified":
        return False
    return max(fit.a_post_high - fit.a_post, fit.a_post - fit.a_post_low) <= within
