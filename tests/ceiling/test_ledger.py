"""What each phase costs, which phases make up x, and that a saved ledger continues bit for bit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.ceiling import flops
from pctrain.ceiling.flops import EFLOP, QWEN2_5_7B, ModelShape
from pctrain.ceiling.ledger import PHASES, Ledger

SHAPE = ModelShape(layers=3, hidden=128, ffn=384, heads=4, kv_heads=4, head_dim=32, vocab=320, tied=True)


def test_sft_updates_are_the_papers_sft_compute():
    ledger = Ledger(QWEN2_5_7B)
    for step in range(1, 363):
        ledger.add(step, "sft_update", sequences=512, tokens=512 * 3771, seconds=1.0)
        if step == 360:
            assert ledger.eflops_sft == pytest.approx(flops.paper_sft(QWEN2_5_7B, steps=360, batch=512, mean_length=3771) / EFLOP, rel=1e-12)
    assert ledger.eflops_rl == 0
    assert ledger.totals()["sft_update"]["tokens"] == 362 * 512 * 3771


def test_a_dapo_step_is_the_papers_dapo_step_and_starts_from_the_joint():
    ledger = Ledger(QWEN2_5_7B, eflops_sft=34.9)
    group, length = 8, 2000
    ledger.add(1, "rollout", 64 * group, 64 * group * length, 3.0)
    ledger.add(1, "rollout_rejected", 192 * group, 192 * group * length, 9.0)
    ledger.add(1, "rl_update", 64 * group, 64 * group * length, 5.0)
    dapo = flops.paper_dapo_step(QWEN2_5_7B, rounds=2, batch_generated=128, batch_trained=64, group=group, mean_length=length)
    assert ledger.eflops_rl == pytest.approx(dapo / EFLOP, rel=1e-12)
    assert ledger.eflops_sft == 34.9


def test_logprob_passes_cost_exact_flops_only_and_evaluation_is_never_in_x():
    ledger = Ledger(SHAPE, eflops_sft=0.5)
    logprob = ledger.add(1, "logprob", 4, 80, 0.1)
    assert logprob["paper_flops"] == 0
    assert logprob["exact_flops"] == flops.exact_forward(SHAPE, tokens=80, mean_length=20)
    for phase in ("validation", "evaluation"):
        entry = ledger.add(1, phase, 4, 80, 0.1)
        assert entry["paper_flops"] == 80 * flops.paper_forward_per_token(SHAPE, 20)
    assert ledger.eflops_rl == 0 and ledger.eflops_sft == 0.5


def test_entries_have_the_fields_of_a_ledger_line():
    ledger = Ledger(SHAPE)
    entry = ledger.add(7, "rollout", 4, 90, 0.25)
    assert list(entry) == ["step", "phase", "sequences", "tokens", "mean_length", "paper_flops", "exact_flops", "seconds",
                           "device_seconds"]
    assert entry["mean_length"] == 22.5 and ledger.entries == [entry]
    assert ledger.add(8, "rollout_rejected", 0, 0, 0.0)["paper_flops"] == 0  # nothing was rejected


@pytest.mark.parametrize(("phase", "sequences", "tokens", "error"), [
    ("warm_up", 1, 1, KeyError), ("rollout", 0, 5, ValueError), ("rollout", 1, -5, ValueError)])
def test_impossible_entries_are_refused(phase, sequences, tokens, error):
    ledger = Ledger(SHAPE)
    with pytest.raises(error):
        ledger.add(1, phase, sequences, tokens, 0.0)
    assert ledger.totals() == {} and ledger.entries == []


ENTRIES = st.lists(st.tuples(st.sampled_from(sorted(PHASES)), st.integers(1, 999), st.integers(1, 10**6), st.floats(0, 1e4)), max_size=30)


@given(ENTRIES, ENTRIES, st.floats(0, 1e4))
def test_a_ledger_saved_as_json_continues_bit_for_bit(before, after, joint):
    whole, first, second = Ledger(SHAPE, joint), Ledger(SHAPE, joint), Ledger(SHAPE)
    for phase, sequences, tokens, seconds in before + after:
        whole.add(1, phase, sequences, tokens, seconds)
    for phase, sequences, tokens, seconds in before:
        first.add(1, phase, sequences, tokens, seconds)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for phase, sequences, tokens, seconds in after:
        second.add(1, phase, sequences, tokens, seconds)
    assert second.totals() == whole.totals()
    assert (second.eflops_sft, second.eflops_rl) == (whole.eflops_sft, whole.eflops_rl)


def test_a_luffy_step_is_the_papers_and_the_reference_costs_exact_flops_only():
    """4 [B G S_on + B N S_off] f: the expert's tokens count a forward pass that nobody makes, beside their update."""
    ledger, prompts, rollouts, length = Ledger(QWEN2_5_7B), 128, 7, 2000
    on, off = prompts * rollouts, prompts
    ledger.add(1, "rollout", on, on * length, 1.0)
    expert = ledger.add(1, "expert", off, off * length, 0.0)
    ledger.add(1, "rl_update", on + off, (on + off) * length, 1.0)
    reference = ledger.add(1, "reference", on + off, (on + off) * length, 1.0)
    paper = 4 * (on + off) * length * flops.paper_forward_per_token(QWEN2_5_7B, length)
    assert ledger.eflops_rl == pytest.approx(paper / EFLOP, rel=1e-12)
    assert expert["exact_flops"] == 0 and reference["paper_flops"] == 0
    assert reference["exact_flops"] == flops.exact_forward(QWEN2_5_7B, tokens=(on + off) * length, mean_length=length)
