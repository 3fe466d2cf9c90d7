"""`pctrain data ...`: the commands that make, look at and choose sets of trajectories."""

from __future__ import annotations

from pathlib import Path

from pctrain.cli import sets as cli_sets
from pctrain.cli.arguments import Command, resolve_config, take
from pctrain.cli.options import parse_with_config
from pctrain.common.errors import UserError
from pctrain.config.help import own_option_lines
from pctrain.data.sets.options import CheckOptions


def _data_generate(command: Command, arguments: list[str]) -> None:
    out, arguments = take(arguments, "--out")
    if out is None:
        raise UserError("pctrain data generate needs --out DIR, the folder to write the problems into")
    config = resolve_config(command, arguments)
    from pctrain.data import arithmetic

    for name, path in arithmetic.write_sets(config.data.problems, config.run.seed, Path(out)).items():
        print(f"{path}: {getattr(config.data.problems, name)} records")


def _data_check(command: Command, arguments: list[str]) -> None:
    paths, options, config = parse_with_config(command, arguments, CheckOptions)
    from pctrain.common.progress import make_console
    from pctrain.data.check import check

    result = check([Path(path) for path in paths], config)
    result.show(result.write(options.out), make_console())
    if not result.passed:
        raise SystemExit(1)


COMMANDS = (
    Command(
        "data generate",
        "arithmetic problems with worked solutions, as JSONL files",
        "pctrain data generate [--config FILE] --out DIR [--section.key=value ...]",
        _data_generate,
        (
            "pctrain data generate --out data",
            "pctrain data generate --config configs/quickstart.yaml --out data --run.seed=1 --data.problems.max_terms=5",
        ),
        ("run.seed", "data.problems"),
        ("  --out DIR      folder for train.jsonl, validation.jsonl, test.jsonl and rl.jsonl",),
    ),
    Command(
        "data check",
        "what is in files of trajectories or problems, how long they are, and what is wrong with them",
        "pctrain data check FILE... [--out DIR] [--config FILE] [--model.path=HF] [--section.key=value ...]",
        _data_check,
        (
            "pctrain data check train.jsonl",
            "pctrain data check 'data/*.parquet' held_out.jsonl.zst --model.path=Qwen2.5-7B --out checked",
            "pctrain data check retu.parquet --data.fields.answer=reward_model.ground_truth",
        ),
        ("model.path", "data.fields", "data.template", "data.loss_on", "data.overlong"),
        (
            "  FILE           .jsonl (also .gz, .zst), .parquet, a folder of datasets' save_to_disk, or a glob of these",
            *own_option_lines(CheckOptions),
            "",
            "A file with responses is read as trajectories, which need prompt and response; any other as problems: prompt and answer.",
            "With --model.path lengths are also counted in tokens, as SFT makes them, and compared with the model's context.",
            "Exit status: 0 where every record can be used, 1 where one cannot, 2 for bad arguments.",
        ),
    ),
    *cli_sets.COMMANDS,
)
