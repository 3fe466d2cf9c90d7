"""The record of an SFT run and its conclusions: metrics, ledger, loss spikes, monitor, when to stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pctrain.ceiling.monitor import Monitor, Reading
from pctrain.compute import flops
from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config
from pctrain.core import Learner, Update
from pctrain.core.peak import peak_flops
from pctrain.core.session import due, record_ledger
from pctrain.core.skipped import SkippedUpdates
from pctrain.data.packing import PackedBatch
from pctrain.data.trajectories import Trajectories
from pctrain.distributed import parallel
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import RunFolder
from pctrain.sft.loss import source_means
from pctrain.sft.spikes import Spikes
from pctrain.sft.validation import validation_loss


@dataclass(frozen=True)
class TrainedStep:
    """One training step: `samples` are indices of the training data, `seconds` include `waited` for the batch."""

    step: int
    samples: Sequence[int]
    batch: PackedBatch
    update: Update
    seconds: float
    waited: float


class SFTJournal:
    """The record of an SFT run. Every rank holds one and comes to the same conclusions; rank 0 writes.

    A checkpoint stores its `state`.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        learner: Learner,
        worker: RolloutWorker,
        data: Trajectories,
        held_out: Trajectories,
        steps: int,
        state: dict,
    ):
        """Open the journal.

        Args:
            config: of the run.
            run: its folder.
            learner: the model that is validated.
            worker: evaluates it.
            data: training trajectories.
            held_out: validation trajectories.
            steps: optimizer updates in all.
            state: from the checkpoint that the run resumes from; {} at the start.
        """
        self.config = config
        self.run = run
        self.learner = learner
        self.worker = worker
        self.data = data
        self.held_out = held_out
        self.steps = steps
        self.ledger = Ledger(worker.hf.shape, ranks=parallel.world_size(), recompute=config.parallel.recompute)
        if state:
            self.ledger.load_state_dict(state["ledger"])
        self.skipped = SkippedUpdates(config.sft.optimizer.max_skipped, state.get("skipped_in_a_row", 0))
        self.spikes = Spikes(state.get("recent_losses"))
        self.validations: list[list] = state.get("validations", [])  # the arguments of each Monitor.add
        self.monitor = Monitor(config.ceiling.delta, config.ceiling.delta2)
        self._reading: Reading | None = None
        for validation in self.validations:
            self._reading = self.monitor.add(*validation)
        peak_of_rank = peak_flops(config.model.dtype)
        self._peak = peak_of_rank * parallel.world_size()
        run.log(f"fastest matrix product {peak_of_rank / 1e9:.4g} GFLOP/s per rank; time/mfu is a share of it")

    @property
    def reading(self) -> Reading:
        """The monitor's reading after the last validation. A run is validated before its first step."""
        if self._reading is None:
            raise RuntimeError("the run has not been validated yet: call validate_and_evaluate_if_due first")
        return self._reading

    def state(self, step: int) -> dict:
        """Return what a checkpoint stores."""
        return {
            "step": step,
            "ledger": self.ledger.state_dict(),
            "skipped_in_a_row": self.skipped.in_a_row,
            "recent_losses": self.spikes.state(),
            "validations": self.validations,
        }

    def record(self, trained: TrainedStep) -> None:
        """Record one training step. UserError if too many updates in a row were skipped."""
        update = trained.update
        lengths = self.data.lengths[trained.samples]
        self.ledger.add(trained.step, "sft_update", lengths, trained.seconds)
        is_spike = self.spikes.add(update.loss)
        metrics = self._metrics(trained, is_spike)
        self.run.record(trained.step, "train", metrics)
        flags = " | update skipped" if update.skipped else ""
        flags += " | LOSS SPIKE" if is_spike else ""
        self.run.log(
            f"step {trained.step} loss {update.loss:.4f} grad_norm {update.grad_norm:.3f} lr {update.lr:.2e} "
            f"tokens {trained.batch.tokens} {metrics['time/tokens_per_second']:.0f} tokens/s "
            f"mfu {metrics['time/mfu']:.1%} padding {metrics['padding_share']:.1%}{flags}"
        )
        if is_spike:
            self.run.log(f"step {trained.step} its samples: {', '.join(self._ids(trained.samples))}")
        self.skipped.add(update, trained.step, self._ids(trained.samples) if update.skipped else [])

    def validate_and_evaluate_if_due(self, step: int) -> None:
        """Record the validation loss with its regime, and the score, if they are due. Collective.

        Step 0 is the untrained model. A step with a checkpoint is validated too, because RL may start from it.
        """
        sft = self.config.sft
        if due(step, sft.val_every, self.steps) or due(step, sft.checkpoint_every, self.steps):
            self._validate(step)
        if due(step, sft.eval_every, self.steps):
            self._evaluate(step)
        record_ledger(self.run, self.ledger)

    def should_stop(self) -> bool:
        """Return whether the validation loss has left the regime that `sft.stop_after` names."""
        regime = self.config.sft.stop_after
        return regime != "never" and self.reading.has_left(regime)

    def _validate(self, step: int) -> None:
        sft = self.config.sft
        began = time.perf_counter()
        loss = validation_loss(self.learner, self.held_out, sft.token_budget)
        self.ledger.add(step, "validation", self.held_out.lengths, time.perf_counter() - began)
        has_checkpoint = step > 0 and due(step, sft.checkpoint_every, self.steps)
        self.validations.append([step, self.ledger.eflops_sft, loss.whole.loss, loss.whole.se, has_checkpoint])
        self._reading = self.monitor.add(*self.validations[-1])
        self.run.record(step, "val", {**self._axes(), **loss.metrics(), **self._reading.metrics()})
        self.run.log(f"step {step} val_loss {loss.whole.loss:.5f} +- {loss.whole.se:.5f} {self._reading.line()}")

    def _evaluate(self, step: int) -> None:
        score = self.worker.evaluate(self.learner)
        self.ledger.add(step, "evaluation", score.lengths, score.seconds)
        self.run.record(step, "eval", {**self._axes(), **score.metrics()})
        self.run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")
        if score.faults:
            self.run.log(f"step {step} evaluation: {score.faults}")

    def _metrics(self, trained: TrainedStep, is_spike: bool) -> dict[str, float]:
        update, batch = trained.update, trained.batch
        exact_flops = flops.exact_training(self.worker.hf.shape, self.data.lengths[trained.samples])
        return {
            **self._axes(),
            "loss": update.loss,
            **source_means(update.metrics, self.data.names, self._loss_tokens_by_source(trained.samples)),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "skipped_updates": int(update.skipped),
            "loss_spike": int(is_spike),
            "tokens": batch.tokens,
            "loss_tokens": batch.loss_tokens,
            "padding_share": 1 - batch.tokens / batch.positions,
            "time/step_seconds": trained.seconds,
            "time/data_seconds": trained.waited,
            "time/tokens_per_second": batch.tokens / trained.seconds,
            "time/mfu": exact_flops / trained.seconds / self._peak,
        }

    def _loss_tokens_by_source(self, samples: Sequence[int]) -> list[int]:
        loss_tokens, sources = self.data.loss_tokens[samples], self.data.source[samples]
        return [int(loss_tokens[sources == number].sum()) for number in range(len(self.data.names))]

    def _ids(self, samples: Sequence[int]) -> list[str]:
        return [self.data.id(sample) for sample in samples]

    def _axes(self) -> dict[str, float]:
        return {"eflops_sft": self.ledger.eflops_sft, "eflops_rl": 0.0}
