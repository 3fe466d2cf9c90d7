"""RL: sample with the learner's own weights, verify, update; the same `core.step` as SFT."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np

from pctrain.ceiling.ledger import Ledger
from pctrain.checkpoints import checkpoint_step
from pctrain.config import Config
from pctrain.core import Core, Update, parallel
from pctrain.core.hf_config import HFConfig
from pctrain.core.skipped import SkippedUpdates
from pctrain.data.tokenizer import Tokenizer
from pctrain.errors import UserError
from pctrain.evaluate.scorer import Scorer
from pctrain.progress import progress
from pctrain.resume import begin, due, finished, open_run, record_ledger, resume, save
from pctrain.reward import fault_line
from pctrain.rl import algorithms, batch
from pctrain.rl.sampling import Group, GroupSampler, PromptStream, Sampled, summary
from pctrain.runfolder import HF_FOLDER, RunFolder, read_values


def main(config: Config) -> None:
    """`pctrain rl`."""
    config = begin(config)
    with Scorer(config) as scorer:
        train(config, scorer)


def train(config: Config, scorer: Scorer, role: str = "none") -> None:
    """Runs, or goes on with, the RL run of `config.run.dir`, from `model.checkpoint` or else from the weights of `model.path`.

    `role`: what the start is to a study (early, stable, overfit), for its report.
    """
    rl = config.rl
    joint = parallel.from_rank_zero(lambda: _joint(config, role))
    with open_run(config, "rl", [config.data.rl, config.data.test]) as run:
        if finished(run):
            return
        run.write_start(joint)
        prompts = PromptStream(scorer.read_problems(config.data.rl), config.run.seed)
        algorithm = algorithms.build(rl)
        sampler = GroupSampler(config, scorer.engine, scorer.verifier, scorer.tokenizer, algorithm.dynamic_sampling)
        ledger = Ledger(scorer.hf.shape, joint["eflops_sft"])

        core = Core(config.model, config.parallel, optimizer_config=rl.optimizer, total_steps=rl.steps * rl.updates, seed=config.run.seed)
        start, state = resume(run, core)
        skipped = SkippedUpdates(rl.optimizer.max_skipped, state.get("skipped_in_a_row", 0))
        if state:
            ledger.load_state_dict(state["ledger"])
            prompts.load_state_dict(state["prompts"])
        else:
            _score(run, core, ledger, scorer, step=0)

        with progress(f"RL ({rl.algorithm})", total=rl.steps, start=start, rank=parallel.rank()) as bar:
            for step in range(start + 1, rl.steps + 1):
                swap = scorer.load(core)
                sampled = sampler.sample(prompts, step)
                scorer.engine.sleep()  # its GPU memory is the learner's until the next swap
                began = time.perf_counter()
                updates = _update(config, core, algorithm, sampled, ledger, step)
                update_seconds = time.perf_counter() - began

                values = {
                    "eflops_sft": ledger.eflops_sft,
                    "eflops_rl": ledger.eflops_rl,
                    **summary(sampled),
                    **_means(updates),
                    "time/swap_seconds": swap.seconds,
                    "time/rollout_seconds": sampled.rollout_seconds,
                    "time/reward_seconds": sampled.reward_seconds,
                    "time/update_seconds": update_seconds,
                }
                run.record(step, "train", values)
                run.write_rollouts(step, _rollout_rows(sampled, scorer.tokenizer))
                run.log(_line(step, values, sampled, rl.prompts))
                if faults := fault_line([verdict for group in sampled.groups for verdict in group.verdicts]):
                    run.log(f"step {step} {faults}")
                for update, ids in zip(updates, _problem_ids(sampled.kept, rl.updates)):
                    skipped.add(update, step, ids)
                if due(step, rl.eval_every, rl.steps):
                    _score(run, core, ledger, scorer, step)
                record_ledger(run, ledger)
                if due(step, rl.checkpoint_every, rl.steps):
                    state = {"step": step, "ledger": ledger.state_dict(), "prompts": prompts.state_dict()}
                    save(run, step, core, {**state, "skipped_in_a_row": skipped.in_a_row})
                core.poll_save()
                bar.advance(reward=values["reward"])
        core.poll_save(wait=True)
        core.export(run.path / HF_FOLDER)
        _finish(config, run)


def _update(config: Config, core: Core, algorithm: algorithms.Algorithm, sampled: Sampled, ledger: Ledger, step: int) -> list[Update]:
    """The optimizer updates of one step, and the ledger's entries for all of its compute. No informative group: no update."""
    rl, temperature = config.rl, config.rollout.temperature
    dropped = [group for group, _ in sampled.dropped]
    _count(ledger, step, "rollout", sampled.kept, sampled.rollout_seconds)
    _count(ledger, step, "rollout_rejected", dropped, 0.0)  # sampled together with the kept ones: the seconds stand there
    if not sampled.kept:
        return []
    rows = batch.rows_of(sampled.kept, algorithm)
    if rl.updates > 1:
        began = time.perf_counter()
        rows = batch.with_old_logprobs(rows, core, rl.token_budget, temperature)
        _count(ledger, step, "logprob", sampled.kept, time.perf_counter() - began)
    began = time.perf_counter()
    updates = [
        core.step(core.pack(part, rl.token_budget), algorithm.loss, temperature=temperature)
        for part in batch.split(rows, rl.updates)
    ]
    _count(ledger, step, "rl_update", sampled.kept, time.perf_counter() - began)
    return updates


def _count(ledger: Ledger, step: int, phase: str, groups: list[Group], seconds: float) -> None:
    if groups:
        ledger.add(step, phase, sum(len(g.completions) for g in groups), sum(g.tokens for g in groups), seconds)


def _problem_ids(kept: list[Group], updates: int) -> list[list[str]]:
    """Ids of the problems behind the rows of each update."""
    return batch.split([group.problem.id for group in kept for _ in group.completions], updates)


def _means(updates: list[Update]) -> dict[str, float]:
    """Over the updates of a step that were made, and how many were skipped; empty where there was none."""
    if not updates:
        return {}
    made = [u for u in updates if not u.skipped]
    names = {"loss": [u.loss for u in made], "grad_norm": [u.grad_norm for u in made], "lr": [u.lr for u in updates]}
    names |= {key: [u.metrics[key] for u in made] for key in updates[0].metrics}
    means = {name: float(np.mean(values)) if values else math.nan for name, values in names.items()}
    return {**means, "skipped_updates": sum(u.skipped for u in updates)}


def _score(run: RunFolder, core: Core, ledger: Ledger, scorer: Scorer, step: int) -> None:
    score = scorer.score(core)
    ledger.add(step, "evaluation", score.sequences, score.tokens, score.seconds)
    run.record(step, "eval", {"eflops_sft": ledger.eflops_sft, "eflops_rl": ledger.eflops_rl, **score.metrics()})
    run.log(f"step {step} score {score.score:.1f} +- {score.se:.1f}")
    if score.faults:
        run.log(f"step {step} evaluation: {score.faults}")


def _rollout_rows(sampled: Sampled, tokenizer: Tokenizer) -> list[dict]:
    why = {id(group): reason for group, reason in sampled.dropped}
    return [
        {
            "id": group.problem.id,
            "prompt": group.problem.prompt,
            "response": tokenizer.decode(completion.token_ids),
            "answer": group.problem.answer,
            "reward": verdict.reward,
            "cause": verdict.cause,
            "finish": completion.finish,
            "kept": id(group) not in why,
            "why": why.get(id(group), ""),
        }
        for group in sampled.groups
        for completion, verdict in zip(group.completions, group.verdicts, strict=True)
    ]


def _line(step: int, values: dict, sampled: Sampled, wanted: int) -> str:
    line = f"step {step} reward {values['reward']:.3f} length {values['response_length']:.1f}"
    line += f" kept {len(sampled.kept)} rounds {sampled.rounds}"
    if sampled.kept:
        line += f" loss {values['loss']:.4f} grad_norm {values['grad_norm']:.3f} entropy {values['entropy']:.3f}"
    if len(sampled.kept) < wanted:
        found = ", ".join(f"{sum(w == reason for _, w in sampled.dropped)} {reason}" for reason in ("all right", "all wrong"))
        line += f" | only {len(sampled.kept)} of {wanted} informative prompts in {sampled.rounds} rounds ({found})"
    return line


def _joint(config: Config, role: str) -> dict:
    """start.json: where this run leaves SFT, and what SFT had cost by then."""
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        return {"start_step": 0, "role": role, "sft_run": None, "eflops_sft": 0.0}
    path = Path(checkpoint)
    try:
        state = json.loads((path / "state.json").read_text())
    except FileNotFoundError:
        raise UserError(f"model.checkpoint {path}: state.json not found; name a checkpoint of a run, RUN/checkpoints/step-N") from None
    ledger = Ledger(HFConfig.read(config.model.path).shape)
    ledger.load_state_dict(state["ledger"])
    return {"start_step": checkpoint_step(path), "role": role, "sft_run": str(path.parent.parent), "eflops_sft": ledger.eflops_sft}


def _finish(config: Config, run: RunFolder) -> None:
    scores = read_values(run.path, "eval", "score") if run.writes else {}
    first, last = scores.get(0), scores.get(config.rl.steps)
    summary = {"steps": config.rl.steps, "score before RL (%)": first, "score after RL (%)": last, "final weights": run.path / HF_FOLDER}
    run.finish(summary, f"pctrain report {run.path}")
