"""`rl.algorithm` and its options: what a user may write, and the message for an option of another algorithm."""

import pytest

from pctrain.config.load import dump, load, read
from tests.helpers.config_cases import refusal


def test_an_algorithm_is_a_name_or_a_name_with_options(write):
    assert load(write("rl: {algorithm: dapo_d}\n"), []).rl.algorithm.name == "dapo_d"
    path = write("rl:\n  algorithm:\n    name: prefix_rft\n    low_start: 0.9\n")
    assert load(path, []).rl.algorithm.low_start == 0.9
    config = load(path, ["--rl.algorithm.low_start=0.8", "--rl.algorithm.kl_coef=0.1"])
    assert (config.rl.algorithm.low_start, config.rl.algorithm.kl_coef) == (0.8, 0.1)
    assert load(None, ["--rl.algorithm={name: upt, gamma: 2}"]).rl.algorithm.gamma == 2
    assert load(None, ["--rl.algorithm.clip_high=0.3"]).rl.algorithm.clip_high == 0.3  # of the default, dapo_dc


def test_a_file_may_give_options_to_the_algorithm_that_another_names(tmp_path):
    (tmp_path / "shared.yaml").write_text("rl: {algorithm: {entropy_coef: 0.5}}\n")
    (tmp_path / "mine.yaml").write_text("base: shared.yaml\nrl: {algorithm: grpo}\n")
    algorithm = load(tmp_path / "mine.yaml", []).rl.algorithm
    assert (algorithm.name, algorithm.entropy_coef) == ("grpo", 0.5)


def test_the_paper_gives_each_algorithm_its_defaults():
    defaults = {name: load(None, [f"--rl.algorithm={name}"]).rl.algorithm for name in ("grpo", "dapo_dc", "luffy")}
    assert [options.entropy_coef for options in defaults.values()] == [0.001, 0.0, 0.001]
    assert [options.std_normalise for options in defaults.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--rl.algorithm=srft", "--rl.algorithm.clip_low=0.1"],
            "rl.algorithm.clip_low (command line) is not an option of srft; it belongs to grpo, dapo_d, dapo_dc, upt, "
            "prefix_rft; srft has: std_normalise, leave_one_out, entropy_coef, normaliser, overlong_buffer, "
            "overlong_weight, is_correction, is_cap",
        ),
        (["--rl.algorithm.gamma=1"], "it belongs to upt; dapo_dc has: "),
        (["--rl.algorithm.clip_hgih=1"], "did you mean rl.algorithm.clip_high?"),
        (["--rl.algorithm.clip_high=x"], 'rl.algorithm.clip_high (command line): expected a number, got "x"'),
        (
            ["--rl.algorithm.clip_high=-1"],
            "rl.algorithm.clip_high (command line): expected a value greater than 0, got -1",
        ),
        (["--rl.algorithm={name: grpo, clip_low: a}"], "rl.algorithm.clip_low (command line): expected a number"),
        (["--rl.algorithm=3"], "rl.algorithm (command line): expected 'grpo'"),
        (
            ["--rl.algorithm={name: [a]}"],
            "or module:Class, such as my_algorithms:Mine for my_algorithms.py in the current",
        ),
        (
            ["--study.algorithms=[grpo, {name: upt, gama: 1}]"],
            "study.algorithms.1 (command line): gama: unknown option",
        ),
        (
            ["--rl.clip_high=0.3"],
            "is an option of the algorithm: write --rl.algorithm.clip_high=VALUE on the command line",
        ),
        (["--rl.upt_gamma=2"], "rl: {algorithm: {name: upt, gamma: VALUE}} in a file"),
        (["--rl.prefix_beta_a=2"], "--rl.algorithm.beta_a=VALUE on the command line"),
    ],
)
def test_an_option_that_the_algorithm_does_not_have(overrides, message):
    assert message in refusal(None, *overrides)


def test_an_option_of_another_algorithm_in_a_file_names_the_line(write):
    path = write("rl:\n  algorithm:\n    name: luffy\n    clip_low: 0.1\n    entropy_coef: much\n")
    message = refusal(path)
    assert f"rl.algorithm.clip_low ({path}:4) is not an option of luffy" in message
    assert f"rl.algorithm.entropy_coef ({path}:5): expected a number" in message  # all mistakes at once


def test_the_options_come_back_from_the_file_of_a_run(write):
    config = read(None, ["--rl.algorithm={name: srft, is_cap: 3}", "--study.algorithms=[{name: upt, gamma: 1}]"])
    again = read(write(dump(config)), [])
    assert again == config and type(again.rl.algorithm) is type(config.rl.algorithm)


def test_checks_read_the_options_of_the_verifiers_own_table():
    from pctrain.config.verifiers import VERIFIER_NAMES
    from pctrain.reward.verifiers import VERIFIERS

    assert tuple(VERIFIERS) == VERIFIER_NAMES
