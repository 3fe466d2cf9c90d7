"""RL at several layouts: the same seeds, the same samples, the same updates."""

import pytest

from tests.helpers import tiny
from tests.helpers.tiny import rl_options


def _rl(arguments):
    return tiny.cli("rl", *arguments)


def run(ranks, sft_run, folder, world, *more):
    for status, errors in ranks.run(_rl, rl_options(sft_run, folder, *more), world=world, deadline=280):
        assert status == 0, errors
    return tiny.metrics(folder)


@pytest.fixture(scope="module")
def single(ranks, sft_run, tmp_path_factory):
    return run(ranks, sft_run, tmp_path_factory.mktemp("rl") / "single", 1)


def test_a_single_process_learns_from_mixed_rewards(single):
    train = [line for line in single if line["kind"] == "train"]
    assert any(0 < line["reward"] < 1 and line["grad_norm"] > 0 for line in train)
    assert all(
        line["ratio"] == pytest.approx(1, abs=1e-6) for line in train
    )  # one update per step: the policy is the one that sampled
    assert [line["step"] for line in single if line["kind"] == "eval"] == [0, 2, 4]


def test_several_updates_a_step(ranks, sft_run, tmp_path):
    lines = run(ranks, sft_run, tmp_path / "run", 1, "--rl.updates=2", "--rl.algorithm=grpo", "--rl.steps=2")
    train = [line for line in lines if line["kind"] == "train"]
    for line in train:
        # The first update has ratio 1 up to fp32 rounding (another forward pass); by the second the policy has moved.
        assert 1e-6 < abs(line["ratio"] - 1) < 0.2
    assert "logprob" in {entry["phase"] for entry in tiny.ledger(tmp_path / "run")}
    assert train[0]["kept_prompts"] == 8 and train[0]["rounds"] == 1


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["--parallel.tensor=2", "--rollout.tensor=2"], id="TP2, one engine over both ranks"),
        pytest.param(
            ["--parallel.tensor=2", "--parallel.sequence_parallel=true"],
            id="TP2, an engine a rank",
            marks=pytest.mark.full,
        ),
        pytest.param([], id="DP2", marks=pytest.mark.full),
        pytest.param(["--parallel.pipeline=2"], id="PP2"),
    ],
)
def test_layouts_agree(ranks, sft_run, single, tmp_path, layout):
    lines = run(ranks, sft_run, tmp_path / "run", 2, *layout)
    assert [(line["step"], line["kind"]) for line in lines] == [(line["step"], line["kind"]) for line in single]
    before, ours = single[0], lines[0]
    assert ours["eflops_sft"] == before["eflops_sft"] > 0
    # A sampled token flips only where two log-probs agree to 1e-6: in one of 64 problems at most.
    assert ours["score"] == pytest.approx(before["score"], abs=100 / 64 + 1e-9)
    first, reference = lines[1], single[1]
    assert first["reward"] == pytest.approx(reference["reward"], abs=0.03)
    assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.1)
