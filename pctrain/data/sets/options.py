"""The options of the commands that read trajectory sets, one class a command. Nothing heavy is imported here: `--help` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import Field

from pctrain.config.tree import Config, Section


class OutOptions(Section):
    out: Path = Field(description="new file; its suffix gives the form: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")


class CheckOptions(Section):
    out: Path = Field(
        Path("data-check"), description="folder for lengths.png (histograms) and check.json (all figures)"
    )


class NearOptions(Section):
    """How near-duplicates are found."""

    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of shingles from which two texts are near-duplicates"
    )
    shingle: Literal["word", "char"] = Field(
        "word", description="what shingles are made of; words are normalised, punctuation is not seen"
    )
    ngram: int = Field(5, ge=1, le=100, description="length of a shingle, words or characters")
    num_perm: int = Field(
        128, ge=16, le=1024, description="MinHash permutations: more find more of the pairs near the threshold"
    )


class SplitOptions(NearOptions):
    out: Path = Field(description="new folder for the two sets, manifest.json and dropped.jsonl")
    validation: float = Field(199, gt=0, description="held-out records; below 1 their share")
    near: bool = Field(False, description="keep questions that are near-duplicates on one side as well")
    seed: int = Field(0, ge=0, lt=2**63, description="which questions are held out")


class DedupOptions(OutOptions, NearOptions):
    by: Literal["record", "question", "trajectory"] = Field(
        "record", description="what is compared: question and trajectory, or one"
    )
    near: bool = Field(
        True, description="drop near-duplicates, not only texts equal but for white space, case and Unicode form"
    )


class DecontaminateOptions(OutOptions):
    against: list[Path] = Field(min_length=1, description="benchmark file or glob; once for each benchmark")
    n: int = Field(
        13, ge=2, le=100, description="words of an n-gram that a record must not share with a benchmark's prompt"
    )
    search: Literal["question", "record"] = Field(
        "question", description="where it is looked for: the question, or the trajectory as well"
    )


class SelectOptions(OutOptions):
    by: str = Field("win_rate", min_length=1, description="column of the win rate, which `pctrain data winrate` writes")
    take: Literal["easy", "uniform", "hard"] | None = Field(
        None,
        description="easy: win rate 1; hard: at most 0.25; uniform: evenly over the win rates, needs --size; default: any",
    )
    size: int | None = Field(None, ge=1, description="records to select; default: all that qualify")
    prefer: Literal["random", "longest", "shortest"] = Field(
        "random", description="which ones, where more qualify than --size"
    )
    min_length: int | None = Field(
        None, ge=0, description="shortest trajectory: characters, or tokens where model.path gives a tokenizer"
    )
    max_length: int | None = Field(
        None, ge=1, description="longest trajectory: characters, or tokens where model.path gives a tokenizer"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the random choice")


class WinrateOptions(OutOptions):
    attempts: int = Field(4, ge=1, description="answers sampled for each record")


class RankOptions(Section):
    out: Path = Field(
        description="folder: a run folder for each probe in NAME/seed-S, rank.json, manifest.json, validation_loss.png"
    )
    candidate: list[str] = Field(
        default_factory=list, description="NAME=PATH of a candidate set: file, glob or folder; once for each"
    )
    candidates: str | None = Field(
        None, min_length=1, description="the same as a list: [{name: a, path: a.jsonl}, ...]"
    )
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="seeds of the probes of a candidate, with commas between"
    )


Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True)
class Request(Generic[Options]):
    """One call of a command. `arguments`: as they were typed, for the manifest; `paths`: the FILE operands; `config`: for `data.fields`,
    and what else the command reads of it."""

    command: str
    arguments: list[str]
    paths: list[str]
    options: Options
    config: Config
