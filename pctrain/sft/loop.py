"""SFT: batches of expert trajectories through the core, with an exact validation loss as the control signal."""

from __future__ import annotations

import time

from pctrain.ceiling.ledger import Ledger
from pctrain.config import Config
from pctrain.core import Core, parallel
from pctrain.core.skipped import SkippedUpdates
from pctrain.data.rows import sft_rows
from pctrain.data.sampler import ShuffledSampler
from pctrain.data.sources import read_records
from pctrain.evaluate.scorer import Scorer
from pctrain.progress import progress
from pctrain.resume import begin, due, finished, open_run, record_ledger, resume, save
from pctrain.runfolder import HF_FOLDER, RunFolder, read_values
from pctrain.sft.validation import cross_entropy, validation_loss


def main(config: Config) -> None:
    """`pctrain sft`."""
    config = begin(config)
    with Scorer(config) as scorer:
        train(config, scorer)


def train(config: Config, scorer: Scorer) -> None:
    """Runs, or goes on with, the SFT run of `config.run.dir`."""
    data, sft = config.data, config.sft
    files = [source.path for source in data.train + data.validation] + ([data.test] if sft.eval_every else [])
    with open_run(config, "sft", files) as run:
        if finished(run):
            return
        limits = {"context": scorer.hf.context, "token_budget": sft.token_budget}

        def read(path):
            records = read_records(path, data.fields, need=("response",))
            return [record.id for record in records], sft_rows(records, scorer.tokenizer, **limits)

        (ids, train_rows), (_, val_rows) = parallel.agree(lambda: (read(data.train[0].path), read(data.validation[0].path)))
        sampler = ShuffledSampler(len(train_rows), sft.batch_size, config.run.seed)
        ledger = Ledger(scorer.hf.shape)

        core = Core(config.model, config.parallel, optimizer_config=sft.optimizer, total_steps=sft.steps, seed=config.run.seed)
        start, state = resume(run, core)
        skipped = SkippedUpdates(sft.optimizer.max_skipped, state.get("skipped_in_a_row", 0))
        if state:
            ledger.load_state_dict(state["ledger"])
        else:
            _measure(config, run, core, ledger, scorer, val_rows, step=0)

        with progress("SFT", total=sft.steps, start=start, rank=parallel.rank()) as bar:
            for step in range(start + 1, sft.steps + 1):
                began = time.perf_counter()
                chosen = sampler.indices(step - 1)
                rows = [train_rows[i] for i in chosen]
                batch = core.pack(rows, sft.token_budget)
                update = core.step(batch, cross_entropy, want_entropy=False)
                seconds = time.perf_counter() - began

                ledger.add(step, "sft_update", batch.sequences, batch.tokens, seconds)
                run.record(step, "train", {
                    "eflops_sft": ledger.eflops_sft,
                    "eflops_rl": 0.0,
                    "loss": update.loss,
                    **update.metrics,
                    "grad_norm": update.grad_norm,
                    "lr": update.lr,
                    "skipped_updates": int(update.skipped),
                    "tokens": batch.tokens,
                    "loss_tokens": batch.loss_tokens,
                    "padding_share": 1 - batch.tokens / batch.positions,
                    "time/step_seconds": seconds,
                })
                run.log(f"step {step} loss {update.loss:.4f} grad_norm {update.grad_norm:.3f} lr {update.lr:.2e} "
                        f"tokens {batch.tokens} {batch.tokens / seconds:.0f} tokens/s{' | update skipped' if update.skipped else ''}")
                skipped.add(update, step, [ids[i] for i in chosen])
                _measure(config, run, core, ledger, scorer, val_rows, step)
                record_ledger(run, ledger)
                if due(step, sft.checkpoint_every, sft.steps):
                    save(run, step, core, {"step": step, "ledger": ledger.state_dict(), "skipped_in_a_row": skipped.in_a_row})
                core.poll_save()
                bar.advance(loss=update.loss)
        core.poll_save(wait=True)
        core.export(run.path / HF_FOLDER)
        _finish(config, run)


def _measure(config: Config, run: RunFolder, core: Core, ledger: Ledger, scorer: Scorer, val_rows: list, step: int) -> None:
    """Validation loss and score, where due; step 0 is the untrained model."""
    x = {"eflops_sft": ledger.eflops_sft, "eflops_rl": 0.0}
    if due(step, config.sft.val_every, config.sft.steps):
        began = time.perf_counter()
        val = validation_loss(core, val_rows, config.sft.token_budget)
        ledger.add(step, "validation", val.sequences, sum(len(row) for row in val_rows), time.perf_counter() - began)
        run.record(step, "val", {**x, "val_loss": val.loss, "val_loss_se": val.se, "val_tokens": val.tokens})
        run.log(f"step {step} val_loss {val.loss:.5f} +- {val.se:.5f}")
    if due(step, config.sft.eval_every, config.sft.steps):
        score = scorer.score(core)
        ledger.add(step, "evaluation", score.sequences, score.tokens, score.seconds)
        run.record(step, "eval", {**x, **score.metrics()})
        run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")


def _finish(config: Config, run: RunFolder) -> None:
    summary = {"steps": config.sft.steps, "final weights": run.path / HF_FOLDER}
    losses = read_values(run.path, "val", "val_loss") if run.writes else {}
    scores = read_values(run.path, "eval", "score") if run.writes else {}
    if losses:
        best = min(losses, key=losses.get)
        summary |= {"lowest validation loss": f"{losses[best]:.4f} at step {best}", "last validation loss": losses[max(losses)]}
    if scores:
        summary["last score (%)"] = scores[max(scores)]
    start = f"--config {run.path / 'config.yaml'} --model.checkpoint={run.checkpoint_path(config.sft.steps)}"
    run.finish(summary, f"{parallel.launcher()} rl {start} --run.dir={run.path}-rl")
