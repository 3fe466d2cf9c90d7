"""The typed config tree: every key, with its type, range, default and description.

Each family of sections is in a file of this folder, and all of them can be imported from here. Loading (YAML, command
line, messages with the nearest key) is in `config/load.py`. Nothing heavy is imported: a wrong key is refused in
milliseconds.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.config.data import DataConfig, FieldsConfig, ProblemsConfig, SourceConfig, Sources
from pctrain.config.model import ArchitectureConfig, ModelConfig, ParallelConfig, ResolvedModelConfig, RunConfig
from pctrain.config.sampling import BenchmarkConfig, BenchmarkOrPath, EvalConfig, RewardConfig, RolloutConfig
from pctrain.config.section import Section
from pctrain.config.study import CeilingConfig, StudyConfig
from pctrain.config.training import OptimizerConfig, RLConfig, SFTConfig

__all__ = [
    "ArchitectureConfig",
    "BenchmarkConfig",
    "BenchmarkOrPath",
    "CeilingConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FieldsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProblemsConfig",
    "RLConfig",
    "ResolvedConfig",
    "ResolvedModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "SourceConfig",
    "Sources",
    "StudyConfig",
]


class Config(Section):
    """Everything that a run depends on. `pctrain COMMAND --help` prints it with units and defaults."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    ceiling: CeilingConfig = Field(default_factory=CeilingConfig)
    study: StudyConfig = Field(default_factory=StudyConfig)

    def longest_response(self) -> int:
        """Return the longest response of training and of its scores, in tokens."""
        return max(self.rollout.max_response, self.eval.max_response or 0)

    def longest_rollout(self, context: int) -> int:
        """Return the tokens of the longest prompt with its response, for a model with this context."""
        prompt = self.rollout.max_prompt
        return context if prompt is None else min(context, prompt + self.longest_response())

    def with_model(self, path: Path) -> ResolvedConfig:
        """Return a copy whose model directory is `path`."""
        sections = {name: section.model_copy(deep=True) for name, section in self}
        model = self.model.resolved(path, self.model.checkpoint)
        return ResolvedConfig(**(sections | {"model": model}))


class ResolvedConfig(Config):
    """A config whose model directory is known: what `prepare` returns, and what a run takes."""

    model: ResolvedModelConfig
