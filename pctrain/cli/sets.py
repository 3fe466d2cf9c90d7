"""The commands that make trajectory sets out of trajectory sets: `pctrain data split`, `dedup`, `decontaminate`, ...

Each takes any file that training takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pctrain.cli.command import Call, Command, Operands
from pctrain.common.errors import UserError
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

_FILES = Operands(
    "FILE",
    "one or more files",
    1,
    None,
    {
        "FILE": "JSONL (also .gz, .zst) or parquet file, glob, or folder of a Hugging Face data set; several are read "
        "in order"
    },
)
_REPORTS = (
    "FILE.manifest.json (inputs, counts, versions) and FILE.dropped.jsonl (each dropped record with the reason and the "
    "evidence) are written next to the output file."
)

_MODULES = {
    "data split": "pctrain.data.sets.split",
    "data dedup": "pctrain.data.sets.dedup",
    "data decontaminate": "pctrain.data.sets.decontaminate",
    "data select": "pctrain.data.sets.select",
    "data winrate": "pctrain.evaluate.winrate",
}


def _make_set(call: Call[Any]) -> None:
    config = call.load_config()
    module = import_module(_MODULES[call.command.name])
    module.main(CommandCall(call.command.name, call.arguments, call.operands, call.options, config))


def _rank(call: Call[RankOptions]) -> None:
    candidates = read_candidates(call.options)
    if any(setting.startswith("--data.train") for setting in call.settings):
        raise UserError(f"pctrain {call.command.name}: each probe trains on its candidate; leave out --data.train")
    if call.read_config().data.validation is None:
        raise UserError(
            f"pctrain {call.command.name} needs --data.validation=FILE, one held-out set for all candidates"
        )
    # The checks want a training set. Each probe later trains on its own candidate.
    config = call.load_config(f"--data.train={next(iter(candidates.values()))}")
    from pctrain.study.rank import main

    main(CommandCall(call.command.name, call.arguments, [], call.options, config), candidates)


COMMANDS = (
    Command(
        "data split",
        "hold out validation records, so that no question is on both sides",
        "pctrain data split FILE... --out DIR [--validation=199] [--near] [--seed=0]",
        _make_set,
        (
            "pctrain data split trajectories.jsonl --out sets/split",
            "pctrain data split 'parts/*.parquet' --out sets/split --validation=0.01 --near --seed=1",
        ),
        SplitOptions,
        ("data.fields", "data.workers"),
        _FILES,
        "Questions are compared after Unicode NFKC, case folding and collapsing white space. At the end both sets "
        "are read again and the questions they share are counted: 0.",
    ),
    Command(
        "data dedup",
        "drop records that repeat another one exactly or nearly",
        "pctrain data dedup FILE... --out FILE [--by=record|question|trajectory] [--near=false]",
        _make_set,
        (
            "pctrain data dedup raw.jsonl --out deduped.jsonl",
            "pctrain data dedup raw.jsonl.zst --out deduped.parquet --by=question --near=false",
            "pctrain data dedup raw.jsonl --out deduped.jsonl --shingle=char --ngram=8 --threshold=0.9",
        ),
        DedupOptions,
        ("data.fields", "data.workers"),
        _FILES,
        f"{_REPORTS}\nOf several duplicates the first record stays. MinHash finds near-duplicates, and the exact "
        "Jaccard similarity of their shingles confirms them. Two long problems that differ in one number count as "
        "near-duplicates.",
    ),
    Command(
        "data decontaminate",
        "drop records that contain a benchmark's problems",
        "pctrain data decontaminate FILE... --against=FILE [--against=FILE ...] --out FILE [--n=13]",
        _make_set,
        (
            "pctrain data decontaminate train.jsonl --against=math500.jsonl --against=aime24.parquet --out clean.jsonl",
            "pctrain data decontaminate train.jsonl --against=gsm8k.jsonl --out clean.jsonl --n=10 --search=record",
        ),
        DecontaminateOptions,
        ("data.fields",),
        _FILES,
        f"{_REPORTS}\nWhite space, case, punctuation and LaTeX typesetting are ignored. A prompt with fewer than n "
        "words is matched as a whole, one with fewer than 5 only as a whole question. N-grams that 10% of a "
        "benchmark's prompts share are not matched.",
    ),
    Command(
        "data winrate",
        "measure how often a model answers each record correctly",
        "pctrain data winrate FILE... --out FILE --model.path=HF [--attempts=4] [--section.key=value ...]",
        _make_set,
        (
            "pctrain data winrate train.jsonl --out rated.jsonl --model.path=Qwen2.5-1.5B --rollout.max_response=4096",
            "torchrun --nproc-per-node=8 -m pctrain data winrate train.parquet --out rated.parquet "
            "--model.path=Qwen2.5-7B",
        ),
        WinrateOptions,
        ("run.seed", "model", "parallel", "data.fields", "data.template", "rollout", "reward", "eval"),
        _FILES,
        "Adds win_rate, attempts and win_rate_model to each record. The gold answer is the record's answer, or else "
        "the last box of its trajectory. After an interruption the same command resumes from FILE.partial.",
    ),
    Command(
        "data select",
        "select a subset by win rate, length and size",
        "pctrain data select FILE... --out FILE [--take=easy|uniform|hard] [--size=N] [--prefer=longest]",
        _make_set,
        (
            "pctrain data select rated.jsonl --out hard.jsonl --take=hard --size=102000",
            "pctrain data select rated.jsonl --out even.jsonl --take=uniform --size=102000 --max-length=16384 "
            "--model.path=Qwen2.5-7B",
            "pctrain data select all.jsonl --out s1k.jsonl --size=1000 --prefer=longest",
        ),
        SelectOptions,
        ("data.fields", "model.path"),
        _FILES,
        _REPORTS,
    ),
    Command(
        "data rank",
        "rank candidate sets by the minimum validation loss of short SFT probes, which predicts the ceiling",
        "pctrain data rank --candidate=NAME=PATH ... --data.validation=FILE --out DIR [--section.key=value ...]",
        _rank,
        (
            "pctrain data rank --candidate=easy=easy.jsonl --candidate=hard=hard.jsonl "
            "--data.validation=validation.jsonl --out rank --model.path=Qwen2.5-0.5B --sft.steps=300 "
            "--sft.val_every=20",
            "pctrain data rank --config probe.yaml --candidates='[{name: a, path: a.jsonl}, {name: b, path: b.jsonl}]' "
            "--out rank",
        ),
        RankOptions,
        ("model", "parallel", "data", "sft"),
        Operands(hint="candidates are given as --candidate=NAME=PATH"),
        "All probes share the starting weights, steps and batch size; the seed only orders the data. After an "
        "interruption the same command resumes.",
    ),
)
