"""`pctrain data ...`: the commands that make, look at and choose sets of trajectories."""

from __future__ import annotations

from pathlib import Path

from pctrain import cli_sets
from pctrain.cli_arguments import Command, resolve_config, take
from pctrain.errors import UserError


def _data_generate(command: Command, arguments: list[str]) -> None:
    out, arguments = take(arguments, "--out")
    if out is None:
        raise UserError("pctrain data generate needs --out DIR, the folder to write the problems into")
    config = resolve_config(command, arguments)
    from pctrain.data import arithmetic

    for name, path in arithmetic.write_sets(config.data.problems, config.run.seed, Path(out)).items():
        print(f"{path}: {getattr(config.data.problems, name)} records")


COMMANDS = (
    Command(
        "data generate", "arithmetic problems with worked solutions, as JSONL files",
        "pctrain data generate [--config FILE] --out DIR [--section.key=value ...]", _data_generate,
        ("pctrain data generate --out data",
         "pctrain data generate --config configs/quickstart.yaml --out data --run.seed=1 --data.problems.max_terms=5"),
        ("run.seed", "data.problems"),
        ("  --out DIR      folder for train.jsonl, validation.jsonl, test.jsonl and rl.jsonl",)),
    *cli_sets.COMMANDS,
)
