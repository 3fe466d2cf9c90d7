"""`pctrain data select`: difficulty, size and length, each alone and together."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.data.sets.select import even_shares
from tests.helpers import sets_cli as cli

RATES = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.fixture
def rated(tmp_path):
    """200 records: win rates in turn, lengths 1 to 200; ten more without a rate."""
    records = [
        {"id": str(i), "prompt": f"q{i}", "response": "x" * (i + 1), "win_rate": RATES[i % 5] if i < 200 else None}
        for i in range(210)
    ]
    return cli.write(tmp_path / "rated.jsonl", records)


def select(rated, *options):
    out = rated.parent / f"out{len(list(rated.parent.iterdir()))}.jsonl"
    printed = cli.run("select", rated, f"--out={out}", *options)
    return cli.read(out), out, printed


def test_easy_is_1_and_hard_is_at_most_a_quarter(rated):
    easy, out, _ = select(rated, "--take=easy")
    assert {r["win_rate"] for r in easy} == {1.0} and len(easy) == 40
    assert cli.manifest(out)["records"]["dropped"] == {"no win rate": 10, "not easy": 160}
    hard, out, printed = select(rated, "--take=hard")
    assert Counter(r["win_rate"] for r in hard) == {0.0: 40, 0.25: 40}
    assert [r["id"] for r in hard] == sorted((r["id"] for r in hard), key=int)
    assert cli.manifest(out)["distribution"]["win_rate"][4] == {"win_rate": 1.0, "before": 40, "after": 0}
    assert "before and after" in printed


def test_uniform_draws_evenly_and_what_is_missing_comes_from_the_others(rated, tmp_path):
    chosen, _, _ = select(rated, "--take=uniform", "--size=50")
    assert Counter(r["win_rate"] for r in chosen) == dict.fromkeys(RATES, 10)
    few = [r for r in cli.read(rated) if r["win_rate"] != 0.5 or int(r["id"]) < 20]  # four left of that rate
    chosen, _, _ = select(cli.write(tmp_path / "few.jsonl", few), "--take=uniform", "--size=44")
    assert Counter(r["win_rate"] for r in chosen) == {0.0: 10, 0.25: 10, 0.5: 4, 0.75: 10, 1.0: 10}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_shares_are_as_even_as_what_is_there_allows(there, data):
    size = data.draw(st.integers(0, sum(there)))
    shares = even_shares(there, size)
    assert sum(shares) == size and all(share <= count for share, count in zip(shares, there, strict=True))
    full = max(shares, default=0)
    assert all(share == count or share >= full - 1 for share, count in zip(shares, there, strict=True))


def test_the_seed_draws_and_the_same_seed_draws_the_same(rated):
    draws = [[r["id"] for r in select(rated, "--size=20", f"--seed={seed}")[0]] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_length_bounds_and_preferences_go_together_with_difficulty(rated):
    chosen, out, _ = select(rated, "--take=hard", "--size=3", "--prefer=longest", "--max_length=100")
    assert [len(r["response"]) for r in chosen] == [92, 96, 97]
    assert cli.manifest(out)["length_unit"] == "characters"
    assert cli.manifest(out)["records"]["dropped"] == {
        "no win rate": 10,
        "not hard": 120,
        "not drawn": 37,
        "too long": 40,
    }
    assert all({"length", "win_rate"} <= entry.keys() for entry in cli.dropped(out))
    shortest, _, _ = select(rated, "--size=3", "--prefer=shortest", "--min_length=50")
    assert [len(r["response"]) for r in shortest] == [50, 51, 52]


def test_lengths_are_tokens_where_there_is_a_tokenizer(tmp_path):
    from pctrain.config.tree import ArchitectureConfig
    from pctrain.data.scratch_model import make_hf_dir

    texts = ["the same words again and again " * 20, "0123456789" * 20]
    hf = make_hf_dir(
        tmp_path / "hf",
        ArchitectureConfig(layers=1, hidden=8, heads=1, kv_heads=1, ffn=8),
        texts,
        vocab_size=300,
        seed=0,
    )
    path = cli.write(
        tmp_path / "two.jsonl",
        [{"prompt": "p", "response": "again again again"}, {"prompt": "p", "response": "0123456789"}],
    )
    out = tmp_path / "out.jsonl"
    cli.run(
        "select", path, f"--out={out}", "--size=1", "--prefer=longest", f"--model.path={hf}"
    )  # digits are a token each
    assert [r["response"] for r in cli.read(out)] == ["0123456789"]
    assert cli.manifest(out)["length_unit"] == "tokens"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--take=hard", "--size=81"], "only 80 of 210 records qualify (120 not hard, 10 no win rate)"),
        (["--take=uniform"], "draws evenly over the win rates. Set --size=N"),
        (["--prefer=longest"], "Set --size=N"),
        (["--min_length=5", "--max_length=4"], "no record would qualify"),
        ([], "no criterion. Set --take"),
        (["--take=medium"], "--take: expected 'easy', 'uniform' or 'hard', got 'medium'"),
        (["--size=0"], "--size: expected greater than or equal to 1"),
        (["--take=easy", "--by=rate"], "no column 'rate'. Run `pctrain data winrate` to write it"),
        (["--take=easy", "--by=id"], "expected a share from 0 to 1, or null, got '0'"),
        (["--min_length=9999"], "no record is left"),
    ],
)
def test_what_cannot_work_is_refused(rated, options, message):
    assert message in cli.refused("select", rated, f"--out={rated.parent / 'out.jsonl'}", *options)
    assert [entry.name for entry in rated.parent.iterdir()] == ["rated.jsonl"]


def test_problems_without_trajectories_can_be_selected_by_difficulty(tmp_path):
    path = cli.write(
        tmp_path / "problems.jsonl", [{"prompt": f"q{i}", "answer": i, "win_rate": i / 4} for i in range(5)]
    )
    cli.run("select", path, f"--out={tmp_path / 'out.jsonl'}", "--take=hard")
    assert [r["answer"] for r in cli.read(tmp_path / "out.jsonl")] == [0, 1]
    errors = cli.refused("select", path, f"--out={tmp_path / 'long.jsonl'}", "--min_length=1")
    assert "no record can be used" in errors and "'response'" in errors
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["records"]["kept"] == 2
