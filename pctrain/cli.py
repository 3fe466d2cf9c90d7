"""The command line: `pctrain <command> [--config FILE] [--section.key=value ...]`.

Nothing heavy is imported before a command has its checked config; the options printed by `--help` come from config.py.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pctrain import config_help, config_load
from pctrain.config import Config
from pctrain.errors import UserError

TRAINING = ("run", "model", "parallel", "data")
SAMPLING = ("rollout", "reward", "eval")
_CONVERT_OPTIONS = ("model", "parallel")
_VERIFY = "  --verify       compare log-probs of random sequences with transformers; exit status 2 above 2e-4"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank finds the same mistake; once is enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from pctrain import __version__

        print(f"pctrain {__version__}")
        return 0
    command, rest = _find_command(arguments)
    if "-h" in rest or "--help" in rest:
        print(_command_help(command))
        return 0
    command.handler(command, rest)
    return 0


# ---------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Command:
    """One verb. `options`: the config sections it reads, or single options; they are printed by `--help`, and whole sections are searched
    for impossible combinations."""

    name: str
    summary: str
    usage: str
    handler: Callable[[Command, list[str]], None]
    examples: tuple[str, ...]
    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _sft(command: Command, arguments: list[str]) -> None:
    config = _config(command, arguments)
    from pctrain.sft.loop import main as run

    run(config)


def _rl(command: Command, arguments: list[str]) -> None:
    config = _config(command, arguments)
    from pctrain.rl.loop import main as run

    run(config)


def _run(command: Command, arguments: list[str]) -> None:
    config = _config(command, arguments)
    from pctrain.study import main as run

    run(config)


def _fit(command: Command, arguments: list[str]) -> None:
    (curves,), out = _paths(command, arguments, operands=1)
    from pctrain.ceiling.fit_command import main as run

    run(curves, out or Path("fits.json"))


def _report(command: Command, arguments: list[str]) -> None:
    (folder,), out = _paths(command, arguments, operands=1)
    if out is not None:
        raise UserError(f"pctrain report writes into {folder}/report; it takes no --out")
    from pctrain.ceiling.report import main as run

    run(folder)


def _data_generate(command: Command, arguments: list[str]) -> None:
    out, arguments = _take(arguments, "--out")
    if out is None:
        raise UserError("pctrain data generate needs --out DIR, the folder to write the problems into")
    config = _config(command, arguments)
    from pctrain.data import arithmetic

    for name, path in arithmetic.write_sets(config.data.problems, config.run.seed, Path(out)).items():
        print(f"{path}: {getattr(config.data.problems, name)} records")


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
    config = _config(command, options)
    if config.model.path is None:
        raise UserError(f"pctrain {command.name} needs --model.path=HF, the Hugging Face directory that gives the config and the tokenizer")
    if verify and config.model.dtype != "float32":
        raise UserError(f"--verify compares in float32, but model.dtype = {config.model.dtype}; leave it at float32 (nothing is lost)")
    from pctrain import convert

    (convert.hf_to_mcore if to_mcore else convert.mcore_to_hf)(config, source, out, verify)


COMMANDS = (
    Command(
        "sft", "supervised fine-tuning on expert trajectories", "pctrain sft [--config FILE] [--section.key=value ...]", _sft,
        ("pctrain sft --config configs/quickstart.yaml --run.dir=runs/sft",
         "pctrain sft --model.path=Qwen2.5-7B --data.train=train.jsonl --data.validation=validation.jsonl",
         "torchrun --nproc-per-node=4 -m pctrain sft --config sft.yaml --parallel.tensor=2"),
        (*TRAINING, "sft", *SAMPLING)),
    Command(
        "rl", "reinforcement learning on problems with verifiable answers", "pctrain rl [--config FILE] [--section.key=value ...]", _rl,
        ("pctrain rl --config configs/quickstart.yaml --run.dir=runs/rl --model.checkpoint=runs/sft/checkpoints/step-270",
         "pctrain rl --model.path=Qwen2.5-7B --data.rl=problems.jsonl --data.test=test.jsonl --rl.algorithm=grpo",
         "torchrun --nproc-per-node=2 -m pctrain rl --config rl.yaml --parallel.tensor=2 --rollout.tensor=2"),
        (*TRAINING, "rl", *SAMPLING)),
    Command(
        "run", "the whole study: SFT, RL from several of its checkpoints, fits and a report",
        "pctrain run [--config FILE] [--section.key=value ...]", _run,
        ("pctrain run --config configs/quickstart.yaml",
         "pctrain run --config configs/quickstart.yaml --run.dir=runs/second --run.seed=1",
         "pctrain run --config study.yaml --study.starts='[stable, overfit]'"),
        tuple(Config.model_fields)),
    Command(
        "fit", "ceilings of score-against-compute curves, with intervals", "pctrain fit CURVES [--out FILE]", _fit,
        ("pctrain fit curves.json --out fits.json", "pctrain fit curves.json"),
        notes=("  CURVES         JSON file of score curves against EFLOPs",
               "  --out FILE     where the fits go, a JSON list  [default: fits.json]")),
    Command(
        "report", "report.html, figures and study.json of a finished study", "pctrain report DIR", _report,
        ("pctrain report runs/quickstart",),
        notes=("  DIR            study folder (run.dir of `pctrain run`); the report goes to DIR/report",)),
    Command(
        "data generate", "arithmetic problems with worked solutions, as JSONL files",
        "pctrain data generate [--config FILE] --out DIR [--section.key=value ...]", _data_generate,
        ("pctrain data generate --out data",
         "pctrain data generate --config configs/quickstart.yaml --out data --run.seed=1 --data.problems.max_terms=5"),
        ("run.seed", "data.problems"),
        ("  --out DIR      folder for train.jsonl, validation.jsonl, test.jsonl and rl.jsonl",)),
    Command(
        "convert hf-to-mcore", "a Hugging Face directory as a checkpoint (weights only) that model.checkpoint takes",
        "pctrain convert hf-to-mcore HF CHECKPOINT [--verify] [--section.key=value ...]", _convert,
        ("pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 --verify",
         "torchrun --nproc-per-node=2 -m pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 --parallel.tensor=2"),
        _CONVERT_OPTIONS,
        ("  HF             Hugging Face directory: config.json, safetensors",
         "  CHECKPOINT     new folder, named step-N", _VERIFY)),
    Command(
        "convert mcore-to-hf", "the weights of a checkpoint as a Hugging Face directory",
        "pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF [--verify] [--section.key=value ...]", _convert,
        ("pctrain convert mcore-to-hf runs/sft/checkpoints/step-270 exported --model.path=Qwen3-0.6B --verify",
         "torchrun --nproc-per-node=2 -m pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF --parallel.pipeline=2"),
        _CONVERT_OPTIONS,
        ("  CHECKPOINT     checkpoint folder, such as RUN/checkpoints/step-100, written at any layout",
         "  OUT            new folder; config, tokenizer and the dtypes of the weights as in model.path", _VERIFY)),
)


def _find_command(arguments: list[str]) -> tuple[Command, list[str]]:
    for command in COMMANDS:
        words = command.name.split()
        if arguments[: len(words)] == words:
            return command, arguments[len(words):]
    group = next((c for c in COMMANDS if c.name.split()[0] == arguments[0]), None)
    if group is not None and (len(arguments) == 1 or arguments[1].startswith("-")):
        known = [f"pctrain {c.name}" for c in COMMANDS if c.name.split()[0] == arguments[0]]
        raise UserError(f"pctrain {arguments[0]} needs one more word; known: {', '.join(known)}")
    typed = " ".join(arguments[:2]) if group is not None else arguments[0]
    near = difflib.get_close_matches(typed, [c.name for c in COMMANDS], n=1, cutoff=0.5)
    hint = f"did you mean `pctrain {near[0]}`?" if near else f"commands are: {', '.join(c.name for c in COMMANDS)}"
    raise UserError(f"unknown command {typed!r}; {hint}")


# ---------------------------------------------------------------- arguments


def _config(command: Command, arguments: list[str]) -> Config:
    path, overrides = _take(arguments, "--config")
    sections = {option.split(".")[0] for option in command.options}
    config = config_load.load(Path(path) if path is not None else None, overrides, sections=sections)
    _set_environment()
    return config


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `option VALUE` or `option=VALUE`, and the other arguments."""
    values, rest, position = [], [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == option:
            position += 1
            if position == len(arguments) or arguments[position].startswith("--"):
                raise UserError(f"{option} needs a value")
            values.append(arguments[position])
        elif argument.startswith(f"{option}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
        position += 1
    if len(values) > 1:
        raise UserError(f"{option} is given more than once: {', '.join(values)}")
    if values == [""]:
        raise UserError(f"{option} needs a value")
    return (values[0] if values else None), rest


def _paths(command: Command, arguments: list[str], operands: int) -> tuple[list[Path], Path | None]:
    out, rest = _take(arguments, "--out")
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise UserError(f"pctrain {command.name}: unknown option {unknown[0]!r}; usage: {command.usage}")
    if len(rest) != operands:
        raise UserError(f"pctrain {command.name}: expected {operands} argument(s), got {len(rest)}; usage: {command.usage}")
    _set_environment()
    return [Path(argument) for argument in rest], Path(out) if out is not None else None


def _set_environment() -> None:
    """Settings that libraries read when they are imported. What the user has set stays."""
    defaults = {
        # The engine lives in the learner's process; in a process of its own, weights could not be swapped in place.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The tokenizer's threads and the forks of worker processes do not mix.
        "TOKENIZERS_PARALLELISM": "false",
        # Every model is a local directory; without this a typing error becomes minutes of retries against a hub.
        "HF_HUB_OFFLINE": "1",
        # vLLM's extension tells every rank at its import how it binds memory to the NUMA node.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not _has_gpu():
        # Ranks, engine and verifiers share the cores: two processes of two threads on two cores are ten times slower than of one.
        defaults["OMP_NUM_THREADS"] = "1"
        # Compiling takes longer than a small model's whole run, and vLLM on CPUs would try.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _has_gpu() -> bool:
    """Whether a CUDA device is visible, told without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and os.path.exists("/dev/nvidiactl")


# ---------------------------------------------------------------- help


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  pctrain {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join([
        "Trains language models on expert trajectories, then by reinforcement learning, and tells the ceiling.", "", *lines, "",
        "`pctrain COMMAND --help` shows every option with its unit and default. Start here:", "",
        "  pctrain run --config configs/quickstart.yaml"])


def _command_help(command: Command) -> str:
    lines = [f"usage: {command.usage}", "", command.summary, ""]
    if command.options:
        lines += ["  --config FILE  YAML file with the same tree of keys; the command line goes over it"]
    lines += [*command.notes, "", "examples:", *(f"  {example}" for example in command.examples)]
    if command.options:
        lines += ["", *config_help.option_lines(command.options)]
    return "\n".join(lines)
