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
from pydantic import Field
from pctrain.rl.algorithms.grpo import GRPO
class Halved(GRPO):
    class Options(GRPO.Options):
        needs_expert = True
    def advantages(self, rewards):
        return super().advantages(rewards) / 2
class Harder(GRPO):
    class Options(GRPO.Options):
        dynamic_sampling = True
        expert_in_group = True
        needs_expert = True
        strength: float = Field(1.0, gt=0, description="of the own term")
class Forgetful(GRPO):
    pass
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
    ("name", "parts"),
    [
        ("own_algorithms:Absent", ["own_algorithms.py has no Absent; its algorithms: Halved, Harder, Forgetful"]),
        (
            "own_algorithms:number",
            ["expected a subclass of pctrain.rl.algorithms.grpo.GRPO (or of base.Algorithm), found 5"],
        ),
        ("broken_algorithms:Any", ["No module named 'no_such_package'", "broken_algorithms.py, line 1"]),
        ("absent_algorithms:Any", ["No module named 'absent_algorithms'", "looked in"]),
    ],
)
def test_a_wrong_name_is_an_error_before_anything_is_written(folder, capsys, name, parts):
    before = sorted(folder.rglob("*"))
    assert main(["rl", f"--rl.algorithm={name}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: rl.algorithm = '{name}': ") and all(part in said for part in parts)
    assert [path for path in sorted(folder.rglob("*")) if path not in before and "__pycache__" not in str(path)] == []


@pytest.mark.parametrize("name", ["ppo", "a:b:c", "a b:C", ":C", "a:"])
def test_a_malformed_name_is_refused_with_the_list_of_algorithms(name):
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


def test_it_has_its_own_options():
    config = load(
        None, ["--rl.algorithm=own_algorithms:Harder", "--rl.algorithm.strength=2", "--rl.algorithm.clip_low=0.1"]
    )
    assert (config.rl.algorithm.strength, config.rl.algorithm.clip_low) == (2.0, 0.1)
    algorithm = algorithms.build(config.rl, 48)
    assert algorithm.options.strength == 2 and algorithm.prefixes(None, 1, 1, 0) == [[] for _ in range(7)]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("strength=-1", "rl.algorithm.strength (command line): expected a value greater than 0, got -1"),
        ("strenght=1", "did you mean rl.algorithm.strength?"),
        ("gamma=1", "rl.algorithm.gamma (command line) is not an option of own_algorithms:Harder"),
    ],
)
def test_a_wrong_option_of_it_is_refused(capsys, option, says):
    assert main(["rl", "--rl.algorithm=own_algorithms:Harder", f"--rl.algorithm.{option}"]) == 2
    assert says in capsys.readouterr().err


def test_its_traits_are_planned():
    """A user's own algorithm with dynamic sampling and an expert in the group used to be planned as plain GRPO."""
    from pctrain.plan.options import PlanOptions
    from pctrain.plan.shapes import hf_config
    from pctrain.plan.work import work

    steps = {}
    for name in ("grpo", "dapo_d", "luffy", "own_algorithms:Harder"):
        config = load(None, [f"--rl.algorithm={name}", "--rl.round_prompts=16"])
        steps[name] = work("rl", config, hf_config(config), PlanOptions(gpus=1, gpu="cpu"))
    own = steps["own_algorithms:Harder"]
    assert (own.rounds, own.prompts) == (steps["dapo_d"].rounds, steps["dapo_d"].prompts) == (4, 16)
    assert own.group == steps["luffy"].group == 7 and (steps["grpo"].rounds, steps["grpo"].group) == (1, 8)


def test_its_traits_are_counted_in_the_cost_of_a_study():
    from pctrain.compute import flops
    from pctrain.compute.model_shape import QWEN2_5_7B as SHAPE
    from pctrain.study.cost import rl_step

    rl = load(None, ["--rl.algorithm=own_algorithms:Harder"]).rl
    sampled = {"rounds": 1, "batch_generated": rl.round_prompts, "batch_trained": rl.prompts, "group": rl.group - 1}
    expected = flops.paper_dapo_step(SHAPE, **sampled, mean_length=100)
    expected += flops.paper_luffy_step(SHAPE, batch=rl.prompts, group=0, length=100, experts=1, expert_length=100)
    assert rl_step(SHAPE, rl.algorithm, rl, 100) == pytest.approx(expected)
    luffy = load(None, ["--rl.algorithm=luffy"]).rl
    formula = flops.paper_luffy_step(SHAPE, batch=32, group=7, length=100, experts=1, expert_length=100)
    assert rl_step(SHAPE, luffy.algorithm, luffy, 100) == pytest.approx(formula)


def test_in_a_comparison_it_starts_where_its_traits_say(tmp_path):
    options = ["--study.policy=compare", "--sft.eval_every=100", "--rl.algorithm=grpo"]
    own = "--study.algorithms=['own_algorithms:Harder', 'own_algorithms:Forgetful']"
    names = [stage.name for stage in stages_of(load(None, [*options, own]))]
    assert names == ["sft", "rl-base", "own_algorithms.Harder-base", "own_algorithms.Forgetful-stable"]


def test_a_comparison_refuses_it_as_pure_rl():
    with pytest.raises(UserError, match=r"learns from experts, but study\.policy = compare"):
        load(None, ["--study.policy=compare", "--sft.eval_every=100", "--rl.algorithm=own_algorithms:Harder"])


def test_a_trait_set_on_the_class_is_refused(folder):
    (folder / "old_algorithms.py").write_text(
        "from pctrain.rl.algorithms.grpo import GRPO\nclass Old(GRPO):\n    dynamic_sampling = True\n"
    )
    with pytest.raises(UserError, match=r"Old.dynamic_sampling is not read: declare it in Old.Options"):
        load(None, ["--rl.algorithm=old_algorithms:Old"])


def test_the_config_of_its_run_can_be_read_without_its_module(tmp_path, monkeypatch):
    from pctrain.config.tree import Config

    tree = load(None, ["--rl.algorithm=own_algorithms:Harder", "--rl.algorithm.strength=2"]).model_dump(mode="json")
    monkeypatch.delitem(sys.modules, "own_algorithms")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    config = Config.model_validate(tree)
    assert config.rl.algorithm.name == "own_algorithms:Harder" and config.model_dump(mode="json") == tree
