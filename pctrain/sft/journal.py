"""What an SFT run writes down of itself, and what it concludes from it: metrics, ledger, loss spikes, monitor, when to stop."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pctrain.ceiling.monitor import Monitor, Reading
from pctrain.compute import flops
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config
from pctrain.core import Learner
from pctrain.core.learner import Update
from pctrain.core.peak import peak_flops
from pctrain.core.session import due, record_ledger
from pctrain.core.skipped import SkippedUpdates
from pctrain.data.packing import PackedBatch
from pctrain.data.trajectories import Trajectories
from pctrain.distributed import parallel
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder
from pctrain.sft.loss import of_sources
from pctrain.sft.spikes import Spikes
from pctrain.sft.validation import validation_loss


class Journal:
    """Every rank holds one and comes to the same conclusions; rank 0 writes. `state` is what a checkpoint keeps of it."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        learner: Learner,
        worker: RolloutWorker,
        held_out: Trajectories,
        steps: int,
        state: dict,
    ):
        """`steps`: optimizer steps in all. `state`: of the checkpoint that the run goes on from; {} at the start."""
        self.config, self.run, self.learner, self.worker, self.held_out, self.steps = (
            config,
            run,
            learner,
            worker,
            held_out,
            steps,
        )
        self.ledger = Ledger(worker.hf.shape, ranks=parallel.world_size(), recompute=config.parallel.recompute)
        if state:
            self.ledger.load_state_dict(state["ledger"])
        self.skipped = SkippedUpdates(config.sft.optimizer.max_skipped, state.get("skipped_in_a_row", 0))
        self.spikes = Spikes(state.get("recent_losses"))
        self.validations: list[list] = state.get("validations", [])  # the arguments of Monitor.add, of each
        self.monitor = Monitor(config.ceiling.delta, config.ceiling.delta2)
        self.reading: Reading | None = None  # after the last validation
        for validation in self.validations:
            self.reading = self.monitor.add(*validation)
        self._peak = peak_flops(config.model.dtype) * parallel.world_size()
        run.log(
            f"fastest matrix product {self._peak / parallel.world_size() / 1e9:.4g} GFLOP/s a rank; time/mfu is a share of it"
        )

    def state(self, step: int) -> dict:
        return {
            "step": step,
            "ledger": self.ledger.state_dict(),
            "skipped_in_a_row": self.skipped.in_a_row,
            "recent_losses": self.spikes.state(),
            "validations": self.validations,
        }

    def record(
        self,
        step: int,
        data: Trajectories,
        chosen: Sequence[int],
        batch: PackedBatch,
        update: Update,
        seconds: float,
        waited: float,
    ) -> None:
        """One training step. `chosen`: its samples; `waited`: seconds of `seconds` in which the next batch was not ready yet."""
        self.ledger.add(step, "sft_update", data.lengths[chosen], seconds)
        spike = self.spikes.add(update.loss)
        speed, mfu = (
            batch.tokens / seconds,
            flops.exact_training(self.worker.hf.shape, data.lengths[chosen]) / seconds / self._peak,
        )
        own = [int(data.loss_tokens[chosen][data.source[chosen] == number].sum()) for number in range(len(data.names))]
        self.run.record(
            step,
            "train",
            {
                **self._axis(),
                "loss": update.loss,
                **of_sources(update.metrics, data.names, own),
                "grad_norm": update.grad_norm,
                "lr": update.lr,
                "skipped_updates": int(update.skipped),
                "loss_spike": int(spike),
                "tokens": batch.tokens,
                "loss_tokens": batch.loss_tokens,
                "padding_share": 1 - batch.tokens / batch.positions,
                "time/step_seconds": seconds,
                "time/data_seconds": waited,
                "time/tokens_per_second": speed,
                "time/mfu": mfu,
            },
        )
        flags = f"{' | update skipped' if update.skipped else ''}{' | LOSS SPIKE' if spike else ''}"
        self.run.log(
            f"step {step} loss {update.loss:.4f} grad_norm {update.grad_norm:.3f} lr {update.lr:.2e} tokens {batch.tokens} "
            f"{speed:.0f} tokens/s mfu {mfu:.1%} padding {1 - batch.tokens / batch.positions:.1%}{flags}"
        )
        if spike:
            self.run.log(f"step {step} its samples: {', '.join(data.id(i) for i in chosen)}")
        self.skipped.add(update, step, [data.id(i) for i in chosen] if update.skipped else [])

    def measure(self, step: int) -> None:
        """Collective. Validation loss with its regime, and score, where due; step 0 is the untrained model.

        A checkpoint is validated too: RL may start from it.
        """
        sft = self.config.sft
        if due(step, sft.val_every, self.steps) or due(step, sft.checkpoint_every, self.steps):
            began = time.perf_counter()
            val = validation_loss(self.learner, self.held_out, sft.token_budget)
            self.ledger.add(step, "validation", self.held_out.lengths, time.perf_counter() - began)
            saved = step > 0 and due(step, sft.checkpoint_every, self.steps)
            self.validations.append([step, self.ledger.eflops_sft, val.whole.loss, val.whole.se, saved])
            self.reading = self.monitor.add(*self.validations[-1])
            self.run.record(step, "val", {**self._axis(), **val.metrics(), **self.reading.metrics()})
            self.run.log(f"step {step} val_loss {val.whole.loss:.5f} +- {val.whole.se:.5f} {self.reading.line()}")
        if due(step, sft.eval_every, self.steps):
            score = self.worker.score(self.learner)
            self.ledger.add(step, "evaluation", score.lengths, score.seconds)
            self.run.record(step, "eval", {**self._axis(), **score.metrics()})
            self.run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")
            if score.faults:
                self.run.log(f"step {step} evaluation: {score.faults}")
        record_ledger(self.run, self.ledger)

    def should_stop(self) -> bool:
        """Whether the validation loss has left the regime that `sft.stop_after` names."""
        after = self.config.sft.stop_after
        return after != "never" and self.reading.has_left(after)

    def _axis(self) -> dict[str, float]:
        return {"eflops_sft": self.ledger.eflops_sft, "eflops_rl": 0.0}
