"""Section `data`: trajectories and problems, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pctrain.common.errors import UserError
from pctrain.config.section import Section


class ProblemsConfig(Section):
    """Generated arithmetic problems with worked solutions. Used if `data.train` is not given."""

    min_terms: int = Field(3, ge=2, le=12, description="minimum number of terms in a problem")
    max_terms: int = Field(4, ge=2, le=12, description="maximum number of terms in a problem")
    max_operand: int = Field(9, ge=1, le=9999, description="largest operand")
    train: int = Field(600, ge=1, description="expert trajectories for SFT, records")
    validation: int = Field(200, ge=1, description="held-out trajectories for the validation loss, records")
    test: int = Field(512, ge=1, description="held-out problems for the score, records")
    rl: int = Field(
        2000, ge=1, description="problems for RL, records; only algorithms with experts read their solutions"
    )
    vocab_size: int = Field(320, ge=270, description="upper bound of the SentencePiece vocabulary, pieces")


class SourceConfig(Section):
    """One source of trajectories."""

    path: Path = Field(description="file, glob (*, ?, [], **) of files, or folder written by datasets' save_to_disk")
    weight: float = Field(
        1.0, gt=0, description="passes per epoch: 2 shows every trajectory twice, 0.5 shows every other one"
    )
    name: str | None = Field(
        None, min_length=1, description="name in metrics; default: the last part of the path without its suffix"
    )


def _as_sources(value: Any) -> Any:
    """Turn `train.jsonl`, `{path: ..., weight: 2}` or a list of these into a list of sources."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, (str, Path)) else item for item in items]


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources), Field(min_length=1)]


class FieldsConfig(Section):
    """Names of a record's fields.

    A dot enters an object, a number a list: `extra_info.question`, `prompt.0.content`. A field that is not named is
    looked for in the columns of known layouts: `messages`; RETU's; or `prompt`, `response`, `answer`.
    """

    prompt: str | None = Field(None, min_length=1, description="column of the prompt; default: found by its name")
    response: str | None = Field(
        None, min_length=1, description="column of the expert's response; default: found by its name"
    )
    answer: str | None = Field(None, min_length=1, description="column of the gold answer; default: found by its name")
    messages: str | None = Field(
        None, min_length=1, description="column of a chat, [{role, content}, ...], used instead of prompt and response"
    )


class DataConfig(Section):
    """The data sets and the rules for records that do not fit."""

    train: Sources | None = Field(
        None,
        description="expert trajectories: a path, or [{path, weight, name}, ...] for several sources; default: "
        "generated arithmetic",
    )
    validation: Sources | None = Field(
        None, description="held-out trajectories for the validation loss; each counts once, weights are ignored"
    )
    test: Path | None = Field(None, description="problems to score on (prompt, answer): file, glob or folder")
    rl: Path | None = Field(
        None,
        description="problems for RL (prompt, answer; also response for algorithms with experts): file, glob or folder",
    )
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    template: str = Field(
        "auto", description="chat template: auto (the model directory's, if it has one), none, or a Jinja file"
    )
    loss_on: Literal["last", "all"] = Field("last", description="which assistant turns of a chat are trained on")
    overlong: Literal["error", "drop", "right"] = Field(
        "error",
        description="what to do with a trajectory longer than the context or sft.token_budget: stop, or count it and "
        "drop it (drop) or cut its end (right). RL problems longer than rollout.max_prompt, or whose expert is "
        "longer than rollout.max_response, stop the run or are counted and dropped (drop and right)",
    )
    unusable: Literal["error", "drop"] = Field(
        "error",
        description="what to do with a record without a trainable token, or that the template cannot mask: stop, or "
        "drop and count it",
    )
    cache: Path | None = Field(
        None, description="folder for tokenized data, which runs may share; default: `tokens` in run.dir"
    )
    workers: int | None = Field(None, ge=1, description="tokenizer processes; default: one per core")
    problems: ProblemsConfig = Field(default_factory=ProblemsConfig)

    # A config names only some of the sets. The checks of a command refuse a config without a set that it needs, so
    # these fail only for a caller that skipped the checks.

    def train_sources(self) -> list[SourceConfig]:
        """Return `data.train`. UserError if it is not given."""
        if self.train is None:
            raise UserError("data.train is not given: SFT needs expert trajectories")
        return self.train

    def validation_sources(self) -> list[SourceConfig]:
        """Return `data.validation`. UserError if it is not given."""
        if self.validation is None:
            raise UserError("data.validation is not given: SFT needs held-out trajectories")
        return self.validation

    def test_problems(self) -> Path:
        """Return `data.test`. UserError if it is not given."""
        if self.test is None:
            raise UserError("data.test is not given: a score needs problems")
        return self.test

    def rl_problems(self) -> Path:
        """Return `data.rl`. UserError if it is not given."""
        if self.rl is None:
            raise UserError("data.rl is not given: RL needs problems to sample")
        return self.rl
