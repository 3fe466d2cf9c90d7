"""The commands that make trajectory sets out of trajectory sets. Each takes any files that training takes, and options of its own."""

from __future__ import annotations

from importlib import import_module

from pctrain.cli_arguments import Command
from pctrain.cli_options import parse_with_config
from pctrain.config import Section
from pctrain.config_help import own_option_lines
from pctrain.data.sets.options import DecontaminateOptions, DedupOptions, Request, SelectOptions, SplitOptions, WinrateOptions

_FILES = ("  FILE           JSONL (also .gz, .zst) or parquet file, glob, or folder of a Hugging Face data set; several are read in order",)
_LEFT = ("", "Beside FILE it writes FILE.manifest.json (inputs, counts, versions) and FILE.dropped.jsonl (each dropped record, why, and what shows it).")
_ENGINE = ("run.seed", "model", "parallel", "data.fields", "rollout", "reward", "eval")

# {command: (module whose `main` runs it, its options)}
_SETS: dict[str, tuple[str, type[Section]]] = {
    "data split": ("pctrain.data.sets.split", SplitOptions),
    "data dedup": ("pctrain.data.sets.dedup", DedupOptions),
    "data decontaminate": ("pctrain.data.sets.decontaminate", DecontaminateOptions),
    "data select": ("pctrain.data.sets.select", SelectOptions),
    "data winrate": ("pctrain.evaluate.winrate", WinrateOptions),
}


def _make_set(command: Command, arguments: list[str]) -> None:
    module, kind = _SETS[command.name]
    paths, options, config = parse_with_config(command, arguments, kind)
    import_module(module).main(Request(command.name, arguments, paths, options, config))


def _notes(name: str, *more: str) -> tuple[str, ...]:
    return (*_FILES, *own_option_lines(_SETS[name][1]), *more, "")


COMMANDS = (
    Command(
        "data split", "held-out validation records, no question on both sides",
        "pctrain data split FILE... --out DIR [--validation=199] [--near] [--seed=0]", _make_set,
        ("pctrain data split trajectories.jsonl --out sets/split",
         "pctrain data split 'parts/*.parquet' --out sets/split --validation=0.01 --near --seed=1"),
        ("data.fields",),
        _notes("data split", "", "Questions are compared after Unicode NFKC, case folding and collapsing white space. Both sets are read again",
               "at the end, and the questions they share are counted: 0.")),
    Command(
        "data dedup", "one record of those that say the same or nearly the same",
        "pctrain data dedup FILE... --out FILE [--by=record|question|trajectory] [--near=false]", _make_set,
        ("pctrain data dedup raw.jsonl --out deduped.jsonl",
         "pctrain data dedup raw.jsonl.zst --out deduped.parquet --by=question --near=false",
         "pctrain data dedup raw.jsonl --out deduped.jsonl --shingle=char --ngram=8 --threshold=0.9"),
        ("data.fields",),
        _notes("data dedup", *_LEFT, "The first record stays. Near-duplicates are found by MinHash and confirmed by the exact Jaccard similarity of",
               "their shingles. Short problems that differ in one number are near to each other by characters, not by words.")),
    Command(
        "data decontaminate", "without the records that hold a benchmark's problems",
        "pctrain data decontaminate FILE... --against=FILE [--against=FILE ...] --out FILE [--n=13]", _make_set,
        ("pctrain data decontaminate train.jsonl --against=math500.jsonl --against=aime24.parquet --out clean.jsonl",
         "pctrain data decontaminate train.jsonl --against=gsm8k.jsonl --out clean.jsonl --n=10 --search=record"),
        ("data.fields",),
        _notes("data decontaminate", *_LEFT, "White space, case, punctuation and LaTeX typesetting are not seen. A prompt of fewer than n words is looked",
               "for as a whole, one of fewer than 5 as a whole question. N-grams that 10 % of a benchmark share are not looked for.")),
    Command(
        "data winrate", "how often a model answers each record rightly",
        "pctrain data winrate FILE... --out FILE --model.path=HF [--attempts=4] [--section.key=value ...]", _make_set,
        ("pctrain data winrate train.jsonl --out rated.jsonl --model.path=Qwen2.5-1.5B --rollout.max_response=4096",
         "torchrun --nproc-per-node=8 -m pctrain data winrate train.parquet --out rated.parquet --model.path=Qwen2.5-7B"),
        _ENGINE,
        _notes("data winrate", "", "Adds win_rate, attempts and win_rate_model to each record. The answer is the record's own, or else the last box of its",
               "trajectory. Stopped at any moment, the same command goes on from FILE.partial.")),
    Command(
        "data select", "a subset by win rate, length and size",
        "pctrain data select FILE... --out FILE [--take=easy|uniform|hard] [--size=N] [--prefer=longest]", _make_set,
        ("pctrain data select rated.jsonl --out hard.jsonl --take=hard --size=102000",
         "pctrain data select rated.jsonl --out uniform.jsonl --take=uniform --size=102000 --max_length=16384 --model.path=Qwen2.5-7B",
         "pctrain data select all.jsonl --out s1k.jsonl --size=1000 --prefer=longest"),
        ("data.fields", "model.path"),
        _notes("data select", *_LEFT)),
)
