"""`pctrain sft`, `rl` and `run`: the commands that train."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command, NoOptions
from pctrain.common.errors import UserError
from pctrain.config.tree import Config, Section

_TRAINING = ("run", "model", "parallel", "data")
_SAMPLING = ("rollout", "reward", "eval")


class DebugOptions(Section):
    """Options of `pctrain rl` that run half a step at a time."""

    debug_rollout_only: bool = Field(
        False, description="sample the next step, save its rollouts and stop; the run resumes from them"
    )
    debug_train_only: Path | None = Field(
        None,
        description="saved rollouts of a step (RUN/rollouts/step-N.replay.npz): train on them without an engine; "
        "nothing is written",
    )


class StudyOptions(Section):
    """Options of `pctrain run`."""

    dry_run: bool = Field(
        False, description="print the plan, which stages are done and what the others will cost; write nothing"
    )
    only: list[str] = Field([], description="run only this stage, or the stages of this set or seed; may be repeated")


def _run_sft(call: Call[NoOptions]) -> None:
    config = call.load_config()
    from pctrain.sft.loop import main

    main(config)


def _run_rl(call: Call[DebugOptions]) -> None:
    options = call.options
    if options.debug_rollout_only and options.debug_train_only is not None:
        raise UserError("--debug-rollout-only and --debug-train-only exclude each other; give one of them")
    config = call.load_config()
    from pctrain.rl import debug, loop

    if options.debug_train_only is not None:
        debug.train_only(config, options.debug_train_only)
    elif options.debug_rollout_only:
        debug.sample_only(config)
    else:
        loop.main(config)


def _run_study(call: Call[StudyOptions]) -> None:
    config = call.load_config()
    from pctrain.study.command import main

    main(config, call.options.only, call.options.dry_run)


COMMANDS = (
    Command(
        "sft",
        "supervised fine-tuning on expert trajectories",
        "pctrain sft [--config FILE] [--section.key=value ...]",
        _run_sft,
        (
            "pctrain sft --config configs/quickstart.yaml --run.dir=runs/sft",
            "pctrain sft --model.path=Qwen2.5-7B --data.train=train.jsonl --data.validation=validation.jsonl",
            "torchrun --nproc-per-node=4 -m pctrain sft --config sft.yaml --parallel.tensor=2",
        ),
        NoOptions,
        (*_TRAINING, "sft", *_SAMPLING),
    ),
    Command(
        "rl",
        "reinforcement learning on problems with verifiable answers",
        "pctrain rl [--config FILE] [--section.key=value ...]",
        _run_rl,
        (
            "pctrain rl --config configs/quickstart.yaml --run.dir=runs/rl "
            "--model.checkpoint=runs/sft/checkpoints/step-270",
            "pctrain rl --model.path=Qwen2.5-7B --data.rl=problems.jsonl --data.test=test.jsonl --rl.algorithm=grpo",
            "torchrun --nproc-per-node=2 -m pctrain rl --config rl.yaml --parallel.tensor=2 --rollout.tensor=2",
            "pctrain rl --config rl.yaml --debug-rollout-only",
            "pctrain rl --config rl.yaml --debug-train-only runs/rl/rollouts/step-1.replay.npz",
        ),
        DebugOptions,
        (*_TRAINING, "rl", *_SAMPLING),
    ),
    Command(
        "run",
        "a whole study: SFT on each set, RL from its checkpoints, ceilings, answers and a report",
        "pctrain run [--config FILE] [--dry-run] [--only NAME ...] [--section.key=value ...]",
        _run_study,
        (
            "pctrain run --config configs/quickstart.yaml",
            "pctrain run --config configs/quickstart.yaml --run.dir=runs/second --run.seed=1",
            "pctrain run --config study.yaml --study.starts='[stable, overfit]'",
            "pctrain run --config study.yaml --study.policy=recommended --dry-run",
            "pctrain run --config study.yaml --study.sets='{easy: easy.jsonl, hard: hard.jsonl}' --only hard",
        ),
        StudyOptions,
        tuple(Config.model_fields),
    ),
)
