"""`pctrain data rank`: a better set comes first, equal sets are indistinguishable, a second start trains nothing."""

import json
import random
from pathlib import Path

import pytest
from scipy import stats

from pctrain.study.ranking import Candidate, Probe, compare, rank
from tests.helpers import sets_cli as cli
from tests.helpers import tiny

PROBE = [
    "--model.architecture.layers=1",
    "--model.architecture.hidden=32",
    "--model.architecture.heads=1",
    "--model.architecture.kv_heads=1",
    "--model.architecture.ffn=64",
    "--model.architecture.context=32",
    "--sft.steps=40",
    "--sft.batch_size=16",
    "--sft.token_budget=256",
    "--sft.val_every=10",
    "--sft.checkpoint_every=40",
    "--sft.optimizer.lr=1e-2",
    "--sft.optimizer.warmup=10",
    "--run.tensorboard=false",
    "--data.workers=1",
]


def candidate(name: str, *minima: float) -> Candidate:
    probes = [Probe(seed, {0: 9.0, 10: loss, 20: loss + 1}, loss, 10, 20, 1.0, 1.0) for seed, loss in enumerate(minima)]
    return Candidate(name, f"{name}.jsonl", probes)


@pytest.mark.parametrize(
    "one, other, apart",
    [
        ((0.50, 0.51, 0.49), (0.60, 0.61, 0.62), True),
        ((0.50, 0.61, 0.49), (0.52, 0.60, 0.55), False),
        ((0.5, 0.5), (0.5, 0.5), False),
        ((0.5, 0.5), (0.6, 0.6), True),
    ],
)
def test_candidates_differ_where_welchs_interval_excludes_zero(one, other, apart):
    comparison = compare(candidate("a", *one), candidate("b", *other))
    assert comparison.interval.excludes_zero is comparison.as_json()["told_apart"] is apart
    assert ("statistically indistinguishable" in str(comparison)) is not apart
    if len(set(one)) > 1:
        interval = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
        assert (comparison.interval.low, comparison.interval.high) == pytest.approx(tuple(interval))


def test_the_lowest_mean_minimum_comes_first_and_every_pair_is_compared():
    ranked, differences = rank([candidate("c", 0.7, 0.7), candidate("a", 0.5, 0.52), candidate("b", 0.6, 0.4)])
    assert [c.name for c in ranked] == ["b", "a", "c"]
    assert [(d.better, d.worse) for d in differences] == [("b", "a"), ("b", "c"), ("a", "c")]
    [alone] = rank([candidate("a", 0.5), candidate("b", 0.6)])[1]
    assert (
        alone.interval is None and alone.as_json()["told_apart"] is None and alone.difference == pytest.approx(0.1)
    )  # one seed proves nothing


@pytest.fixture
def sets(tmp_path):
    """Write two sets of problems whose answer is always 1: one has that answer, the other a random digit."""
    draw = random.Random(0)
    good = [{"prompt": f"{i % 10}=", "response": r"\boxed{1}"} for i in range(80)]
    bad = [{**record, "response": rf"\boxed{{{draw.randrange(10)}}}"} for record in good]
    return {
        name: cli.write(tmp_path / f"{name}.jsonl", records)
        for name, records in (("bad", bad), ("good", good), ("held", good[:20]))
    }


def check_probe(probe: dict, folder: Path) -> None:
    """Check the entry of a probe in rank.json against its run folder."""
    losses = {line["step"]: line["val_loss"] for line in tiny.metrics(folder, "val")}
    assert probe["losses"] == {str(step): loss for step, loss in losses.items()}
    assert sorted(losses) == [0, 10, 20, 30, 40]
    assert probe["minimum"] == min(losses.values()) and losses[probe["step"]] == probe["minimum"]
    assert probe["too_short"] == (probe["step"] == 40) and probe["steps"] == 40
    updates = [line["paper_flops"] for line in tiny.ledger(folder) if line["phase"] == "sft_update"]
    assert probe["eflops"] == pytest.approx(sum(updates) / 1e18)


def test_a_plainly_better_set_is_first_and_a_second_start_trains_nothing(ranks, sets, tmp_path):
    out = tmp_path / "rank"
    arguments = [
        "rank",
        f"--candidate=bad={sets['bad']}",
        f"--candidates=[{{name: good, path: {sets['good']}}}]",
        "--seeds=0,1",
        f"--data.validation={sets['held']}",
        f"--out={out}",
        *PROBE,
    ]
    [(status, errors)] = ranks.run(tiny.cli, "data", *arguments, world=1, deadline=200)
    assert status == 0, errors
    result = json.loads((out / "rank.json").read_text())
    assert [row["name"] for row in result["ranking"]] == ["good", "bad"]
    [difference] = result["differences"]
    assert difference["told_apart"] and difference["difference"] > 0.2
    assert (out / "validation_loss.png").read_bytes().startswith(b"\x89PNG")

    rows = {row["name"]: row for row in result["ranking"]}
    for name in ("good", "bad"):
        for seed, probe in enumerate(rows[name]["probes"]):
            check_probe(probe, out / name / f"seed-{seed}")
    starts = {probe["losses"]["0"] for row in rows.values() for probe in row["probes"]}
    assert len(starts) == 1  # every probe begins with the same weights
    assert len({probe["minimum"] for probe in rows["good"]["probes"]}) == 2  # and the seed has an effect

    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    [(status, errors)] = ranks.run(tiny.cli, "data", *arguments, world=1, deadline=100)
    assert status == 0, errors
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before and len(before) == 4
    assert json.loads((out / "rank.json").read_text()) == result


@pytest.mark.parametrize(
    "options, message",
    [
        (["--candidate=a={good}"], "1 given, expected two or more"),
        (["--candidate=a={good}", "--candidate=a={bad}"], "two candidates have the name 'a'"),
        (["--candidate=a={good}", "--candidate=tokens={bad}"], "It is used as the name of a folder"),
        (["--candidate=a={good}", "--candidate=../b={bad}"], "It is used as the name of a folder"),
        (["--candidate=a={good}", "--candidate={bad}"], "expected NAME=PATH"),
        (["--candidates=[a, b]"], "expected a list such as [{name: a, path: a.jsonl}"),
        (["--candidate=a={good}", "--candidate=b={bad}", "--seeds=1,1"], "expected different seeds"),
        (["--candidate=a={good}", "--candidate=b={bad}", "--data.train={good}"], "leave out --data.train"),
        (["--candidate=a={good}", "--candidate=b={bad}", "--seeds=a"], "--seeds: expected a valid integer, got 'a'"),
        (["{good}", "--candidate=b={bad}"], "unexpected argument"),
    ],
)
def test_sets_that_cannot_be_ranked_are_refused(sets, tmp_path, options, message):
    given = [
        option.format_map({name: str(path) for name, path in sets.items()}) if "[" not in option else option
        for option in options
    ]
    errors = cli.refused("rank", *given, f"--data.validation={sets['held']}", f"--out={tmp_path / 'rank'}")
    assert message in errors and not (tmp_path / "rank").exists()


def test_the_validation_set_is_asked_for_and_a_foreign_folder_left_alone(ranks, sets, tmp_path):
    candidates = [f"--candidate={name}={sets[name]}" for name in ("good", "bad")]
    assert "needs --data.validation=FILE" in cli.refused("rank", *candidates, f"--out={tmp_path / 'rank'}")
    arguments = ["rank", *candidates, f"--data.validation={sets['held']}", f"--out={tmp_path}", *PROBE]
    [(status, errors)] = ranks.run(tiny.cli, "data", *arguments, world=1)
    assert status == 2 and "holds something else" in errors
