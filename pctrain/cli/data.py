"""`pctrain data generate` and `data check`: make problems, and look into files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command, Operands
from pctrain.config.tree import Section
from pctrain.data.sets.options import CheckOptions


class GenerateOptions(Section):
    """Options of `pctrain data generate`."""

    out: Path = Field(description="folder for train.jsonl, validation.jsonl, test.jsonl and rl.jsonl")


def _generate(call: Call[GenerateOptions]) -> None:
    config = call.load_config()
    from pctrain.data import arithmetic

    problems = config.data.problems
    for name, path in arithmetic.write_sets(problems, config.run.seed, call.options.out).items():
        print(f"{path}: {getattr(problems, name)} records")


def _check(call: Call[CheckOptions]) -> None:
    config = call.load_config()
    from pctrain.common.progress import make_console
    from pctrain.data.check import check

    result = check([Path(path) for path in call.operands], config)
    result.show(result.write(call.options.out), make_console())
    if not result.passed:
        raise SystemExit(1)


COMMANDS = (
    Command(
        "data generate",
        "write arithmetic problems with worked solutions as JSONL files",
        "pctrain data generate [--config FILE] --out DIR [--section.key=value ...]",
        _generate,
        (
            "pctrain data generate --out data",
            "pctrain data generate --config configs/quickstart.yaml --out data --run.seed=1 "
            "--data.problems.max_terms=5",
        ),
        GenerateOptions,
        ("run.seed", "data.problems"),
    ),
    Command(
        "data check",
        "what files of trajectories or problems contain, how long the records are, and what is wrong with them",
        "pctrain data check FILE... [--out DIR] [--config FILE] [--model.path=HF] [--section.key=value ...]",
        _check,
        (
            "pctrain data check train.jsonl",
            "pctrain data check 'data/*.parquet' held_out.jsonl.zst --model.path=Qwen2.5-7B --out checked",
            "pctrain data check retu.parquet --data.fields.answer=reward_model.ground_truth",
        ),
        CheckOptions,
        ("model.path", "data.fields", "data.template", "data.loss_on", "data.overlong"),
        Operands(
            "FILE",
            "one or more files",
            1,
            None,
            {"FILE": ".jsonl (also .gz, .zst), .parquet, a folder written by datasets' save_to_disk, or a glob"},
        ),
        "A file with responses is read as trajectories, which need prompt and response; any other file as problems, "
        "which need prompt and answer. With --model.path lengths are also counted in tokens, as SFT counts them, and "
        "compared with the model's context.\n"
        "Exit status: 0 if every record can be used, 1 if one cannot, 2 for bad arguments.",
    ),
)
