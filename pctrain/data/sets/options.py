"""The options of the commands on trajectory sets, one class per command.

`--help` prints them, so nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import Field

from pctrain.config.tree import Config, Section


class OutOptions(Section):
    """The output of a command that writes one set."""

    out: Path = Field(description="new file; its suffix gives the format: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")


class CheckOptions(Section):
    """The options of `pctrain data check`."""

    out: Path = Field(
        Path("data-check"), description="folder for lengths.png (histograms) and check.json (all figures)"
    )


class NearOptions(Section):
    """The options of the search for near-duplicates."""

    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of shingles at which two texts are near-duplicates"
    )
    shingle: Literal["word", "char"] = Field(
        "word", description="units of shingles; words are normalized, and punctuation is ignored"
    )
    ngram: int = Field(5, ge=1, le=100, description="words or characters per shingle")
    num_perm: int = Field(
        128, ge=16, le=1024, description="MinHash permutations; more of them find more of the pairs near the threshold"
    )


class SplitOptions(NearOptions):
    """The options of `pctrain data split`."""

    out: Path = Field(description="new folder for the two sets, manifest.json and dropped.jsonl")
    validation: float = Field(199, gt=0, description="number of records to hold out; below 1, their share")
    near: bool = Field(False, description="also keep near-duplicate questions on the same side")
    seed: int = Field(0, ge=0, lt=2**63, description="seed that decides which questions are held out")


class DedupOptions(OutOptions, NearOptions):
    """The options of `pctrain data dedup`."""

    by: Literal["record", "question", "trajectory"] = Field(
        "record", description="texts to compare: question and trajectory (record), or one of them"
    )
    near: bool = Field(
        True, description="also drop near-duplicates, not only texts that differ in white space, case and Unicode form"
    )


class DecontaminateOptions(OutOptions):
    """The options of `pctrain data decontaminate`."""

    against: list[Path] = Field(min_length=1, description="benchmark file or glob; repeat it for each benchmark")
    n: int = Field(
        13,
        ge=2,
        le=100,
        description="number of words of an n-gram that a record must not share with a benchmark's prompt",
    )
    search: Literal["question", "record"] = Field(
        "question", description="text to search: the question, or also the trajectory (record)"
    )


class SelectOptions(OutOptions):
    """The options of `pctrain data select`."""

    by: str = Field("win_rate", min_length=1, description="column of the win rate, which `pctrain data winrate` writes")
    take: Literal["easy", "uniform", "hard"] | None = Field(
        None,
        description="easy: win rate 1; hard: at most 0.25; uniform: evenly over win rates, needs --size; default: all",
    )
    size: int | None = Field(None, ge=1, description="number of records to select; default: all that qualify")
    prefer: Literal["random", "longest", "shortest"] = Field(
        "random", description="records to prefer if more than --size qualify"
    )
    min_length: int | None = Field(
        None, ge=0, description="minimum trajectory length: tokens if model.path is given, otherwise characters"
    )
    max_length: int | None = Field(
        None, ge=1, description="maximum trajectory length: tokens if model.path is given, otherwise characters"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the random choice")


class WinrateOptions(OutOptions):
    """The options of `pctrain data winrate`."""

    attempts: int = Field(4, ge=1, description="number of responses to sample for each record")


class RankOptions(Section):
    """The options of `pctrain data rank`."""

    out: Path = Field(
        description="folder for rank.json, manifest.json, validation_loss.png, and a run folder NAME/seed-S per probe"
    )
    candidate: list[str] = Field(
        default_factory=list, description="NAME=PATH of a candidate set (file, glob or folder); repeat it for each"
    )
    candidates: str | None = Field(
        None, min_length=1, description="the same as a list: [{name: a, path: a.jsonl}, ...]"
    )
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="seeds of the probes of each candidate, separated by commas"
    )


Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True)
class CommandCall(Generic[Options]):
    """One call of a command on trajectory sets.

    `arguments` are the arguments as typed, for the manifest; `paths` are the FILE operands.
    """

    command: str
    arguments: list[str]
    paths: list[str]
    options: Options
    config: Config
