"""Reading curves from both sources, the errors a user meets, and `pctrain fit` as a whole."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pctrain.common.errors import UserError
from pctrain.compute.flops import EFLOP, paper_sft
from pctrain.compute.model_shape import QWEN2_5_7B
from pctrain.report import fit_command
from pctrain.report.curves import read_curves
from pctrain.report.fit_options import FitOptions

PUBLISHED_FILE = Path(__file__).parents[1] / "helpers" / "published_curves.json"


def point(eflops, a, b):
    return {"eflops": eflops, "scores": {"easy": a, "hard": b}}


def x_sft(step):
    return paper_sft(QWEN2_5_7B, steps=step, batch=16, mean_length=10011) / EFLOP


DOCUMENT = {
    "meta": {"benchmarks": {"easy": 300, "hard": 100}},
    "datasets": {
        "A": {
            "batch_size": 16,
            "mean_seq_len": 10011,
            "sft": [
                point(0.0, 40, 0),
                point(0.30, 60, 10),
                point(0.57, 80, 20),
                point(0.9, 90, 30),
                point(1.14, 92, 32),
            ],
            "rl": {
                "124": [point(1.0, 92, 34), point(2.0, 94, 36)],
                "0": [point(1.0, 50, 10)],
                "62": [point(3.5, 80, 24), point(7.0, 84, 28)],
            },
        },
    },
}


def written(tmp_path, document, name="curves.json"):
    file = tmp_path / name
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def changed(path, value):
    """DOCUMENT with the value at `path` (a list of keys) replaced, or removed where `value` is ..."""
    document = copy.deepcopy(DOCUMENT)
    *parents, last = path
    place = document
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


def test_scores_are_weighted_by_problems_and_p_sft_is_the_nearest_entry(tmp_path):
    curves = read_curves(written(tmp_path, DOCUMENT))
    assert [(c.dataset, c.start_step) for c in curves] == [("A", 0), ("A", 62), ("A", 124)]
    start, first, second = curves
    assert start.p_sft == 30 and start.eflops_sft == 0
    assert x_sft(62) == pytest.approx(0.573, abs=1e-3) and first.eflops_sft == 0.57
    assert first.p_sft == pytest.approx((300 * 80 + 100 * 20) / 400)
    assert second.eflops_sft == 1.14
    np.testing.assert_allclose(first.scores, [66, 70])
    np.testing.assert_array_equal(first.eflops, [3.5, 7.0])


def test_the_model_of_the_curves_sets_their_compute(tmp_path):
    """At half the width a step costs a third (attention shrinks less), so the checkpoint moves along the SFT curve."""
    model = {
        "num_hidden_layers": 28,
        "hidden_size": 1792,
        "intermediate_size": 9472,
        "num_attention_heads": 14,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    document = changed(["meta", "model"], model)
    document["datasets"]["A"]["sft"][1] = point(0.38, 60, 10)
    document["datasets"]["A"]["rl"] = {"124": DOCUMENT["datasets"]["A"]["rl"]["124"]}
    (curve,) = read_curves(written(tmp_path, document))
    assert curve.eflops_sft == 0.38  # 1.14 with the published model


def test_checkpoint_steps_that_match_the_sft_entries_one_to_one_need_no_model(tmp_path):
    document = changed(["datasets", "A", "checkpoint_steps"], [0, 30, 62, 100, 124])
    del document["datasets"]["A"]["batch_size"]
    assert [c.eflops_sft for c in read_curves(written(tmp_path, document))] == [0, 0.57, 1.14]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ('{\n"meta": ,\n}', r"curves.json: not JSON \(line 2, column 9: "),
        ([1], r"curves.json: must be a JSON object"),
        (changed(["meta"], ...), "`meta` is missing"),
        (changed(["meta", "benchmarks"], {}), "meta.benchmarks"),
        (changed(["datasets", "A", "sft"], ...), r"datasets.A: the key `sft` is missing"),
        (changed(["datasets", "A", "sft"], []), r"datasets.A.sft: must be a list of one or more"),
        (changed(["datasets", "A", "batch_size"], ...), r"datasets.A: the key `batch_size` is missing"),
        (changed(["datasets", "A", "mean_seq_len"], 20000), r"no entry near the checkpoint at step 124"),
        (changed(["datasets", "A", "rl"], {}), "no RL curve"),
        (changed(["datasets", "A", "rl", "last"], []), "the key 'last' must be the step"),
        (
            changed(["datasets", "A", "rl", "62", 1, "eflops"], "7"),
            r"datasets.A.rl.62\[1\]: `eflops` must be a finite number",
        ),
        (
            changed(["datasets", "A", "rl", "62", 1, "eflops"], 3.5),
            r"datasets.A.rl.62: eflops must increase .* 3.5 follows 3.5",
        ),
        (
            changed(["datasets", "A", "rl", "62", 0, "scores", "hard"], ...),
            r"datasets.A.rl.62\[0\].scores: the key `hard` is missing",
        ),
        (changed(["datasets", "A", "rl", "62", 0, "scores", "hard"], 101), r"at most 100"),
        (changed(["datasets", "A", "rl", "62", 0, "scores", "hard"], float("nan")), r"finite"),
        (changed(["meta", "model"], {"hidden_size": 8}), r"meta.model: key 'num_attention_heads'"),
    ],
)
def test_a_malformed_file_names_the_place_and_writes_nothing(tmp_path, document, says):
    file = written(tmp_path, document)
    with pytest.raises(UserError, match=says):
        fit_command.main(file, FitOptions(out=tmp_path / "fits.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["curves.json"]


# ---- run folders


def run_folder(folder, evals, start_step=540):
    folder.mkdir(parents=True)
    lines = [{"step": 1, "kind": "train", "eflops_sft": 0.02, "eflops_rl": 0.001, "loss": None}]
    lines += [
        {"step": i, "kind": "eval", "eflops_sft": 0.02, "eflops_rl": x, "score": score, "score_se": se}
        for i, (x, score, se) in enumerate(evals)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "start.json").write_text(
        json.dumps({"start_step": start_step, "role": "stable", "sft_run": "sft", "eflops_sft": 0.02})
    )
    return folder


EVALS = [(0.0, 45.0, 2.2), (0.01, 55.0, 2.1), (0.02, 62.0, 2.2), (0.03, 66.0, 2.0)]


def test_a_run_folder_and_a_study_of_them(tmp_path):
    study = tmp_path / "quickstart"
    run_folder(study / "rl-step-1440", EVALS, 1440)
    folder = run_folder(study / "rl-step-540", EVALS)
    (curve,) = read_curves(folder)
    assert (curve.dataset, curve.start_step, curve.p_sft, curve.p_sft_se, curve.score_se) == (
        "quickstart",
        540,
        45.0,
        2.2,
        2.1,
    )
    assert curve.eflops_sft == 0.02
    np.testing.assert_array_equal(curve.eflops, [0.01, 0.02, 0.03])
    np.testing.assert_array_equal(curve.scores, [55, 62, 66])
    assert [c.start_step for c in read_curves(study)] == [540, 1440]


def test_a_study_of_sets_seeds_and_algorithms(tmp_path):
    for place in (
        "sets/hard/rl-step-20",
        "sets/easy/rl-step-20",
        "rl-luffy-step-0",
        "seed-1/sets/hard/rl-grpo-step-40",
    ):
        run_folder(tmp_path / place, EVALS, int(place.rpartition("-")[2]))
    assert [curve.name for curve in read_curves(tmp_path)] == [
        "luffy, step 0",
        "easy, step 20",
        "hard, step 20",
        "seed-1/hard/grpo, step 40",
    ]


def test_errors_of_run_folders(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_curves(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run folder"):
        read_curves(tmp_path)
    broken = run_folder(tmp_path / "broken", EVALS)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "kind": "ev')  # being written: left out
    assert len(read_curves(broken)) == 1
    with (broken / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:6: not valid JSON"):
        read_curves(broken)
    with pytest.raises(UserError, match="eflops_rl = 0, the switch point"):
        read_curves(run_folder(tmp_path / "no-joint", EVALS[1:]))
    with pytest.raises(UserError, match="with eflops_rl > 0"):
        read_curves(run_folder(tmp_path / "only-joint", EVALS[:1]))
    with pytest.raises(UserError, match=r"metrics.jsonl:4: `score` must be a finite number"):
        read_curves(run_folder(tmp_path / "no-score", [*EVALS[:2], (0.02, None, 2.0)]))
    sft = run_folder(tmp_path / "sft", EVALS)
    (sft / "start.json").unlink()
    with pytest.raises(UserError, match=r"start.json: missing; give the folder of an RL run"):
        read_curves(sft)


# ---- the command


def test_fit_writes_one_row_a_curve_and_says_what_it_skipped(tmp_path):
    out, console = tmp_path / "fits.json", Console(width=80, record=True, file=io.StringIO())
    rows = fit_command.main(written(tmp_path, DOCUMENT), FitOptions(out=out), console)
    assert json.loads(out.read_text()) == rows
    assert [(r["dataset"], r["start_step"], r["verdict"], r["n_points"]) for r in rows] == [
        ("A", 62, "too_short", 2),
        ("A", 124, "too_short", 2),
    ]
    text = console.export_text()
    assert "not fitted: A, step 0 has 1 point" in text
    assert "2 curves fitted (2 too_short), 1 skipped" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.json", "fits.json"]


def test_fit_of_a_run_folder_uses_its_standard_errors(tmp_path):
    wide = fit_command.main(run_folder(tmp_path / "a", EVALS), FitOptions(out=tmp_path / "a.json"))[0]
    exact = fit_command.main(
        run_folder(tmp_path / "b", [(x, y, 0.2) for x, y, _ in EVALS]), FitOptions(out=tmp_path / "b.json")
    )[0]
    assert wide["a_post_low"] < exact["a_post_low"] and wide["start_step"] == 540


def test_fit_refuses_an_output_that_cannot_be_or_must_not_be_written(tmp_path):
    file = written(tmp_path, DOCUMENT)
    for out in (tmp_path, tmp_path / "missing" / "fits.json", file):
        with pytest.raises(UserError, match=r"--out FILE|another --out"):
            fit_command.main(file, FitOptions(out=out))
    assert json.loads(file.read_text()) == DOCUMENT


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "vllm", "transformers"):
            raise ImportError(name + " was imported")
sys.meta_path.insert(0, Refuse())
from pctrain.report import fit_command; from pctrain.compute import ledger; from pctrain.ceiling import regimes
from pctrain.report.fit_options import FitOptions
fit_command.main(sys.argv[1], FitOptions(out=sys.argv[2]))
"""


def test_the_science_runs_without_torch(tmp_path):
    command = [sys.executable, "-c", NO_TORCH, str(PUBLISHED_FILE), str(tmp_path / "fits.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "fits.json").read_text())) == 16


@pytest.mark.parametrize("se", ["1e300", "1e-300", "101", "1e-5"])
def test_standard_errors_that_no_score_has(tmp_path, se):
    """Found by fuzzing: their squares are no numbers, and the fit ended in an OverflowError."""
    table, document = tmp_path / "curves.csv", tmp_path / "curves.json"
    table.write_text(f"eflops,score,score_se\n0,40,1\n1,45,{se}\n2,47,\n")
    curve = {"name": "a", "p_sft": 40, "eflops": [1, 2], "scores": [45, 47]}
    document.write_text(json.dumps({"curves": [curve | {"p_sft_se": float(se)}]}))
    for file, place in ((table, "line 3: `score_se`"), (document, r"curves\[0\]: `p_sft_se`")):
        with pytest.raises(UserError, match=f"{place} must be a standard error in points, 0.0001 to 100"):
            read_curves(file)
