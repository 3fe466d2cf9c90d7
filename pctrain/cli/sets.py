"""The commands that make trajectory sets out of trajectory sets. Each takes any files that training takes, and options of its own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from pctrain.cli.arguments import Command, resolve_config, take
from pctrain.cli.options import parse, parse_with_config
from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.help import own_option_lines
from pctrain.config.tree import Section
from pctrain.data.sets.candidates import read_candidates
from pctrain.data.sets.options import (
    CommandCall,
    DecontaminateOptions,
    DedupOptions,
    RankOptions,
    SelectOptions,
    SplitOptions,
    WinrateOptions,
)

_FILES = "  FILE           JSONL (also .gz, .zst) or parquet file, glob, or folder of a Hugging Face data set; several are read in order"
_LEFT = (
    "",
    "Beside FILE it writes FILE.manifest.json (inputs, counts, versions) and FILE.dropped.jsonl (each dropped record, why,",
    "and what shows it).",
)
_ENGINE = ("run.seed", "model", "parallel", "data.fields", "data.template", "rollout", "reward", "eval")

# {command: (module whose `main` runs it, its options)}
_SETS: dict[str, tuple[str, type[Section]]] = {
    "data split": ("pctrain.data.sets.split", SplitOptions),
    "data dedup": ("pctrain.data.sets.dedup", DedupOptions),
    "data decontaminate": ("pctrain.data.sets.decontaminate", DecontaminateOptions),
    "data select": ("pctrain.data.sets.select", SelectOptions),
    "data winrate": ("pctrain.evaluate.winrate", WinrateOptions),
    "data rank": ("pctrain.study.rank", RankOptions),
}


def _make_set(command: Command, arguments: list[str]) -> None:
    module, kind = _SETS[command.name]
    paths, options, config = parse_with_config(command, arguments, kind)
    import_module(module).main(CommandCall(command.name, arguments, paths, options, config))


def _rank(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, RankOptions)
    if operands:
        raise UserError(
            f"pctrain {command.name}: unexpected argument {operands[0]!r}; candidates are given as --candidate=NAME=PATH"
        )
    candidates = read_candidates(options)
    if any(argument.startswith("--data.train") for argument in rest):
        raise UserError(f"pctrain {command.name}: the candidates are what is trained on; leave out --data.train")
    rest.append(
        f"--data.train={next(iter(candidates.values()))}"
    )  # in its place for the checks: each probe has its own
    path, overrides = take(rest, "--config")
    if config_load.read(Path(path) if path else None, overrides).data.validation is None:
        raise UserError(f"pctrain {command.name} needs --data.validation=FILE, one held-out set for all candidates")
    config = resolve_config(command, rest)
    from pctrain.study.rank import main

    main(CommandCall(command.name, arguments, [], options, config), candidates)


def _notes(name: str, *more: str) -> tuple[str, ...]:
    operands = () if name == "data rank" else (_FILES,)
    return (*operands, *own_option_lines(_SETS[name][1]), *more)


COMMANDS = (
    Command(
        "data split",
        "held-out validation records, no question on both sides",
        "pctrain data split FILE... --out DIR [--validation=199] [--near] [--seed=0]",
        _make_set,
        (
            "pctrain data split trajectories.jsonl --out sets/split",
            "pctrain data split 'parts/*.parquet' --out sets/split --validation=0.01 --near --seed=1",
        ),
        ("data.fields", "data.workers"),
        _notes(
            "data split",
            "",
            "Questions are compared after Unicode NFKC, case folding and collapsing white space. Both sets are read",
            "again at the end, and the questions they share are counted: 0.",
        ),
    ),
    Command(
        "data dedup",
        "one record of those that say the same or nearly the same",
        "pctrain data dedup FILE... --out FILE [--by=record|question|trajectory] [--near=false]",
        _make_set,
        (
            "pctrain data dedup raw.jsonl --out deduped.jsonl",
            "pctrain data dedup raw.jsonl.zst --out deduped.parquet --by=question --near=false",
            "pctrain data dedup raw.jsonl --out deduped.jsonl --shingle=char --ngram=8 --threshold=0.9",
        ),
        ("data.fields", "data.workers"),
        _notes(
            "data dedup",
            *_LEFT,
            "The first record stays. Near-duplicates are found by MinHash and confirmed by the exact Jaccard",
            "similarity of their shingles. Long problems that differ in one number are near to each other.",
        ),
    ),
    Command(
        "data decontaminate",
        "without the records that hold a benchmark's problems",
        "pctrain data decontaminate FILE... --against=FILE [--against=FILE ...] --out FILE [--n=13]",
        _make_set,
        (
            "pctrain data decontaminate train.jsonl --against=math500.jsonl --against=aime24.parquet --out clean.jsonl",
            "pctrain data decontaminate train.jsonl --against=gsm8k.jsonl --out clean.jsonl --n=10 --search=record",
        ),
        ("data.fields",),
        _notes(
            "data decontaminate",
            *_LEFT,
            "White space, case, punctuation and LaTeX typesetting are not seen. A prompt of fewer than n",
            "words is looked for as a whole, one of fewer than 5 as a whole question. N-grams that 10 % of a benchmark's",
            "prompts share are not looked for.",
        ),
    ),
    Command(
        "data winrate",
        "how often a model answers each record rightly",
        "pctrain data winrate FILE... --out FILE --model.path=HF [--attempts=4] [--section.key=value ...]",
        _make_set,
        (
            "pctrain data winrate train.jsonl --out rated.jsonl --model.path=Qwen2.5-1.5B --rollout.max_response=4096",
            "torchrun --nproc-per-node=8 -m pctrain data winrate train.parquet --out rated.parquet --model.path=Qwen2.5-7B",
        ),
        ("run.seed", "model", "parallel", "data.fields", "data.template", "rollout", "reward", "eval"),
        _notes(
            "data winrate",
            "",
            "Adds win_rate, attempts and win_rate_model to each record. The answer is the record's own, or else the",
            "last box of its trajectory. Stopped at any moment, the same command goes on from FILE.partial.",
        ),
    ),
    Command(
        "data select",
        "a subset by win rate, length and size",
        "pctrain data select FILE... --out FILE [--take=easy|uniform|hard] [--size=N] [--prefer=longest]",
        _make_set,
        (
            "pctrain data select rated.jsonl --out hard.jsonl --take=hard --size=102000",
            "pctrain data select rated.jsonl --out even.jsonl --take=uniform --size=102000 --max_length=16384 --model.path=Qwen2.5-7B",
            "pctrain data select all.jsonl --out s1k.jsonl --size=1000 --prefer=longest",
        ),
        ("data.fields", "model.path"),
        _notes("data select", *_LEFT),
    ),
    Command(
        "data rank",
        "candidate sets by the minimum validation loss of short SFT probes, the predictor of the ceiling",
        "pctrain data rank --candidate=NAME=PATH ... --data.validation=FILE --out DIR [--section.key=value ...]",
        _rank,
        (
            "pctrain data rank --candidate=easy=easy.jsonl --candidate=hard=hard.jsonl --data.validation=validation.jsonl --out rank "
            "--model.path=Qwen2.5-0.5B --sft.steps=300 --sft.val_every=20",
            "pctrain data rank --config probe.yaml --candidates='[{name: a, path: a.jsonl}, {name: b, path: b.jsonl}]' --out rank",
        ),
        ("model", "parallel", "data", "sft"),
        _notes(
            "data rank",
            "",
            "All probes have the same start, steps and batch; a seed decides the order of the data. Stopped at any",
            "moment, the same command goes on.",
        ),
    ),
)
