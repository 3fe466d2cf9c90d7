"""`pctrain report` of files of curves and of studies with several sets, algorithms and seeds, and its tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pctrain.ceiling.fit import fit_ceiling
from pctrain.cli import main as cli
from pctrain.common.errors import UserError
from pctrain.report import charts, curves, ledger_table
from pctrain.report import command as report
from pctrain.run import layout
from tests.helpers.study_folders import make_rl, make_sft, make_study, rising

PUBLISHED = Path(__file__).parents[1] / "helpers" / "published_curves.json"
PROBLEMS = {"gsm8k": 300, "=aime": 100}


def drawn(source: Path) -> dict[str, charts.Chart]:
    return {chart.name: chart for chart in report.make(source).charts}


def rows(chart: charts.Chart) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(chart.csv())))


def entry(eflops: float, score: float, **more: float) -> dict:
    return {"eflops": eflops, "scores": {"gsm8k": score + 5, "=aime": score - 15}} | more


def make_file(path: Path, losses: bool = True) -> Path:
    """Two sets with two checkpoints each; RL from step 0 is the same curve in both.

    The hard set has the lower loss and the higher ceiling.
    """

    def data(top: float, shift: float) -> dict:
        sft = [
            entry(x, score, **({"val_loss": loss + shift} if losses else {}))
            for x, score, loss in ((0.0, 30.0, 0.7), (1.0, 60.0, 0.50), (2.0, 62.0, 0.51), (4.0, 61.0, 0.60))
        ]
        rl = {
            str(step): [entry(float(i), y) for i, y in enumerate(rising(first, top, 30)) if i]
            for step, first in ((10, 60.0), (20, 62.0))
        }
        rl["0"] = [entry(float(i), y) for i, y in enumerate(rising(30.0, 55.0, 20)) if i]
        return {"sft": sft, "rl": rl, "checkpoint_steps": [0, 10, 20, 40], "batch_size": 4, "mean_seq_len": 100}

    datasets = {"easy": data(72.0, 0.1), "hard": data(80.0, 0.0)}
    path.write_text(json.dumps({"meta": {"benchmarks": PROBLEMS}, "datasets": datasets}))
    return path


def test_plain_curves_of_any_trainer(tmp_path):
    """A CSV has no standard errors, so each is the noise that the fit finds."""
    csv_file = tmp_path / "mine.csv"
    scores = rising(50.0, 70.0, 30)
    csv_file.write_text("curve,eflops,score\n" + "".join(f"a,{i},{y}\nb,{i},{y - 10}\n" for i, y in enumerate(scores)))
    charts_by_name = drawn(csv_file)
    points = rows(charts_by_name["score_vs_compute"])
    assert (
        {row["set"] for row in points} == {"a", "b"}
        and len(points) == 60
        and all(0 < float(row["score_se"]) < 2 for row in points)
    )
    assert {row["verdict"] for row in rows(charts_by_name["ceilings"])} <= {"identified", "lower_bound"}


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, charts.Chart]:
    return drawn(make_file(tmp_path_factory.mktemp("curves") / "two.json"))


# P_sft of arXiv 2512.11470, figure 3, by step.
FIGURE_3 = {
    "S1K": {62: 68.6, 124: 70.9, 186: 72.9, 248: 74.1, 310: 73.1},
    "Easy102K": {360: 70.7, 720: 73.3, 1080: 74.2, 1440: 74.8, 1800: 74.4},
    "SFT889K": {360: 69.2, 720: 71.9, 1440: 73.3, 3600: 76.5, 7200: 77.3, 14080: 76.2},
}


@pytest.mark.parametrize(
    "sets", [["SFT889K"], pytest.param(list(FIGURE_3), marks=pytest.mark.full)], ids=["one-set", "all-sets"]
)
def test_the_published_curves_give_figure_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, sets: list[str]
) -> None:
    """Bars of all checkpoints, P_sft as in the paper's table, ceilings as `pctrain fit` gives them."""
    asked = {name: FIGURE_3[name] for name in sets}
    document = json.loads(PUBLISHED.read_text())
    document["datasets"] = {name: document["datasets"][name] for name in sets}
    (tmp_path / "curves.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "curves.json", "--out", "figure3"]) == 0
    assert sorted(p.name for p in (tmp_path / "figure3").iterdir()) == ["figures", "report.html", "study.json"]
    with open(tmp_path / "figure3" / "figures" / "ceilings.csv", newline="") as stream:
        bars = list(csv.DictReader(stream))
    assert {(bar["set"], int(bar["start_step"])): round(float(bar["p_sft"]), 1) for bar in bars} == pytest.approx(
        {(name, step): score for name, steps in asked.items() for step, score in steps.items()}, abs=0.051
    )
    bar = next(bar for bar in bars if (bar["set"], bar["start_step"]) == ("SFT889K", "7200"))
    curve = next(c for c in curves.read_curves(PUBLISHED) if (c.dataset, c.start_step) == ("SFT889K", 7200))
    fit = fit_ceiling(curve.eflops, curve.scores, curve.p_sft)
    assert (float(bar["a_post"]), float(bar["a_post_low"]), bar["verdict"]) == (fit.a_post, fit.a_post_low, fit.verdict)
    assert float(bar["pl_rl"]) == pytest.approx(float(bar["a_post"]) - float(bar["p_sft"]))
    assert (tmp_path / "figure3" / "figures" / "ceilings.png").stat().st_size > 50_000
    assert "SFT889K step 7200" in capsys.readouterr().out


def test_ceiling_against_minimum_loss_where_the_file_has_losses(two_sets: dict, tmp_path: Path) -> None:
    points = {row["set"]: row for row in rows(two_sets["ceiling_vs_loss"])}
    assert (float(points["easy"]["min_val_loss"]), float(points["hard"]["min_val_loss"])) == pytest.approx((0.6, 0.5))
    assert float(points["hard"]["a_post"]) == pytest.approx(80, abs=1.5) and float(
        points["easy"]["a_post"]
    ) == pytest.approx(72, abs=1.5)
    regimes = [row["regime"] for row in rows(two_sets["validation_loss"]) if row["set"] == "hard"]
    assert regimes == ["adaptive", "stable", "stable", "severe"]
    document = json.loads(make_file(tmp_path / "none.json", losses=False).read_text())
    document["datasets"]["easy"]["rl"] = {}
    document["datasets"]["hard"]["rl"].pop("20")
    (tmp_path / "none.json").write_text(json.dumps(document))
    assert not {"ceiling_vs_loss", "validation_loss"} & set(drawn(tmp_path / "none.json"))


def test_rl_without_sft_is_of_no_set_and_there_once(two_sets: dict) -> None:
    bars = rows(two_sets["ceilings"])
    assert [(bar["set"], bar["start_step"]) for bar in bars] == [
        ("", "0"),
        ("easy", "10"),
        ("easy", "20"),
        ("hard", "10"),
        ("hard", "20"),
    ]
    assert two_sets["ceilings"].spec["sets"] == ["easy", "hard"]


def test_every_benchmark_has_its_curve_and_a_name_is_no_formula(two_sets: dict) -> None:
    chart = two_sets["benchmarks"]
    assert chart.spec["names"] == ["gsm8k", "=aime"]
    series = next(s for s in chart.spec["series"] if s["name"] == "RL from hard step 10")
    assert (
        series["y"]["gsm8k"][0] == 65
        and series["y"]["=aime"][0] == 45
        and len(series["x"]) == 30
        and set(series["steps"]) == {None}
    )
    assert chart.csv().splitlines()[0].endswith("gsm8k,'=aime")


@pytest.mark.parametrize("value, expected", [("low", "val_loss"), (-1.0, "val_loss"), (True, "val_loss")])
def test_a_loss_that_is_none_is_refused_by_its_place(tmp_path: Path, value: object, expected: str) -> None:
    document = json.loads(make_file(tmp_path / "c.json").read_text())
    document["datasets"]["hard"]["sft"][2]["val_loss"] = value
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"datasets.hard.sft\[2\]: `{expected}`"):
        report.main(tmp_path / "c.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- several sets, algorithms and seeds --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, charts.Chart]:
    root = tmp_path_factory.mktemp("wide")
    for seed in (1, 2, 3):
        for name, top in (("easy", 60.0), ("hard", 70.0)):
            make_sft(layout.sft_folder(root, name, seed), {60: 20.0, 150: 45.0, 270: 50.0 + seed}, seed)
            for algorithm in ("grpo", "luffy"):
                make_rl(
                    layout.rl_folder(root, 150, name, seed, algorithm),
                    150,
                    "stable",
                    rising(45.0, top + seed, 4),
                    seed=seed,
                    algorithm=algorithm,
                )
    return drawn(root)


def test_seeds_of_one_experiment_are_one_group_with_a_mean(wide: dict) -> None:
    spec = wide["score_vs_compute"].spec
    groups = {s["group"] for s in spec["series"] if s["kind"] == "rl"}
    assert groups == {
        f"RL from {name} step 150 (stable), {algorithm}" for name in ("easy", "hard") for algorithm in ("grpo", "luffy")
    }
    assert all(s["seeded"] for s in spec["series"]) and sum(s["first"] for s in spec["series"]) == 4 + 2
    mean = next(m for m in spec["means"] if m["group"] == "RL from hard step 150 (stable), luffy")
    by_seed = [rising(45.0, 70.0 + seed, 4) for seed in (1, 2, 3)]
    assert mean["y"] == pytest.approx([sum(ys) / 3 for ys in zip(*by_seed, strict=True)]) and mean["seeds"] == 3
    spread = [by_seed[seed][3] for seed in range(3)]
    se = (sum((y - sum(spread) / 3) ** 2 for y in spread) / 2) ** 0.5 / 3**0.5
    assert mean["high"][3] - mean["y"][3] == pytest.approx(se)


def test_colours_tell_sets_apart_and_within_a_set_algorithms(wide: dict) -> None:
    rl = [s for s in wide["score_vs_compute"].spec["series"] if s["kind"] == "rl"]
    assert len({(s["set"], s["colour"]) for s in rl}) == 2 and len({s["colour"] for s in rl}) == 2
    assert len({(s["group"][-5:], s["alone"]) for s in rl}) == 2 and len({s["alone"] for s in rl}) == 2


def test_eval_lines_with_benchmarks_make_a_chart(tmp_path: Path) -> None:
    make_rl(tmp_path / "rl", 150, "stable", rising(45.0, 72.0, 5))
    assert "benchmarks" not in drawn(tmp_path / "rl")
    lines = (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | {"score/aime": 5.0 + i, "score/math": 50.0}) for i, line in enumerate(lines)]
    (tmp_path / "rl" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    chart = drawn(tmp_path / "rl")["benchmarks"]
    assert chart.spec["names"] == ["aime", "math"] and len(chart.rows) == 5
    assert chart.spec["series"][0]["y"]["aime"][:3] == [5.0, 7.0, 9.0]  # every other line is a train line


# -- the ledger in the terminal ----------------------------------------------------------------------------------------


def test_the_ledger_by_run_and_phase(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    ledger_table.main(make_study(tmp_path / "study"), console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [
        "sft",
        "SFT",
        "updates",
        "1,600",
        "120",
        "GFLOPs",
        "100",
        "GFLOPs",
        "18.1%",
        "1.0",
        "2.0",
        "11.1%",
    ] in lines
    whole = lines[next(i for i, line in enumerate(lines) if line[:2] == ["all", "runs"]) :]
    assert [
        "all",
        "phases",
        "14,400",
        "421",
        "GFLOPs",
        "551",
        "GFLOPs",
        "100.0%",
        "9.0",
        "18.0",
        "100.0%",
    ] in whole
    assert ["Evaluation", "*", "2,400", "60", "GFLOPs", "90", "GFLOPs", "16.3%", "1.5", "3.0", "16.7%"] in whole


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--ledger", "--watch"], "exclude each other"),
        (["--port=8000"], "add --watch"),
        (["--watch", "--port=0"], "--port"),
        (["--ledgre"], "did you mean --ledger"),
        (["other"], "one folder or file"),
        (["--run.dir=x"], "unknown option --run.dir"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], expected: str
) -> None:
    assert cli.main(["report", str(make_study(tmp_path / "study")), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "study" / "report").exists()


def test_a_file_of_curves_has_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a file of curves has no ledger"):
        ledger_table.main(make_file(tmp_path / "c.json"))
