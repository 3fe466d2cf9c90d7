"""The ledger: the cost of each phase, the phases that make up x, and a saved ledger that continues bit for bit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.compute import flops
from pctrain.compute.flops import EFLOP
from pctrain.compute.ledger import PHASES, Ledger
from pctrain.compute.model_shape import QWEN2_5_7B, ModelShape

SHAPE = ModelShape(layers=3, hidden=128, ffn=384, heads=4, kv_heads=4, head_dim=32, vocab=320, tied=True)


def test_sft_updates_are_the_papers_sft_compute():
    ledger = Ledger(QWEN2_5_7B)
    for step in range(1, 363):
        ledger.add(step, "sft_update", [3771] * 512, 1.0)
        if step == 360:
            paper = flops.paper_sft(QWEN2_5_7B, steps=360, batch=512, mean_length=3771)
            assert ledger.eflops_sft == pytest.approx(paper / EFLOP, rel=1e-12)
    assert ledger.eflops_rl == 0
    assert ledger.totals()["sft_update"]["tokens"] == 362 * 512 * 3771


def test_a_dapo_step_is_the_papers_dapo_step_and_starts_from_the_switch_point():
    ledger = Ledger(QWEN2_5_7B, eflops_sft=34.9)
    group, length = 8, 2000
    ledger.add(1, "rollout", [length] * 64 * group, 3.0)
    ledger.add(1, "rollout_rejected", [length] * 192 * group, 9.0)
    ledger.add(1, "rl_update", [length] * 64 * group, 5.0)
    dapo = flops.paper_dapo_step(
        QWEN2_5_7B, rounds=2, batch_generated=128, batch_trained=64, group=group, mean_length=length
    )
    assert ledger.eflops_rl == pytest.approx(dapo / EFLOP, rel=1e-12)
    assert ledger.eflops_sft == 34.9


def test_logprob_passes_cost_exact_flops_only_and_evaluation_is_never_in_x():
    ledger = Ledger(SHAPE, eflops_sft=0.5)
    logprob = ledger.add(1, "logprob", [10, 20, 20, 30], 0.1)
    assert logprob["paper_flops"] == 0
    assert logprob["exact_flops"] == sum(flops.exact_forward(SHAPE, [length]) for length in (10, 20, 20, 30))
    for phase in ("validation", "evaluation"):
        entry = ledger.add(1, phase, [10, 20, 20, 30], 0.1)
        assert entry["paper_flops"] == 80 * flops.paper_forward_per_token(SHAPE, 20)
    assert ledger.eflops_rl == 0 and ledger.eflops_sft == 0.5


def test_entries_have_the_fields_of_a_ledger_line():
    ledger = Ledger(SHAPE, ranks=4)
    entry = ledger.add(7, "rollout", [20, 30, 20, 20], 0.25)
    assert list(entry) == [
        "step",
        "phase",
        "sequences",
        "tokens",
        "mean_length",
        "paper_flops",
        "exact_flops",
        "seconds",
        "device_seconds",
    ]
    assert (entry["sequences"], entry["tokens"], entry["mean_length"], entry["device_seconds"]) == (4, 90, 22.5, 1.0)
    assert ledger.entries == [entry] and ledger.totals()["rollout"]["device_seconds"] == 1.0
    assert ledger.add(8, "rollout_rejected", [], 0.0)["paper_flops"] == 0  # nothing was rejected


def test_recomputation_is_only_in_the_exact_count():
    lengths = [10, 30]
    plain, full = (
        Ledger(SHAPE, recompute=recompute).add(1, "rl_update", lengths, 1.0) for recompute in ("none", "full")
    )
    head = 2.0 * sum(lengths) * SHAPE.vocab * SHAPE.hidden
    assert full["paper_flops"] == plain["paper_flops"]
    assert full["exact_flops"] == pytest.approx(
        plain["exact_flops"] * 4 / 3 - head
    )  # a forward pass more, but for the head
    selective = flops.exact_training(SHAPE, lengths, "selective") - flops.exact_training(SHAPE, lengths)
    assert selective == 2 * 3 * 128 * (10 * 11 + 30 * 31)
    assert Ledger(SHAPE, recompute="full").add(1, "validation", lengths, 1.0)["exact_flops"] == flops.exact_forward(
        SHAPE, lengths
    )


@pytest.mark.parametrize(
    ("phase", "lengths", "error"),
    [("warm_up", [1], KeyError), ("rollout", [5, 0], ValueError), ("rollout", [-5], ValueError)],
)
def test_impossible_entries_are_refused(phase, lengths, error):
    ledger = Ledger(SHAPE)
    with pytest.raises(error):
        ledger.add(1, phase, lengths, 0.0)
    assert ledger.totals() == {} and ledger.entries == []


ENTRIES = st.lists(
    st.tuples(st.sampled_from(sorted(PHASES)), st.lists(st.integers(1, 10**5), max_size=5), st.floats(0, 1e4)),
    max_size=30,
)


@given(ENTRIES, ENTRIES, st.floats(0, 1e4))
def test_a_ledger_saved_as_json_continues_bit_for_bit(before, after, joint):
    whole, first, second = Ledger(SHAPE, joint), Ledger(SHAPE, joint), Ledger(SHAPE)
    for phase, lengths, seconds in before + after:
        whole.add(1, phase, lengths, seconds)
    for phase, lengths, seconds in before:
        first.add(1, phase, lengths, seconds)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for phase, lengths, seconds in after:
        second.add(1, phase, lengths, seconds)
    assert second.totals() == whole.totals()
    assert (second.eflops_sft, second.eflops_rl) == (whole.eflops_sft, whole.eflops_rl)
