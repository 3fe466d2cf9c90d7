"""A mixture of experts through the commands: experts spread over ranks, auxiliary loss among the metrics."""

import shutil

import pytest

from tests.helpers import families, tiny


@pytest.fixture(scope="module")
def model(hf_dirs, tmp_path_factory):
    folder = families.make("qwen3-moe", tmp_path_factory.mktemp("experts") / "model")
    for file in hf_dirs[False].glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _sft(arguments):
    return tiny.cli("sft", *arguments)


OPTIONS = [
    *tiny.OPTIONS,
    "--sft.steps=3",
    "--sft.batch_size=8",
    "--sft.val_every=3",
    "--sft.eval_every=0",
    "--sft.optimizer.warmup=0",
    "--sft.token_budget=40",
]  # One trajectory per pack: the auxiliary loss is per pack, and packs differ with the data parallel size.


@pytest.mark.full
def test_sft_with_expert_parallel_reports_the_auxiliary_loss(ranks, model, tmp_path):
    found = {}
    for layout, world, more in (("single", 1, []), ("EP2", 2, ["--parallel.expert=2"])):
        arguments = [
            *OPTIONS,
            f"--model.path={model}",
            "--model.router_aux_loss=0.01",
            f"--run.dir={tmp_path / layout}",
            *more,
        ]
        for status, errors in ranks.run(_sft, arguments, world=world, deadline=200):
            assert status == 0, errors
        found[layout] = tiny.metrics(tmp_path / layout)
    for alone, spread in zip(found["single"], found["EP2"], strict=True):
        trained = alone["kind"] == "train"
        for key in ("loss", "grad_norm", "router_aux_loss") if trained else ("val_loss",):
            assert spread[key] == pytest.approx(alone[key], rel=1e-4)  # fp32, another order of sums, 3 Adam steps
        assert ("router_aux_loss" in alone) == trained
        assert not trained or 0 < alone["router_aux_loss"] <= 2  # each token goes to 2 of 4 experts
