"""The models of an evaluation enter the engine one by one, on a GPU without room for both engine and learner."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import pctrain.core
import pctrain.evaluate.engine as engine_module
from pctrain.config.tree import Config
from pctrain.core import Learner, checkpoint
from pctrain.evaluate.engine import SharedEngine
from pctrain.evaluate.targets import Target
from pctrain.rollout import RolloutEngine, WeightUpdate
from tests.helpers.stand_ins import check_stand_in


class Engine:
    """Replaces RolloutEngine. `awake`: it holds memory."""

    awake = False

    def __init__(self, hf_dir, rollout, *, dtype, context, eos_id):
        Engine.awake = True

    def sleep(self) -> None:
        Engine.awake = False

    def load_weights(self, stream) -> WeightUpdate:
        Engine.awake = True
        return WeightUpdate(0.0, sum(1 for _ in stream))

    def close_after(self, error) -> None:
        Engine.awake = False


class Model:
    """Replaces Learner, which needs memory that an engine awake has taken."""

    chunks = ()

    def __init__(self, config, par, *, optimizer_config, total_steps, seed):
        assert not Engine.awake, "the learner is built while the engine is awake"

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


def load_checkpoint(directory, chunks) -> None:
    assert not Engine.awake, "a checkpoint is loaded while the engine is awake"


@pytest.mark.parametrize("first", [0, 1])
def test_the_engine_sleeps_while_the_learner_takes_another_model(first, monkeypatch, tmp_path):
    check_stand_in(Engine, RolloutEngine, own=("awake",))
    check_stand_in(Model, Learner)
    check_stand_in(load_checkpoint, checkpoint.load_weights)
    monkeypatch.setattr(engine_module, "RolloutEngine", Engine)
    monkeypatch.setattr(engine_module, "hf_weights", lambda hf_dir, dtype, tied: iter(()))
    monkeypatch.setattr(engine_module.session, "verify", lambda path, error: None)
    monkeypatch.setattr(pctrain.core, "Learner", Model)
    monkeypatch.setattr(checkpoint, "load_weights", load_checkpoint)
    hf_dir, steps = tmp_path / "hf", [tmp_path / "step-1", tmp_path / "step-2"]
    targets = [Target("hf", hf_dir, hf_dir), *(Target(path.name, path, hf_dir, checkpoint=path) for path in steps)]
    config = Config()
    monkeypatch.setattr(type(config.model), "resolved", lambda self, path, checkpoint: self)
    with SharedEngine(config, SimpleNamespace(tied=False), context=64, eos_id=2) as shared:
        for target in targets[first:]:
            shared.load(target)
            assert Engine.awake
