"""The report of run folders made here: files, numbers, sentences, escaping, and errors that name file and line."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pctrain.ceiling import regimes
from pctrain.ceiling.fit import fit_ceiling
from pctrain.common.errors import UserError
from pctrain.report import charts, curves, figures, looks
from pctrain.report import command as report
from pctrain.report.reading import read_study
from pctrain.report.study_data import SFTLoss, SFTRun
from tests.helpers.study_folders import binomial_se, config, make_rl, make_study, rising

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} & \u2028"
REGIMES = ["adaptive"] * 3 + ["stable", "transient", "stable", "stable", "mild", "severe", "severe"]


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    return make_study(tmp_path / "study")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def load(folder: Path) -> dict:
    return json.loads((folder / "report" / "study.json").read_text())


def numbers(folder: Path) -> dict:
    """study.json without the drawing."""
    return json.loads(json.dumps(report.contents(read_study(folder)), allow_nan=False))


def drawn(folder: Path) -> dict[str, charts.Chart]:
    return {chart.name: chart for chart in report.make(folder).charts}


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with hostile text everywhere, reported once for all tests that only look at the files."""
    folder = make_study(tmp_path_factory.mktemp("studies") / "a <b>study & more", hostile=HOSTILE)
    (folder / "sft" / "config.yaml").write_text(yaml.safe_dump(config("sft") | {"note": HOSTILE}))
    report.main(folder)
    return folder


def test_writes_the_report_folder(written: Path) -> None:
    out = written / "report"
    assert sorted(p.name for p in out.iterdir()) == ["figures", "report.html", "study.json"]
    pngs = sorted((out / "figures").glob("*.png"))
    names = ["ceilings", "compute", "score_vs_compute", "validation_loss"]
    assert sorted(p.name for p in (out / "figures").iterdir()) == [
        f"{name}.{kind}" for name in names for kind in ("csv", "png")
    ]
    assert all(width > 1000 and height > 400 for width, height in map(png_size, pngs))
    assert load(written) == numbers(written)


def test_same_folder_same_bytes(written: Path, capsys: pytest.CaptureFixture) -> None:
    once = {p: p.read_bytes() for p in (written / "report").rglob("*") if p.is_file()}
    report.main(written)
    assert once == {p: p.read_bytes() for p in (written / "report").rglob("*") if p.is_file()}
    printed = capsys.readouterr().out
    assert str(written / "report" / "report.html") in printed and "step 150 (stable)" in printed


def test_needs_no_torch() -> None:
    code = "import sys, pctrain.report.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_gain_and_its_standard_error(study_folder: Path) -> None:
    study = numbers(study_folder)
    overfit = study["rl"][2]
    assert overfit["gain"] == pytest.approx(16.0)
    assert overfit["gain_se"] == pytest.approx(3.0440, abs=1e-4)  # sqrt(50 x 50 / 512 + 66 x 34 / 512)
    assert "sqrt(se_first^2 + se_last^2)" in study["gain_formula"]


def test_pure_sft_at_equal_total_compute(study_folder: Path) -> None:
    early, stable, overfit = numbers(study_folder)["rl"]
    # early: 120 + 200 GFLOPs, between scores of 40 at 240 and 48 at 360.
    # stable: 300 + 200 GFLOPs, between 48 at 360 and 50 at 540.
    assert early["sft_at_equal_total"] == pytest.approx(40 + 8 * 80 / 120)
    assert stable["sft_at_equal_total"] == pytest.approx(48 + 2 * 140 / 180)
    w = 140 / 180
    assert stable["sft_at_equal_total_se"] == pytest.approx(math.hypot((1 - w) * binomial_se(48), w * binomial_se(50)))
    assert overfit["sft_at_equal_total"] is None and "ended before" in overfit["sft_at_equal_total_reason"]


def test_regimes_fits_and_ledger(study_folder: Path) -> None:
    study = numbers(study_folder)
    assert [p["regime"] for p in study["sft"][0]["points"] if p["val_loss"] is not None] == REGIMES
    assert study["sft"][0]["minimum_step"] == 150
    starts = [(run["start_step"], run["role"], run["regime"]) for run in study["rl"]]
    assert starts == [(60, "early", "adaptive"), (150, "stable", "stable"), (270, "overfit", "severe")]
    fit = study["rl"][1]["fit"]
    assert fit["verdict"] == "identified" and fit["a_post_low"] < 72 < fit["a_post_high"] and fit["p_sft"] == 45.0
    assert study["rl"][2]["fit"]["verdict"] == "too_short"
    assert study["ledger"]["sft_update"]["paper_flops"] == 1.2e11 and study["ledger"]["rollout"]["exact_flops"] == 9e10
    assert study["ledger"]["logprob"]["tokens"] == 2400 and study["rl"][0]["ledger"]["rl_update"]["seconds"] == 0.5


def test_fit_is_that_of_the_fit_command(study_folder: Path) -> None:
    curve = curves.read_run_folder(study_folder / "rl-step-60")
    fit = fit_ceiling(curve.eflops, curve.scores, curve.p_sft, score_se=curve.score_se, p_sft_se=curve.p_sft_se)
    assert read_study(study_folder).rl[0].fit.as_row("d", 60) == fit.as_row("d", 60)


@given(st.lists(st.floats(0.3, 5.0), min_size=1, max_size=30))
def test_bands_cover_the_whole_run_without_gaps(losses: list[float]) -> None:
    x = [float(i) for i in range(len(losses))]
    points = [SFTLoss(i, x[i], losses[i], 0.0, regime) for i, regime in enumerate(regimes.classify(x, losses))]
    bands = SFTRun("sft", Path("sft"), {}, "", {}, losses=points).bands()
    assert bands[0]["from"] == x[0] and bands[-1]["to"] == x[-1]
    assert all(a["to"] == b["from"] and a["regime"] != b["regime"] for a, b in pairwise(bands))
    for point in points:
        assert point.regime in {b["regime"] for b in bands if b["from"] <= point.eflops_sft <= b["to"]}


# -- figures -----------------------------------------------------------------------------------------------------------


def test_every_regime_is_shaded_and_every_start_marked(study_folder: Path) -> None:
    figure = figures.validation_loss.draw(drawn(study_folder)["validation_loss"])
    shaded = {patch.get_gid() for patch in figure.axes[0].patches}
    assert shaded == {f"regime-{name}" for name in ("adaptive", "stable", "mild", "severe", "transient")}
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(label in texts for label in ("step 60 (early)", "step 150 (stable)", "step 270 (overfit)"))


def test_verdicts_stand_on_the_bars(study_folder: Path) -> None:
    with matplotlib.rc_context(looks.STYLE):
        texts = [text.get_text() for text in figures.ceilings.draw(drawn(study_folder)["ceilings"]).axes[0].texts]
    assert any(t.startswith("identified") for t in texts) and any(t.startswith("too short: no ceiling") for t in texts)


def test_phases_are_named_next_to_their_bars(study_folder: Path) -> None:
    axes = figures.compute.draw(drawn(study_folder)["compute"]).axes[0]
    names = [
        "SFT updates",
        "Rollouts",
        "Rollouts rejected",
        "Log-prob passes",
        "RL updates",
        "Validation *",
        "Evaluation *",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == names


@pytest.mark.parametrize(
    "eflops, text",
    [(5.4e-7, "540 GFLOPs"), (3.1e-6, "3.1 TFLOPs"), (0.25, "250 PFLOPs"), (1365.8, "1.37 ZFLOPs"), (0.0, "0 FLOPs")],
)
def test_compute_is_written_with_a_readable_prefix(eflops: float, text: str) -> None:
    assert looks.flops_text(eflops) == text


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_keep_their_order_and_distance(values: list[float]) -> None:
    placed = figures.score_vs_compute.spread_out(values, 6.0, 0.0, 100.0)
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(placed[b] - placed[a] >= 6.0 - 1e-9 for a, b in pairwise(order))  # sums of a few floats below 100


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_differences_whose_interval_includes_zero_are_not_called_settled(study_folder: Path) -> None:
    text = " ".join(numbers(study_folder)["not_shown"])
    assert (
        "Which start ends highest is not settled: RL from step 270 (overfit) is statistically indistinguishable" in text
    )
    assert "This is the direction that the paper (arXiv 2512.11470) reports, but the two are statistically" in text
    assert "step 270 (overfit), which has 5 scores. A fit needs 12 scores" in text
    assert "EFLOPs" in text and "seed 3" in text


def test_an_overfit_start_that_ends_higher_is_said_to_contradict_the_paper(study_folder: Path) -> None:
    make_rl(study_folder / "rl-step-270", 270, "overfit", rising(50.0, 85.0))
    study = numbers(study_folder)
    assert any("Not here" in s and "not below it" in s for s in study["not_shown"])
    assert any(
        "RL from step 270 (overfit) has the highest last score" in s and "The interval excludes zero" in s
        for s in study["findings"]
    )


def test_a_flat_curve_is_never_worded_as_a_ceiling(study_folder: Path) -> None:
    for name, start, role in (
        ("rl-step-60", 60, "early"),
        ("rl-step-150", 150, "stable"),
        ("rl-step-270", 270, "overfit"),
    ):
        make_rl(study_folder / name, start, role, [45.0 + 0.2 * math.sin(5 * i) for i in range(60)])
    study = numbers(study_folder)
    assert [run["fit"]["verdict"] for run in study["rl"]] == ["flat"] * 3
    assert not any("eiling" in s for s in study["findings"])
    assert sum("is flat over the range" in s for s in study["not_shown"]) == 3
    assert any("statistically indistinguishable from no change" in s for s in study["findings"])


def test_a_collapse_is_reported(study_folder: Path) -> None:
    scores = rising(45.0, 60.0, 30)
    make_rl(study_folder / "rl-step-150", 150, "stable", scores[:20] + [30.0 - i for i in range(10)])
    study = numbers(study_folder)
    assert study["rl"][1]["fit"]["verdict"] == "collapsed"
    assert any("collapsed after" in s for s in study["findings"]) and any(
        "without its collapse" in s for s in study["not_shown"]
    )


# -- hostile text ------------------------------------------------------------------------------------------------------


def test_text_from_files_cannot_execute(written: Path) -> None:
    page = (written / "report" / "report.html").read_text()
    tags: list[tuple[str, dict]] = []
    blocks: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            tags.append((tag, dict(attrs)))

        def handle_data(self, text: str) -> None:
            if tags and tags[-1] == ("script", {"type": "application/json", "id": "data"}):
                blocks.append(text)

    Reader().feed(page)
    names = [tag for tag, _ in tags]
    assert (
        names.count("script") == 3 and "img" not in names and "b" not in names
    )  # data, plotly, charts: nothing from the files
    assert not any(
        key in ("src", "onerror") or str(value).startswith("http") for _, attrs in tags for key, value in attrs.items()
    )
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page and "{{ 7*7 }}" in page
    score = json.loads("".join(blocks).split("\n")[0])["charts"]["score_vs_compute"]["spec"]["series"]
    assert [series["name"] for series in score][2] == "RL from step 150 (stable)"
    assert "an old step" not in page  # samples are of the last step


# -- other folders, bad input ------------------------------------------------------------------------------------------


def test_single_run_folders(study_folder: Path) -> None:
    report.main(study_folder / "sft")
    sft = load(study_folder / "sft")
    assert sft["rl"] == [] and any("No RL was run" in s for s in sft["not_shown"])
    rl = numbers(study_folder / "rl-step-150")
    assert (
        rl["sft"] == []
        and rl["rl"][0]["gain"] == read_study(study_folder).rl[1].gain.value
        and rl["rl"][0]["regime"] is None
    )
    assert rl["rl"][0]["sft_at_equal_total_reason"] == "there is no SFT run in this folder"
    assert "validation_loss" not in drawn(study_folder / "rl-step-150")
    pngs = sorted(p.name for p in (study_folder / "sft" / "report" / "figures").glob("*.png"))
    assert pngs == ["compute.png", "score_vs_compute.png", "validation_loss.png"]


def test_a_run_without_scores_is_reported_as_such(study_folder: Path) -> None:
    make_rl(study_folder / "rl-step-60", 60, "early", [])
    make_rl(study_folder / "rl-step-150", 150, "stable", [45.0])
    (study_folder / "rl-step-60" / "rollouts" / "step-10.jsonl").unlink()
    report.main(study_folder)
    early, stable, _ = load(study_folder)["rl"]
    assert early["gain"] is None and early["fit"] is None and stable["p_sft"] == 45.0 and stable["fit"] is None
    assert sum("has no gain" in s for s in load(study_folder)["not_shown"]) == 2


def test_losses_that_are_not_finite_are_counted(study_folder: Path) -> None:
    with (study_folder / "sft" / "metrics.jsonl").open("a") as lines:
        row = {"step": 300, "kind": "val", "eflops_sft": 6e-7, "eflops_rl": 0.0, "val_loss": None, "val_loss_se": None}
        lines.write(json.dumps(row) + "\n")
    assert any("1 validation loss was not finite" in s for s in numbers(study_folder)["not_shown"])


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("sft/metrics.jsonl", '{"step": 1, "kind": "val"', "metrics.jsonl:2: not valid JSON"),
        ("sft/metrics.jsonl", "[1, 2]", "metrics.jsonl:2: expected a JSON object"),
        (
            "sft/metrics.jsonl",
            '{"step": 1, "kind": "test", "eflops_sft": 0, "eflops_rl": 0}',
            "metrics.jsonl:2: `kind` must be",
        ),
        (
            "sft/metrics.jsonl",
            '{"step": 1, "kind": "val", "eflops_sft": 1e-9, "eflops_rl": 0, "val_loss": "low", "val_loss_se": 0}',
            "metrics.jsonl:2: `val_loss`",
        ),
        (
            "rl-step-60/metrics.jsonl",
            '{"step": 1, "kind": "eval", "eflops_sft": 0, "eflops_rl": 0, "score": 4}',
            "metrics.jsonl:2: `score_se`",
        ),
        ("rl-step-60/ledger.jsonl", '{"step": 1, "phase": "dreaming"}', "ledger.jsonl:2: `phase` must be one of"),
        ("rl-step-60/rollouts/step-10.jsonl", "{", "step-10.jsonl:2: not valid JSON"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(
    study_folder: Path, file: str, text: str, expected: str
) -> None:
    path = study_folder / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], text, *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=re.escape(expected)):
        report.main(study_folder)
    assert not (study_folder / "report").exists()


def test_a_run_that_has_only_just_begun_is_left_out_and_said_so(tmp_path: Path) -> None:
    root = make_study(tmp_path / "study")
    begun = root / "rl-step-999"
    begun.mkdir()
    for name in ("config.yaml", "start.json"):
        (begun / name).write_text((root / "rl-step-60" / name).read_text())
    first = (root / "rl-step-60" / "metrics.jsonl").read_text().splitlines()[0]
    for metrics in (None, first + "\n"):  # before and after the score at its start
        if metrics is not None:
            (begun / "metrics.jsonl").write_text(metrics)
        report.main(root, None)
        study = json.loads((root / "report" / "study.json").read_text())
        assert "rl-step-999 has only just begun and is not shown." in study["not_shown"] and len(study["rl"]) == 3
    for name in ("sft", "rl-step-60", "rl-step-150", "rl-step-270"):
        shutil.rmtree(root / name)
    with pytest.raises(UserError, match="have recorded nothing yet"):
        read_study(root)


@pytest.mark.parametrize(
    "missing", ["sft/config.yaml", "sft/metrics.jsonl", "rl-step-60/start.json", "rl-step-60/ledger.jsonl"]
)
def test_a_missing_file_is_named(study_folder: Path, missing: str) -> None:
    (study_folder / missing).unlink()
    with pytest.raises(UserError, match=re.escape(f"{missing}: missing")):
        report.main(study_folder)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs here"):
        report.main(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        report.main(tmp_path / "nowhere")


def test_a_role_that_does_not_exist_is_refused(study_folder: Path) -> None:
    (study_folder / "rl-step-60" / "start.json").write_text(
        json.dumps({"start_step": 60, "role": "<b>", "sft_run": "", "eflops_sft": 0.0})
    )
    with pytest.raises(UserError, match="`role` must be one of early, stable, overfit, none"):
        report.main(study_folder)
