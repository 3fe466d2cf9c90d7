"""`pctrain fit` as an analyst without a GPU meets it: forms of curves, forecasts, the two methods, and bad input."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pctrain.ceiling.curve import Curve
from pctrain.ceiling.posterior import rise
from pctrain.cli import main as cli
from pctrain.common.errors import UserError
from pctrain.report.curves import read_curves

PUBLISHED_FILE = Path(__file__).parents[1] / "helpers" / "published_curves.json"
X = np.arange(1, 31) * 4.0
Y = np.round(60 + 12 * rise(X, 1.5, 12.0) + 0.4 * np.random.default_rng(0).normal(size=30), 2)


def csv_text(x=X, y=Y, joint=60.0):
    return "eflops,score\n" + "".join(f"{a},{b}\n" for a, b in [(0, joint), *zip(x, y, strict=True)])


def minimal(**changes):
    entry = {"name": "mine", "p_sft": 60.0, "eflops": X.tolist(), "scores": Y.tolist()} | changes
    return json.dumps({"curves": [{key: value for key, value in entry.items() if value is not ...}]})


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Runs `pctrain fit` in a folder on a file of this content; (status, stdout, stderr, rows or None)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(content, *options, name="curves.json"):
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        status = cli.main(["fit", name, *options])
        out, err = capsys.readouterr()
        return status, out, err, json.loads(Path("fits.json").read_text()) if Path("fits.json").exists() else None

    return run


# ---- forms


def test_a_csv_and_the_same_as_json_and_as_exchange_file_give_the_same_fit(fit):
    exchange = {
        "meta": {"benchmarks": {"all": 100}},
        "datasets": {
            "curves": {
                "checkpoint_steps": [100],
                "sft": [{"eflops": 1.0, "scores": {"all": 60.0}}],
                "rl": {
                    "100": [{"eflops": a, "scores": {"all": b}} for a, b in zip(X.tolist(), Y.tolist(), strict=True)]
                },
            }
        },
    }
    rows = [fit(csv_text(), name="curves.csv")[3], fit(minimal(name="curves"))[3], fit(json.dumps(exchange))[3]]
    assert [row[0].pop("start_step") for row in rows] == [None, None, 100]
    assert rows[0] == rows[1] == rows[2] and rows[0][0]["dataset"] == "curves" and rows[0][0]["verdict"] == "identified"
    assert abs(rows[0][0]["a_post"] - 72) < 1


def test_a_csv_may_hold_several_curves_with_standard_errors_and_a_bom(fit):
    lines = ["curve, eflops, score, score_se"]
    for name, gain in (("a", 0.0), ("b", 1.0)):
        lines += [f"{name}, 0, 60, 2.0", *(f"{name}, {a}, {b + gain}, 2.0" for a, b in zip(X, Y, strict=True)), ""]
    status, _, _, rows = fit(b"\xef\xbb\xbf" + "\r\n".join(lines).encode(), name="both.csv")
    assert status == 0 and [row["dataset"] for row in rows] == ["a", "b"]
    (curve, _) = read_curves("both.csv")
    assert (curve.p_sft, curve.p_sft_se, curve.score_se, len(curve.eflops)) == (60.0, 2.0, 2.0, 30)


def test_the_highest_score_bounds_the_ceiling(fit):
    x, y = X.tolist(), np.round(60 + 8 * rise(X, 1.0, 100.0), 2).tolist()  # has not bent
    free = fit(minimal(eflops=x, scores=y))[3][0]
    bound = fit(minimal(eflops=x, scores=y, max_score=66.0))[3][0]
    assert free["a_post_high"] > 68 and bound["a_post_high"] <= 66.0
    exchange = json.loads(PUBLISHED_FILE.read_text())
    exchange["meta"]["max_score"] = 85.0
    assert fit(json.dumps(exchange), "--points=0.01")[0] == 2 and {
        curve.max_score for curve in read_curves("curves.json")
    } == {85.0}


# ---- what is asked


def test_forecasts_are_printed_and_written(fit):
    status, out, _, (row,) = fit(csv_text(), "--reach=66,90", "--reach", "70", "--budget=400", name="mine.csv")
    assert status == 0
    assert [entry["score"] for entry in row["reach"]] == [66, 90, 70]
    assert [entry["probability"] > 0.5 for entry in row["reach"]] == [True, False, True]
    assert row["reach"][0]["eflops_low"] < row["reach"][0]["eflops"] < row["reach"][0]["eflops_high"]
    assert row["reach"][1]["eflops"] is None and "never" in out
    (budget,) = row["budget"]
    assert budget["measured_low"] < budget["low"] < budget["score"] < budget["high"] < budget["measured_high"]
    assert max(len(line) for line in out.splitlines() if "mine" in line or "──" in line) <= 80


def test_the_first_share_is_fitted_and_the_rest_compared(fit):
    status, out, _, (row,) = fit(csv_text(), "--points", "0.7", name="mine.csv")
    assert status == 0 and row["n_points"] == 21 and row["held_out"]["points"] == 9
    assert row["held_out"]["rmse"] < 1 and row["held_out"]["inside"] >= 0.5 and "RMSE" in out
    y = np.concatenate(
        [Y[:25], np.full(5, 30.0)]
    )  # the collapse is cut on the whole curve: nothing could have foreseen it
    assert fit(csv_text(y=y), "--points", "0.7", name="mine.csv")[3][0]["held_out"]["points"] == 4


def test_the_papers_method_from_the_command_line(fit):
    status, out, _, (row,) = fit(
        csv_text(), "--method", "paper", "--tau=2.5", "--alpha=0.85", "--reach=70", name="mine.csv"
    )
    assert status == 0 and (row["method"], row["n_points"], row["held_out"]["points"]) == ("paper", 21, 9)
    assert abs(row["a_post"] - 72) < 2 and row["verdict"] is None and row["a_post_low"] is None
    assert row["reach"][0]["probability"] is None and row["reach"][0]["eflops"] > 0 and "no interval" in out
    whole = fit(csv_text(), "--method=paper", "--points=1", name="mine.csv")[3][0]
    assert whole["n_points"] == 30 and "held_out" not in whole


def test_the_shift_under_wide_priors_is_small_where_the_data_speak_and_large_where_the_prior_does(fit):
    exchange = json.loads(PUBLISHED_FILE.read_text())
    for dataset, step in (("S1K", "62"), ("SFT889K", "720")):
        exchange["datasets"][dataset]["rl"] = {step: exchange["datasets"][dataset]["rl"][step]}
    del exchange["datasets"]["Easy102K"]
    prior, data = (row["prior_shift"] for row in fit(json.dumps(exchange), "--points=0.71")[3])
    assert prior > 3 and abs(data) < 0.3


def test_names_from_a_file_are_not_obeyed_as_markup(fit):
    status, out, _, rows = fit(minimal(name="[bold]x[/nope]"))
    assert status == 0 and "[bold]x" in out and rows[0]["dataset"] == "[bold]x[/nope]"


def test_help_teaches_the_forms_the_options_and_the_verdicts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    options = ("--reach", "--budget", "--points", "--method", "--tau")
    for word in ("eflops,score", '{"curves":', *options, "lower_bound", "docs/ceilings.md", "P_sft"):
        assert word in text


# ---- bad input


def changed(at, value):
    x = X.tolist()
    x[at] = value
    return x


BAD = {
    "empty file": ("", "curves.json: is empty"),
    "empty csv": ("\n \n", "curves.csv: is empty"),
    "pickle": (pickle.dumps({"curves": []}), "is a Python pickle; pickles are not read"),
    "old pickle": (pickle.dumps({"curves": []}, protocol=0), "not JSON"),
    "binary": (b"\x00\xff\xfe\x01", "cannot be read as text"),
    "NaN EFLOPs": (minimal(eflops=changed(3, float("nan"))), r"curves\[0\]: `eflops`\[3\] must be a finite number"),
    "negative EFLOPs": (
        minimal(eflops=changed(3, -1.0)),
        r"`eflops`\[3\] must be a finite number, 0 or more, found -1.0",
    ),
    "infinite EFLOPs": (minimal(eflops=changed(29, float("inf"))), r"`eflops`\[29\] must be a finite number"),
    "decreasing x": (minimal(eflops=changed(3, 5.0)), r"eflops must increase .* 5 follows 12 \(sort the points"),
    "duplicated x": (minimal(eflops=changed(3, 12.0)), r"12 follows 12 \(given twice"),
    "text for a number": (minimal(eflops=changed(3, "16")), r"`eflops`\[3\] must be a finite number"),
    "huge number": (minimal(eflops=changed(29, 10**400)), "one too large"),
    "one point": (minimal(eflops=[4.0], scores=[61.0]), "no curve has 2 points to fit"),
    "no point": (minimal(eflops=[], scores=[]), "list of one or more numbers"),
    "unequal lengths": (minimal(scores=Y.tolist()[:-1]), "30 eflops and 29 scores"),
    "score above the maximum": (
        minimal(scores=[*Y.tolist()[:-1], 100.5]),
        r"scores\[29\] must be a score in percent, at most 100",
    ),
    "score above its own maximum": (minimal(max_score=65.0), r"at most 65"),
    "NaN score": (minimal(scores=[*Y.tolist()[:-1], float("nan")]), r"`scores`\[29\] must be a finite number"),
    "maximum above 100": (minimal(max_score=101), "max_score` must be the highest possible score"),
    "no P_sft": (minimal(p_sft=...), "the key `p_sft` is missing"),
    "unknown key": (minimal(flops=[1]), "unknown key `flops`"),
    "joint among the points": (minimal(eflops=[0.0, *X.tolist()[1:]]), "must begin above 0"),
    "csv: NaN EFLOPs": (
        csv_text().replace("\n12.0,", "\nnan,"),
        r"curves.csv, line 5: `eflops` must be a finite number, .* found 'nan'",
    ),
    "csv: negative": (csv_text().replace("\n12.0,", "\n-12,"), "line 5: `eflops`"),
    "csv: decreasing": (csv_text().replace("\n12.0,", "\n3,"), "3 follows 8"),
    "csv: duplicated": (csv_text().replace("\n12.0,", "\n8,"), "given twice"),
    "csv: score too high": (csv_text(joint=101), "line 2: `score` must be a score in percent, at most 100"),
    "csv: header": (
        csv_text().replace("eflops,score", "flops,score"),
        "the header must name the columns eflops and score",
    ),
    "csv: no header": (csv_text().removeprefix("eflops,score\n"), "the header must name"),
    "csv: no joint": (csv_text().replace("0,60.0\n", "", 1), "no row at 0 EFLOPs"),
    "csv: ragged": (csv_text() + "200,71,5\n", "has 3 values, but the header has 2"),
    "csv: only the joint": ("eflops,score\n0,60\n", "no row after the switch point"),
    "csv: only a header": ("eflops,score\n", "a header and no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_curves_have_a_clear_answer_and_write_nothing(fit, case):
    content, says = BAD[case]
    name = "curves.csv" if "csv" in case else "curves.json"
    status, out, err, rows = fit(content, name=name)
    assert status == 2 and rows is None and out == "" and err.startswith("error: ") and "Traceback" not in err
    with pytest.raises(UserError, match=says):
        raise UserError(err)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--reach=101"], "scores are in percent and end at 100"),
        (["--reach=nan"], "--reach"),
        (["--budget=-1"], "--budget: expected a finite number"),
        (["--points=0"], "--points"),
        (["--points=1.5"], "--points"),
        (["--tau=3"], "--tau belongs to --method=paper"),
        (["--method=best"], "--method"),
        (["--method=paper", "--alpha=0.3"], "--alpha"),
        (["--method=paper", "--eps=50"], "P_sft"),
        (["--points=0.01"], "larger share"),
        (["--run.seed=1"], "unknown option --run.seed"),
        (["other.csv"], "expected one file or folder"),
        (["--out=no/where.json"], "--out FILE"),
    ],
)
def test_bad_options_have_a_clear_answer_and_write_nothing(fit, options, says):
    status, _, err, rows = fit(csv_text(), *options, name="mine.csv")
    assert status == 2 and says in err and rows is None and "Traceback" not in err


def test_constant_scores_are_flat_and_no_ceiling(fit):
    status, out, _, (row,) = fit(csv_text(y=np.full(30, 60.0)), name="mine.csv")
    assert status == 0 and row["verdict"] == "flat" and "not a ceiling" in " ".join(out.split())
    assert np.isfinite([row["a_post"], row["a_post_high"], row["prior_shift"]]).all()
    for level in (0.0, 100.0):
        (row,) = fit(csv_text(y=np.full(30, level), joint=level), name="mine.csv")[3]
        assert row["a_post"] <= 100 and row["verdict"] == "flat"
    (row,) = fit(csv_text(y=np.full(30, 60.0)), "--method=paper", name="mine.csv")[3]
    assert row["a_post"] == pytest.approx(60, abs=0.01)


def test_two_points_are_fitted_and_said_to_be_too_few(fit):
    (row,) = fit(csv_text(X[:2], Y[:2]), name="mine.csv")[3]
    assert row["verdict"] == "too_short" and row["a_post_low"] < row["a_post"] < row["a_post_high"]


# ---- fuzz: whatever the file holds, curves or a UserError


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = (
    json.loads(minimal(eflops=[4.0, 8.0], scores=[61.0, 62.0], p_sft_se=1.0, score_se=1.0, max_score=90.0)),
    {
        "meta": {"benchmarks": {"a": 3, "b": 1}, "model": {"hidden_size": 8}, "max_score": 90},
        "datasets": {
            "A": {
                "batch_size": 16,
                "mean_seq_len": 100,
                "checkpoint_steps": [0, 5],
                "sft": [{"eflops": 0.0, "scores": {"a": 40, "b": 0}}, {"eflops": 1.0, "scores": {"a": 50, "b": 5}}],
                "rl": {
                    "5": [{"eflops": 1.0, "scores": {"a": 50, "b": 5}}, {"eflops": 2.0, "scores": {"a": 51, "b": 5}}]
                },
            }
        },
    },
)


def places(value, here=()):
    yield here
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*here, key))


@st.composite
def spoiled(draw):
    """A good document with up to three of its values replaced, or removed."""
    document = json.loads(json.dumps(draw(st.sampled_from(DOCUMENTS))))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(document), key=repr)))
        if not path:
            return json.dumps(draw(JSON))
        place = document
        for key in path[:-1]:
            place = place[key]
        if isinstance(place, dict) and draw(st.booleans()):
            del place[path[-1]]
        else:
            place[path[-1]] = draw(JSON | st.integers(-(10**320), 10**320))
    return json.dumps(document)


def read(file, content):
    file.write_bytes(content)
    try:
        curves = read_curves(file)
    except UserError as error:
        message = str(error)
        if not message:
            pytest.fail("a UserError without a message")
        return None
    for curve in curves:
        assert isinstance(curve, Curve) and len(curve.eflops) == len(curve.scores) > 0
        assert np.isfinite([*curve.eflops, *curve.scores, curve.p_sft]).all() and (np.diff(curve.eflops) > 0).all()
        assert min(curve.scores) >= 0 and max(*curve.scores, curve.p_sft) <= curve.max_score <= 100
    return curves


FUZZ = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.one_of(spoiled(), JSON.map(json.dumps), JSON.map(lambda value: json.dumps({"curves": value}))))
def test_spoiled_json_gives_curves_or_a_user_error(tmp_path, content):
    read(tmp_path / "curves.json", content.encode())


@FUZZ
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from(["curves.json", "curves.csv"]))
def test_any_bytes_give_curves_or_a_user_error(tmp_path, content, name):
    read(tmp_path / name, content)


@FUZZ
@given(
    st.lists(
        st.lists(st.sampled_from(["0", "1", "2.5", "60", "nan", "-1", "1e999", "", "x", '"', "a,b", "٣"]), max_size=4),
        max_size=6,
    ),
    st.sampled_from(
        ["eflops,score", "score,eflops,curve", "curve,eflops,score,score_se", "EFLOPS,Score", "eflops,score,score"]
    ),
)
def test_any_csv_gives_curves_or_a_user_error(tmp_path, rows, header):
    read(tmp_path / "curves.csv", "\n".join([header, *(",".join(row) for row in rows)]).encode())


def test_the_spoiled_documents_were_good(tmp_path):
    assert all(read(tmp_path / "curves.json", json.dumps(document).encode()) is not None for document in DOCUMENTS[:1])
    exchange = json.loads(json.dumps(DOCUMENTS[1]))
    del exchange["meta"]["model"]
    assert read(tmp_path / "curves.json", json.dumps(exchange).encode()) is not None


def test_numbers_of_problems_whose_sum_is_no_number_are_refused(tmp_path):
    exchange = json.loads(json.dumps(DOCUMENTS[1]))
    del exchange["meta"]["model"]
    exchange["meta"]["benchmarks"] = {"a": 1e308, "b": 1e308}
    assert read(tmp_path / "curves.json", json.dumps(exchange).encode()) is None


def test_what_the_parsers_themselves_refuse_is_a_user_error(tmp_path):
    assert read(tmp_path / "curves.json", b"[" * 100_000) is None
    assert read(tmp_path / "curves.json", b'{"curves": ' + b"9" * 5000 + b"}") is None
    assert (
        read(tmp_path / "curves.csv", b"eflops,score\n" + b"1" * 200_000 + b",60\n") is None
    )  # beyond the csv module's limit
