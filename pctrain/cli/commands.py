"""Every command: a table of entries, and what each does with its arguments. Nothing heavy is imported before its config is checked."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli import data as cli_data
from pctrain.cli import evaluate as cli_eval
from pctrain.cli.arguments import Command, resolve_config, set_environment, take
from pctrain.cli.options import parse
from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.help import own_option_lines
from pctrain.config.tree import Config, Section
from pctrain.plan.options import PlanOptions
from pctrain.report.fit_options import FitOptions

TRAINING = ("run", "model", "parallel", "data")
SAMPLING = ("rollout", "reward", "eval")
_CONVERT_OPTIONS = ("model", "parallel")
_VERIFY = "  --verify       compare log-probs of random sequences with transformers; exit status 2 above 2e-4"


class DebugOptions(Section):
    """Half a step of RL at a time."""

    debug_rollout_only: bool = Field(
        False, description="sample the next step, write its rollouts down and stop; the run goes on from them"
    )
    debug_train_only: Path | None = Field(
        None,
        description="rollouts of a step (RUN/rollouts/step-N.replay.npz): train on them; no engine is started, nothing is written",
    )


class DoctorOptions(Section):
    folder: Path = Field(Path("."), description="where runs will be written: checked for write access and free space")


class ShowOptions(Section):
    step: int | None = Field(None, ge=1, description="RL step; default: the newest")
    prompts: int = Field(5, ge=1, description="prompts that are shown")
    dropped: bool = Field(False, description="show also the prompts that dynamic sampling dropped, and why")


class ReportOptions(Section):
    out: Path | None = Field(None, description="folder for the report; default: SOURCE/report, of a file NAME-report")
    ledger: bool = Field(
        False, description="only print where the compute went: tokens, FLOPs and seconds by run and phase"
    )
    watch: bool = Field(
        False, description="serve the report on this machine and refresh it while the run goes on; writes nothing"
    )
    port: int | None = Field(None, ge=1, le=65535, description="of --watch; default: any free one, which is printed")


class StudyOptions(Section):
    dry_run: bool = Field(
        False, description="print the plan, what is done of it and what the rest costs; nothing is written"
    )
    only: list[str] = Field(
        [], description="a stage, or a set or seed whose stages this job runs; may be given several times"
    )


# What `pctrain fit` reads. x is training compute from the SFT/RL joint in EFLOPs (1e18), scores are in percent.
FIT_FORMS = (
    "  CURVES         scores against RL compute, in EFLOPs (1e18 FLOPs) from the SFT/RL joint, in one of these forms:",
    "      folder     an RL run of pctrain, or a study of several",
    "      CSV        eflops,score[,curve][,score_se] with this header; the row at 0 is the score at the joint, P_sft",
    '      JSON       {"curves": [{"name": "a", "p_sft": 68.6, "eflops": [3.5, 6.4], "scores": [69.9, 70.1]}]}, each with p_sft_se,',
    "                 score_se (standard errors, points) and max_score (percent) where known",
    "      JSON       the exchange format of the published curves (meta, datasets): pctrain/report/curves.py",
    "  Verdicts: identified; lower_bound (only the lower end of the interval means anything); flat (no gain yet: not a ceiling);",
    "  too_short (fewer than 12 points); collapsed (fitted to the points before). What they can and cannot say: docs/ceilings.md",
)


def _only(command: Command, operands: list[str], rest: list[str], what: str) -> Path:
    """The one operand of a command that takes no key of the config."""
    if len(operands) != 1 or rest:
        given = " ".join([*operands, *rest]) or "none"
        raise UserError(f"pctrain {command.name}: expected one {what}, got {given}; usage: {command.usage}")
    return Path(operands[0])


def _sft(command: Command, arguments: list[str]) -> None:
    config = resolve_config(command, arguments)
    from pctrain.sft.loop import main as run

    run(config)


def _rl(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, DebugOptions)
    if operands:
        raise UserError(f"pctrain rl: unexpected argument {operands[0]!r}: options have the form --section.key=value")
    if options.debug_rollout_only and options.debug_train_only is not None:
        raise UserError("--debug_rollout_only samples and --debug_train_only trains: give one of them")
    config = resolve_config(command, rest)
    from pctrain.rl import loop

    if options.debug_train_only is not None:
        loop.debug_train(config, options.debug_train_only)
    else:
        loop.main(config, options.debug_rollout_only)


def _show(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, ShowOptions)
    folder = _only(command, operands, rest, "folder of an RL run")
    from pctrain.tools.show import main as run

    run(folder, options.step, options.prompts, options.dropped)


def _run(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, StudyOptions)
    if operands:
        raise UserError(f"pctrain run: unexpected argument {operands[0]!r}: options have the form --section.key=value")
    config = resolve_config(command, rest)
    from pctrain.study.command import main as run

    run(config, options.only, options.dry_run)


def _fit(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, FitOptions)
    curves = _only(command, operands, rest, "file or folder of curves")
    set_environment()
    from pctrain.report.fit_command import main as run

    run(curves, options)


def _report(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, ReportOptions)
    source = _only(command, operands, rest, "folder or file of curves")
    if options.port is not None and not options.watch:
        raise UserError("pctrain report: --port is where --watch serves; give --watch as well")
    chosen = [name for name in ("out", "ledger", "watch") if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"pctrain report: --{chosen[0]} and --{chosen[1]} are two different things; give one of them")
    if options.ledger:
        from pctrain.report.ledger_table import main as table

        table(source)
    elif options.watch:
        from pctrain.report.watch import main as serve

        serve(source, options.port or 0)
    else:
        from pctrain.report.command import main as run

        run(source, options.out)


def _convert(command: Command, arguments: list[str]) -> None:
    verify, arguments = "--verify" in arguments, [argument for argument in arguments if argument != "--verify"]
    paths = [argument for argument in arguments[:2] if not argument.startswith("-")]
    if len(paths) != 2:
        raise UserError(f"pctrain {command.name}: expected 2 folders, got {len(paths)}; usage: {command.usage}")
    source, out = Path(paths[0]), Path(paths[1])
    options = arguments[2:]
    to_mcore = command.name == "convert hf-to-mcore"
    if to_mcore:
        options.append(f"--model.path={source}")  # the layout is checked against its config.json
    config = resolve_config(command, options)
    if config.model.path is None:
        raise UserError(
            f"pctrain {command.name} needs --model.path=HF, the Hugging Face directory that gives the config and the tokenizer"
        )
    if verify and config.model.dtype != "float32":
        raise UserError(
            f"--verify compares in float32, but model.dtype = {config.model.dtype}; leave it at float32 (nothing is lost)"
        )
    from pctrain.tools import convert

    (convert.hf_to_mcore if to_mcore else convert.mcore_to_hf)(config, source, out, verify)


def _doctor(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, DoctorOptions)
    if operands or rest:
        raise UserError(f"pctrain doctor: unexpected argument {[*operands, *rest][0]!r}; usage: {command.usage}")
    set_environment()
    from pctrain.tools import doctor

    if doctor.main(options.folder):
        raise SystemExit(1)


def _plan(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, PlanOptions)
    if operands:
        raise UserError(f"pctrain plan: unexpected argument {operands[0]!r}: options have the form --name=value")
    path, typed = take(rest, "--config")
    file = Path(path) if path is not None else None
    config = config_load.read(file, typed)  # its layout is not looked at yet: it may be for another number of GPUs
    set_environment()
    from pctrain.plan.command import main as run
    from pctrain.plan.launching import LAYOUT_KEYS

    pinned = {key: text for text in typed if (key := text[2:].partition("=")[0]) in (*LAYOUT_KEYS, "rollout.tensor")}
    others = [text for text in typed if text not in pinned.values()]
    run(config, config_load.read(file, others), options, pinned, [*(["--config", path] if path else []), *others])


COMMANDS = (
    Command(
        "sft",
        "supervised fine-tuning on expert trajectories",
        "pctrain sft [--config FILE] [--section.key=value ...]",
        _sft,
        (
            "pctrain sft --config configs/quickstart.yaml --run.dir=runs/sft",
            "pctrain sft --model.path=Qwen2.5-7B --data.train=train.jsonl --data.validation=validation.jsonl",
            "torchrun --nproc-per-node=4 -m pctrain sft --config sft.yaml --parallel.tensor=2",
        ),
        (*TRAINING, "sft", *SAMPLING),
    ),
    Command(
        "rl",
        "reinforcement learning on problems with verifiable answers",
        "pctrain rl [--config FILE] [--section.key=value ...]",
        _rl,
        (
            "pctrain rl --config configs/quickstart.yaml --run.dir=runs/rl --model.checkpoint=runs/sft/checkpoints/step-270",
            "pctrain rl --model.path=Qwen2.5-7B --data.rl=problems.jsonl --data.test=test.jsonl --rl.algorithm=grpo",
            "torchrun --nproc-per-node=2 -m pctrain rl --config rl.yaml --parallel.tensor=2 --rollout.tensor=2",
            "pctrain rl --config rl.yaml --debug-rollout-only",
            "pctrain rl --config rl.yaml --debug-train-only runs/rl/rollouts/step-1.replay.npz",
        ),
        (*TRAINING, "rl", *SAMPLING),
        tuple(own_option_lines(DebugOptions)),
    ),
    Command(
        "show",
        "the rollouts of an RL step in the terminal: prompts, answers, rewards, advantages",
        "pctrain show RUN [--step N] [--prompts K] [--dropped]",
        _show,
        ("pctrain show runs/quickstart/rl-step-420", "pctrain show runs/rl --step 12 --prompts 20 --dropped"),
        notes=("  RUN            folder of an RL run", *own_option_lines(ShowOptions)),
    ),
    Command(
        "run",
        "the whole study: SFT on each set, RL from its checkpoints, ceilings, answers and a report",
        "pctrain run [--config FILE] [--dry-run] [--only NAME ...] [--section.key=value ...]",
        _run,
        (
            "pctrain run --config configs/quickstart.yaml",
            "pctrain run --config configs/quickstart.yaml --run.dir=runs/second --run.seed=1",
            "pctrain run --config study.yaml --study.starts='[stable, overfit]'",
            "pctrain run --config study.yaml --study.policy=recommended --dry-run",
            "pctrain run --config study.yaml --study.sets='{easy: easy.jsonl, hard: hard.jsonl}' --only hard",
        ),
        tuple(Config.model_fields),
        tuple(own_option_lines(StudyOptions)),
    ),
    Command(
        "fit",
        "ceilings of score-against-compute curves, with intervals",
        "pctrain fit CURVES [--out FILE] [--reach SCORE] [--budget EFLOPS] [--points SHARE] [--method paper]",
        _fit,
        (
            "pctrain fit curves.json --out fits.json",
            "pctrain fit curves.csv --reach 75 --reach 80 --budget 500",
            "pctrain fit curves.json --points 0.71                    # fit the first 71 %, compare with the rest",
            "pctrain fit curves.json --method paper --tau 2.5",
        ),
        notes=(*FIT_FORMS, *own_option_lines(FitOptions)),
    ),
    Command(
        "report",
        "a study, a run or a file of curves as one HTML page with charts; or where the compute went",
        "pctrain report SOURCE [--out DIR] [--ledger] [--watch [--port N]]",
        _report,
        (
            "pctrain report runs/quickstart",
            "pctrain report runs/quickstart --ledger",
            "pctrain report runs/rl --watch",
            "pctrain report curves.json --out curves-report",
        ),
        notes=(
            "  SOURCE         folder of a study (run.dir of `pctrain run`) or of one run, finished or not; or a JSON file of curves",
            *own_option_lines(ReportOptions),
            "  Written are report.html (opens from the disk, loads nothing), study.json, figures/*.png and figures/*.csv.",
        ),
    ),
    *cli_eval.COMMANDS,
    *cli_data.COMMANDS,
    Command(
        "convert hf-to-mcore",
        "a Hugging Face directory as a checkpoint (weights only) that model.checkpoint takes",
        "pctrain convert hf-to-mcore HF CHECKPOINT [--verify] [--section.key=value ...]",
        _convert,
        (
            "pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 --verify",
            "torchrun --nproc-per-node=2 -m pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 --parallel.tensor=2",
        ),
        _CONVERT_OPTIONS,
        (
            "  HF             Hugging Face directory: config.json, safetensors",
            "  CHECKPOINT     new folder, named step-N",
            _VERIFY,
        ),
    ),
    Command(
        "convert mcore-to-hf",
        "the weights of a checkpoint as a Hugging Face directory",
        "pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF [--verify] [--section.key=value ...]",
        _convert,
        (
            "pctrain convert mcore-to-hf runs/sft/checkpoints/step-270 exported --model.path=Qwen3-0.6B --verify",
            "torchrun --nproc-per-node=2 -m pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF --parallel.pipeline=2",
        ),
        _CONVERT_OPTIONS,
        (
            "  CHECKPOINT     checkpoint folder, such as RUN/checkpoints/step-100, written at any layout",
            "  OUT            new folder; config, tokenizer and the dtypes of the weights as in model.path",
            _VERIFY,
        ),
    ),
    Command(
        "plan",
        "what a config needs of memory, time and wires on so many GPUs, which layouts fit, and how to start the fastest",
        "pctrain plan --gpus N --gpu KIND [--config FILE] [--kind sft|rl] [--out FILE] [--figure FILE] [--section.key=value ...]",
        _plan,
        (
            "pctrain plan --config configs/retu/rl-pipeline.yaml --gpus 8 --gpu h100",
            "pctrain plan --gpus 128 --gpu h200 --model.path=Qwen2.5-7B --model.dtype=bfloat16 --sft.batch_size=512 --sft.token_budget=16384",
            "pctrain plan --config sft.yaml --gpus 64 --gpu a100-80 --parallel.tensor=4        # tensor stays, the rest is searched",
            "pctrain plan --config configs/quickstart.yaml --gpus 2 --gpu cpu --kind rl",
        ),
        (
            "model",
            "parallel",
            "sft.batch_size",
            "sft.token_budget",
            "rl.algorithm",
            "rl.prompts",
            "rl.group",
            "rl.updates",
            "rl.round_prompts",
            "rl.token_budget",
            "rl.kl_coef",
            "rl.reference_offload",
            "rollout.tensor",
            "rollout.max_prompt",
            "rollout.max_response",
            "rollout.max_sequences",
            "rollout.gpu_memory",
            "rollout.kv_cache_mb",
        ),
        (
            *own_option_lines(PlanOptions),
            "",
            "Neither a GPU nor weights nor data are needed: of model.path only config.json is read. Layouts are all that divide and pass the",
            "checks of `pctrain sft` and `rl`; keys of the layout given on the command line stay as they are. What each number rests on is",
            "printed with it, and told in docs/plan.md.",
        ),
    ),
    Command(
        "doctor",
        "check that this machine can train (versions, devices, memory, interconnect), and how to fix what is wrong",
        "pctrain doctor [--folder DIR]",
        _doctor,
        (
            "pctrain doctor",
            "torchrun --standalone --nproc-per-node=2 -m pctrain doctor --folder /shared/runs",
        ),
        notes=tuple(own_option_lines(DoctorOptions)),
    ),
)
