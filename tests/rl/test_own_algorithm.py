"""A user's own algorithm: a wrong name is an error before anything is written, and a run is bound to the file."""

import sys

import numpy as np
import pytest

from pctrain.cli.main import main
from pctrain.common.errors import UserError
from pctrain.config.load import load
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.study.stages import stages_of
from tests.helpers import rl_cases

MODULE = """
from pctrain.rl.algorithms.grpo import GRPO
class Halved(GRPO):
    needs_expert = True
    def advantages(self, rewards):
        return super().advantages(rewards) / 2
number = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_algorithms.py").write_text(MODULE)
    (tmp_path / "broken_algorithms.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("own_algorithms", "broken_algorithms"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_it_overrides_what_differs():
    rewards = np.array([1.0, 0.0])
    plain, own = (
        rl_cases.algorithm(name, std_normalise=False).advantages(rewards) for name in ("grpo", "own_algorithms:Halved")
    )
    assert plain.tolist() == [0.5, -0.5] and own.tolist() == [0.25, -0.25]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_algorithms:Absent", ["own_algorithms.py has no Absent; its algorithms: Halved"]),
        (
            "own_algorithms:number",
            ["expected a subclass of pctrain.rl.algorithms.grpo.GRPO (or of base.Algorithm), found 5"],
        ),
        ("broken_algorithms:Any", ["No module named 'no_such_package'", "broken_algorithms.py, line 1"]),
        ("absent_algorithms:Any", ["No module named 'absent_algorithms'", "looked in"]),
    ],
)
def test_a_wrong_name_is_an_error_before_anything_is_written(folder, capsys, name, told):
    before = sorted(folder.rglob("*"))
    assert main(["rl", f"--rl.algorithm={name}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: rl.algorithm = '{name}': ") and all(part in said for part in told)
    assert [path for path in sorted(folder.rglob("*")) if path not in before and "__pycache__" not in str(path)] == []


@pytest.mark.parametrize("name", ["ppo", "a:b:c", "a b:C", ":C", "a:"])
def test_a_name_of_another_form_is_refused_with_what_there_is(name):
    with pytest.raises(
        UserError, match=r"rl.algorithm .command line.: expected 'grpo', .*'prefix_rft' or module:Class, such as"
    ):
        load(None, [f"--rl.algorithm={name}"])


def test_a_run_is_bound_to_the_file_of_its_algorithm(folder):
    assert algorithms.source_files("own_algorithms:Halved") == [folder / "own_algorithms.py"]
    assert algorithms.source_files("grpo") == [] and algorithms.find("grpo") is GRPO


def test_a_study_accepts_it_and_finds_its_folder_again(tmp_path):
    from pctrain.run import layout

    config = load(
        None,
        [
            f"--run.dir={tmp_path}/study",
            "--study.algorithms=[grpo, 'own_algorithms:Halved']",
            "--study.checkpoints=[100]",
        ],
    )
    stages = {stage.name: stage for stage in stages_of(config)}
    own = stages["own_algorithms.Halved-step-100"]
    assert own.algorithm == "own_algorithms:Halved"
    own.folder(tmp_path, 100).mkdir(parents=True)
    [place] = layout.find_runs(tmp_path)
    assert place.folder == own.folder(tmp_path, 100) and (place.algorithm, place.step) == ("own_algorithms.Halved", 100)
