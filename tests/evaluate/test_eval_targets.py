"""The models that `pctrain eval` takes: three kinds of folders, their names, and the curves of RL runs."""

import json
import shutil

import pytest

from pctrain.cli.main import main
from pctrain.common.errors import UserError
from pctrain.evaluate import rl_curves
from pctrain.evaluate.statistics import Estimate
from pctrain.evaluate.targets import find
from pctrain.report.curves import read_curves


@pytest.fixture
def run(two_answers, tmp_path):
    shutil.copytree(two_answers, tmp_path / "a" / "run", ignore=shutil.ignore_patterns("*.distcp"))
    return tmp_path / "a" / "run"


def test_the_three_kinds_of_models(run):
    folder = run / "checkpoints" / "step-25"
    hf, checkpoint, whole = find([run / "model", folder, run], None)
    assert (hf.name, hf.hf_dir, hf.checkpoint, hf.step) == ("model", run / "model", None, None)
    assert (checkpoint.name, checkpoint.checkpoint, checkpoint.kind, checkpoint.step) == (
        "run-step-25",
        folder,
        "sft",
        25,
    )
    assert (whole.name, whole.hf_dir, whole.checkpoint, whole.step) == ("run", run / "hf", None, 50)
    assert 0 < checkpoint.eflops_sft < whole.eflops_sft and checkpoint.eflops_rl == 0
    assert find([folder], run / "hf")[0].hf_dir == checkpoint.hf_dir != run / "hf"  # the run knows its own model


def test_a_checkpoint_that_was_moved_away_from_its_run_takes_model_path(run, tmp_path):
    moved = shutil.copytree(run / "checkpoints" / "step-25", tmp_path / "far" / "away" / "step-25")
    [target] = find([moved], run / "hf")
    own = find([run / "checkpoints" / "step-25"], None)[0]
    assert (target.hf_dir, target.run, target.eflops_sft) == (run / "hf", None, own.eflops_sft)
    with pytest.raises(UserError, match=r"names its model; model.path = .*nowhere has no config.json"):
        find([moved], tmp_path / "nowhere")


def test_names_take_as_many_parts_as_it_takes_to_be_distinct(run, tmp_path):
    shutil.copytree(run, tmp_path / "b" / "run")
    names = [
        target.name for target in find([run, tmp_path / "b" / "run" / "hf", run / "checkpoints" / "step-25"], None)
    ]
    assert names == ["a-run", "b-run", "a-run-step-25"]


def test_a_folder_that_is_no_model_is_refused(run, tmp_path):
    def refused(*paths):
        with pytest.raises(UserError) as error:
            find(paths, None)
        return str(error.value)

    assert "no such folder; expected a Hugging Face directory" in refused(tmp_path / "nothing")
    assert "neither a Hugging Face directory (config.json), nor a run folder" in refused(tmp_path)
    assert "these weights are given more than once" in refused(run, run / "hf")
    shutil.rmtree(run / "hf")
    assert (
        f"has not finished, so it has no hf/; let it end, or name a checkpoint, such as {run}/checkpoints/step-50"
        in refused(run)
    )
    (run / "checkpoints" / "step-25" / "state.json").write_text("{")
    assert "step-25/state.json: not valid JSON (line 1, column 2: " in refused(run / "checkpoints" / "step-25")
    (run / "config.yaml").unlink()
    assert "has no config.yaml that names its model; give its Hugging Face directory by --model.path" in refused(
        run / "checkpoints" / "step-50"
    )


def rl_run(sft, folder, steps, flops):
    """Make the files of an RL run from step 50 of `sft`, without weights."""
    config = (sft / "config.yaml").read_text().replace("kind: sft", "kind: rl")
    assert "checkpoint: null" in config
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.replace("checkpoint: null", f"checkpoint: {sft}/checkpoints/step-50"))
    for step in steps:
        shutil.copytree(sft / "checkpoints" / "step-50", folder / "checkpoints" / f"step-{step}")
        place = folder / "checkpoints" / f"step-{step}"
        (place / "manifest.json").write_text(
            json.dumps(json.loads((place / "manifest.json").read_text()) | {"kind": "rl", "step": step})
        )
        zero = dict.fromkeys(("sequences", "tokens", "exact_flops", "seconds", "device_seconds"), 0)
        totals = {"rollout": {**zero, "paper_flops": flops * step * 1e18}, "evaluation": {**zero, "paper_flops": 9e18}}
        ledger = {"joint": 1.5, "totals": totals}
        (place / "state.json").write_text(json.dumps({"step": step, "ledger": ledger}))
    return folder


def test_checkpoints_of_rl_runs_become_curves_that_fit_reads(run, tmp_path, capsys):
    steps = [10, 5, 20, 40]
    rl, other = (rl_run(run, tmp_path / name, steps, flops) for name, flops in (("rl-one", 2.0), ("rl-two", 3.0)))
    paths = [rl / "checkpoints" / f"step-{step}" for step in steps] + [other / "checkpoints" / "step-5"]
    scores = {f"rl-one-step-{step}": Estimate(0.5 + step / 100, 0.4 + step / 100, 0.6 + step / 100) for step in steps}
    scores |= {
        "rl-two-step-5": Estimate(0.7, 0.6, 0.8),
        "run-step-50": Estimate(0.5, 0.48, 0.52),
        "run": Estimate(0.5, 0.48, 0.52),
    }
    for start in (run / "checkpoints" / "step-50", run):  # the checkpoint, or the run whose last one it is
        curves, messages = rl_curves.curves_of(find([*paths, start], None), scores)
        assert messages == [] and [curve["name"] for curve in curves] == ["rl-one", "rl-two"]
        assert curves[0]["eflops"] == pytest.approx([10, 20, 40, 80]) and curves[0]["scores"] == pytest.approx(
            [55, 60, 70, 90]
        )
        assert (curves[0]["p_sft"], curves[0]["p_sft_se"], curves[0]["score_se"]) == pytest.approx(
            (50, 2 / 1.96, 10 / 1.96), rel=1e-3
        )
    file = tmp_path / "curves.json"
    file.write_text(rl_curves.document(curves))
    assert read_curves(file)[0].eflops.tolist() == curves[0]["eflops"]
    assert main(["fit", str(file), "--out", str(tmp_path / "fits.json")]) == 0
    assert [row["dataset"] for row in json.loads((tmp_path / "fits.json").read_text())] == ["rl-one"]
    assert "not fitted: rl-two has 1 point" in capsys.readouterr().out


def test_a_curve_without_its_start_is_left_out_with_a_message(run, tmp_path):
    rl = rl_run(run, tmp_path / "rl", [5], 1.0)
    curves, messages = rl_curves.curves_of(
        find([rl / "checkpoints" / "step-5"], None), {"rl-step-5": Estimate(0.5, 0.4, 0.6)}
    )
    assert curves == [] and messages == [
        f"rl: no curve, for its start {run}/checkpoints/step-50 is not among the models: give it as well"
    ]
