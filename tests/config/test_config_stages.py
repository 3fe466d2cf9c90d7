"""Pipeline layouts and schedules that are refused before anything is imported, and the messages."""

import os
from unittest import mock

import pytest

from pctrain.common.errors import UserError
from pctrain.config.load import load


def _check(*options, layers=8):
    pipeline = next((int(o.split("=")[1]) for o in options if "pipeline=" in o and "virtual" not in o), 1)
    with mock.patch.dict(os.environ, WORLD_SIZE=str(pipeline)):
        load(None, [f"--model.architecture.layers={layers}", *options])


@pytest.mark.parametrize(
    "options",
    [
        "--parallel.pipeline=4",
        "--parallel.pipeline=2 --parallel.virtual_pipeline=4",
        "--parallel.pipeline=2 --parallel.first_stage_layers=3",
        "--parallel.pipeline=2 --parallel.first_stage_layers=3 --parallel.last_stage_layers=5",
        "--parallel.pipeline=4 --parallel.first_stage_layers=1 --parallel.last_stage_layers=1",
        "--parallel.pipeline=3 --parallel.first_stage_layers=2 --parallel.last_stage_layers=4 "
        "--parallel.virtual_pipeline=2",
        "--sft.optimizer.schedule=wsd --sft.steps=100 --sft.optimizer.warmup=20 --sft.optimizer.decay=80",
    ],
)
def test_accepted(options):
    _check(*options.split())


@pytest.mark.parametrize(
    "options, words",
    [
        ("--parallel.virtual_pipeline=2", ["parallel.virtual_pipeline = 2", "parallel.pipeline above 1"]),
        ("--parallel.first_stage_layers=2", ["parallel.first_stage_layers = 2", "parallel.pipeline above 1"]),
        ("--parallel.pipeline=16", ["16 stages", "8 layers"]),
        ("--parallel.pipeline=3", ["parallel.pipeline = 3 does not divide the layers: 8 (model.architecture)"]),
        (
            "--parallel.pipeline=4 --parallel.first_stage_layers=3",
            ["parallel.first_stage_layers = 3", "leave 5 of the 8 layers", "other 3 of"],
        ),
        ("--parallel.pipeline=2 --parallel.last_stage_layers=8", ["leave 0 of the 8 layers", "other 1 of"]),
        (
            "--parallel.pipeline=2 --parallel.first_stage_layers=3 --parallel.last_stage_layers=4",
            ["leave 1 of the 8 layers", "other 0 of"],
        ),
        (
            "--parallel.pipeline=2 --parallel.virtual_pipeline=3",
            ["parallel.virtual_pipeline = 3", "4 layers of a pipeline stage"],
        ),
        (
            "--parallel.pipeline=2 --parallel.virtual_pipeline=2 --parallel.first_stage_layers=3",
            ["3 layers of a pipeline stage", "5 layers"],
        ),
        ("--sft.optimizer.schedule=wsd", ["sft.optimizer.decay = 0", "expected 1 to 1000"]),
        (
            "--sft.optimizer.schedule=wsd --sft.steps=100 --sft.optimizer.warmup=30 --sft.optimizer.decay=80",
            ["expected 1 to 70"],
        ),
        ("--sft.optimizer.schedule=cosine --sft.optimizer.decay=5", ["sft.optimizer.decay = 5", "wsd alone"]),
    ],
)
def test_refused(options, words):
    with pytest.raises(UserError) as error:
        _check(*options.split())
    assert all(word in str(error.value) for word in words), error.value
