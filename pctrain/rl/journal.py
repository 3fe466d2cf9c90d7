"""What an RL run writes down of each step: metrics, rollouts with their advantages, a line for the log, scores."""

from __future__ import annotations

from collections import Counter

from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config
from pctrain.core import Learner
from pctrain.core.skipped import SkippedUpdates
from pctrain.distributed import parallel
from pctrain.report.reading import fit_run
from pctrain.reward import fault_line
from pctrain.rl.sampling import Sampled, summary
from pctrain.rl.update import Updates, means
from pctrain.rollout import Swap
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder


class Journal:
    """Every rank holds one; rank 0 writes. `state` is what a checkpoint keeps of it beside the prompts."""

    def __init__(self, config: Config, run: RunFolder, worker: RolloutWorker, joint: dict, state: dict):
        """`joint`: start.json. `state`: of the checkpoint that the run goes on from; {} at the start."""
        self.config, self.run, self.worker = config, run, worker
        self.ledger = Ledger(worker.hf.shape, joint["eflops_sft"], parallel.world_size(), config.parallel.recompute)
        if state:
            self.ledger.load_state_dict(state["ledger"])
        self.skipped = SkippedUpdates(config.rl.optimizer.max_skipped, state.get("skipped_in_a_row", 0))

    def state(self, step: int) -> dict:
        return {"step": step, "ledger": self.ledger.state_dict(), "skipped_in_a_row": self.skipped.in_a_row}

    def record(self, step: int, sampled: Sampled, updates: Updates, swap: Swap | None, update_seconds: float) -> dict:
        """One step; returns its metrics. `swap`: None where the step's rollouts were on the disk already."""
        tokens = sum(len(c.token_ids) for group in sampled.groups for c in group.completions)
        values = {
            **self._axes(),
            **summary(sampled),
            **means(updates.made),
            **({"time/swap_bytes": swap.bytes, "time/swap_seconds": swap.seconds} if swap else {}),
            "time/rollout_seconds": sampled.rollout_seconds,
            "time/rollout_tokens_per_second": tokens / max(sampled.rollout_seconds, 1e-9),
            "time/reward_seconds": sampled.reward_seconds,
            "time/update_seconds": update_seconds,
        }
        self.run.record(step, "train", values)
        self.run.write_rollouts(step, self._rollouts(sampled, updates))
        self.run.log(self._line(step, values, sampled))
        if faults := fault_line([verdict for group in sampled.groups for verdict in group.verdicts]):
            self.run.log(f"step {step} {faults}")
        for one, ids in zip(updates.made, updates.ids, strict=True):
            self.skipped.add(one, step, ids)
        return values

    def score(self, step: int, learner: Learner) -> None:
        """Collective. The accuracy on the test problems."""
        score = self.worker.score(learner)
        self.ledger.add(step, "evaluation", score.lengths, score.seconds)
        self.run.record(step, "eval", {**self._axes(), **score.metrics()})
        self.run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")
        if score.faults:
            self.run.log(f"step {step} evaluation: {score.faults}")

    def ceiling_found(self) -> bool:
        """Collective. Whether the ceiling is identified as closely as `rl.stop_within` asks, by the scores so far."""
        within = self.config.rl.stop_within
        if within is None or not self.ledger.eflops_rl:
            return False

        def found() -> bool:
            fit = fit_run(self.run.path)
            return (
                fit.verdict == "identified" and max(fit.a_post_high - fit.a_post, fit.a_post - fit.a_post_low) <= within
            )

        return parallel.from_rank_zero(found)

    def _axes(self) -> dict[str, float]:
        return {"eflops_sft": self.ledger.eflops_sft, "eflops_rl": self.ledger.eflops_rl}

    def _rollouts(self, sampled: Sampled, updates: Updates) -> list[dict]:
        decode = self.worker.tokenizer.decode
        why = {id(group): reason for group, reason in sampled.dropped}
        rows = []
        for number, group in enumerate(sampled.groups):
            advantages = updates.advantages.get(id(group), [None] * len(group.completions))
            for prefix, completion, verdict, advantage in zip(
                group.prefixes, group.completions, group.verdicts, advantages, strict=True
            ):
                rows.append({
                    "id": group.problem.id,
                    "group": number,
                    "prompt": group.problem.prompt,
                    **({"prefix": decode(prefix)} if prefix else {}),
                    "response": decode(completion.token_ids),
                    "answer": group.problem.answer,
                    "reward": verdict.reward,
                    "cause": verdict.cause,
                    "advantage": advantage,
                    "tokens": len(completion.token_ids),
                    "finish": completion.finish,
                    "kept": id(group) not in why,
                    "why": why.get(id(group), ""),
                })  # fmt: skip
        return rows

    def _line(self, step: int, values: dict, sampled: Sampled) -> str:
        line = f"step {step} reward {values['reward']:.3f} length {values['response_length']:.1f}"
        line += f" kept {len(sampled.kept)} rounds {sampled.rounds}"
        if "loss" in values:
            line += f" loss {values['loss']:.4f} grad_norm {values['grad_norm']:.3f} entropy {values['entropy']:.3f}"
        if len(sampled.kept) < self.config.rl.prompts:
            line += f" | {shortage(sampled, self.config.rl.prompts)}"
        return line


def shortage(sampled: Sampled, wanted: int) -> str:
    """What dynamic sampling found where it did not fill the batch."""
    found = ", ".join(f"{count} {reason}" for reason, count in Counter(why for _, why in sampled.dropped).most_common())
    return f"only {len(sampled.kept)} of {wanted} prompts were kept in {sampled.rounds} rounds ({found or 'nothing was dropped'})"
