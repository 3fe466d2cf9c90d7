"""Loading a config: what a user may write, and the error message for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pctrain.config.load import dump, load, read
from pctrain.config.tree import Config
from tests.helpers.config_cases import refusal

# ---- values


def test_file_goes_over_defaults_and_the_command_line_over_the_file(write):
    path = write("sft:\n  steps: 70\n  batch_size: 8\n")
    config = load(path, ["--sft.batch_size=16", "--run.seed=5"])
    assert (config.sft.steps, config.sft.batch_size, config.run.seed, config.sft.token_budget) == (70, 16, 5, 1024)


def test_a_section_given_in_part_keeps_the_defaults_of_its_place(write):
    assert load(write("rl:\n  optimizer:\n    warmup: 5\n"), []).rl.optimizer.lr == 1e-6
    assert load(None, ["--rl.optimizer={warmup: 5}"]).rl.optimizer.lr == 1e-6


@pytest.mark.parametrize("text", ["3e-3", "0.003", "3.0e-3", "3E-3"])
def test_numbers_as_people_write_them(write, text):
    assert load(write(f"sft: {{optimizer: {{lr: {text}}}}}"), []).sft.optimizer.lr == 0.003
    assert load(None, [f"--sft.optimizer.lr={text}"]).sft.optimizer.lr == 0.003


def test_paths_lists_and_null(write):
    overrides = [
        "--run.dir=2024-01-01",
        "--study.starts=[stable, overfit]",
        "--eval.max_response=null",
        "--data.train=7",
    ]
    config = load(None, overrides, sections=())
    assert config.run.dir == Path("2024-01-01") and [source.path for source in config.data.train] == [Path("7")]
    assert config.study.starts == ["stable", "overfit"] and config.eval.max_response is None


def test_empty_file_and_empty_section_are_defaults(write):
    assert load(write(""), []) == Config()
    assert load(write("sft:\n  # steps: 3\nrl:\n"), []) == Config()


def test_the_config_of_a_run_folder_starts_the_next_run(write):
    path = write(
        yaml.safe_dump(
            {"kind": "sft", **yaml.safe_load(dump(read(None, ["--sft.steps=77"]))), "fingerprints": {"a.jsonl": "00"}}
        )
    )
    assert load(path, []).sft.steps == 77


@given(
    st.integers(1, 10**9),
    st.floats(1e-12, 1e3),
    st.sampled_from(["float32", "bfloat16"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
)
def test_dump_and_read_give_the_same_config(tmp_path_factory, steps, lr, dtype, name):
    config = Config()
    config.sft.steps, config.sft.optimizer.lr, config.model.dtype, config.data.fields.prompt = steps, lr, dtype, name
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert read(path, []) == config


# ---- unknown keys


@pytest.mark.parametrize(
    "key, near",
    [
        ("sft.stesp", "sft.steps"),
        ("rl.optimizer.lrr", "rl.optimizer.lr"),
        ("rl.optimiser.lr", "rl.optimizer.lr"),
        ("stf.steps", "sft.steps"),
        ("rl.lr", "rl.optimizer.lr"),
        ("model.layers", "model.architecture.layers"),
        ("temperature", "rollout.temperature or eval.temperature"),
    ],
)
def test_an_unknown_key_names_its_full_path_and_the_nearest(key, near):
    assert refusal(None, f"--{key}=1") == f"unknown key {key} (command line); did you mean {near}?"


def test_an_unknown_key_of_a_file_names_file_and_line(write):
    path = write("run:\n  seed: 1\nsft:\n  steps: 3\n  optimizer:\n    warmpu: 3\nrll: {}\n")
    message = refusal(path)
    assert f"unknown key sft.optimizer.warmpu ({path}:6); did you mean sft.optimizer.warmup?" in message
    assert f"unknown key rll ({path}:7); did you mean rl?" in message  # all mistakes are reported at once


def test_a_key_like_nothing_lists_the_sections():
    assert "sections are: run, model" in refusal(None, "--zzzqqq=1")


# ---- wrong types


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("sft.steps", "many", 'sft.steps (command line): expected an integer, got "many"'),
        ("sft.steps", "3.5", "sft.steps (command line): expected an integer, got 3.5"),
        ("sft.steps", "true", "sft.steps (command line): expected an integer, got true"),
        ("sft.steps", "0", "sft.steps (command line): expected a value greater than or equal to 1, got 0"),
        ("sft.optimizer.lr", "fast", 'sft.optimizer.lr (command line): expected a number, got "fast"'),
        ("sft.optimizer.lr", ".nan", "sft.optimizer.lr (command line): expected a finite number, got nan"),
        ("sft.optimizer.lr", ".inf", "sft.optimizer.lr (command line): expected a finite number, got inf"),
        ("run.tensorboard", "1", "run.tensorboard (command line): expected true or false, got 1"),
        ("run.seed", "null", "run.seed (command line): expected an integer, got null"),
        ("model.dtype", "fp16", "model.dtype (command line): expected 'float32' or 'bfloat16', got \"fp16\""),
        ("study.starts", "early", 'study.starts (command line): expected a list, such as [a, b], got "early"'),
        (
            "study.starts",
            "[erly]",
            "study.starts.0 (command line): expected 'early', 'stable' or 'overfit', got \"erly\"",
        ),
        ("eval.max_response", "long", 'eval.max_response (command line): expected an integer, got "long"'),
        ("sft", "3", "sft (command line): expected a section (key: value pairs), got 3"),
        ("sft.steps", "[1", "--sft.steps: '[1' is not valid YAML"),
    ],
)
def test_a_wrong_value_names_the_key_what_was_expected_and_what_was_given(key, value, expected):
    assert expected in refusal(None, f"--{key}={value}")


def test_a_wrong_value_of_a_file_names_file_and_line(write):
    path = write("sft:\n  optimizer:\n    lr: fast\nstudy:\n  starts:\n  - early\n  - 3\n")
    message = refusal(path)
    assert f"sft.optimizer.lr ({path}:3): expected a number" in message
    assert f"study.starts.1 ({path}:5): expected" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("sft:\n  steps: [1\nrl: 3\n", ":3: not valid YAML"),
        ("sft:\n\tsteps: 1\n", ":2: not valid YAML"),
        ("sft: {steps: 1}\nsft: {steps: 2}\n", ":2: sft is given twice (first on line 1)"),
        ("- a\n", ":1: expected sections (key: value pairs)"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("run: {dir: !!python/object:os.system {}}\n", ":1: not valid YAML"),
    ],
)
def test_malformed_yaml_names_the_line(write, text, message):
    assert message in refusal(write(text))


def test_a_missing_file_and_bytes_that_are_not_text(tmp_path):
    assert "nope.yaml does not exist" in refusal(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff\n")
    assert "cannot be read" in refusal(tmp_path / "latin.yaml")


def test_the_reference_page_matches_the_types():
    from pctrain.config.help import reference

    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text() == reference(), "write it anew: python -m pctrain.config.help > docs/config.md"


def test_a_file_goes_over_its_bases(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "optimizer.yaml").write_text("sft: {optimizer: {lr: 1e-3, warmup: 5}, steps: 7}\n")
    (tmp_path / "common" / "sft.yaml").write_text("base: optimizer.yaml\nsft: {steps: 70, batch_size: 3}\n")
    (tmp_path / "seed.yaml").write_text("run: {seed: 5}\nsft: {batch_size: 4}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: [common/sft.yaml, seed.yaml]\nsft: {val_every: 9}\n")
    config = load(mine, ["--sft.val_every=8"])
    assert (config.sft.optimizer.lr, config.sft.optimizer.warmup, config.sft.steps) == (
        1e-3,
        5,
        70,
    )  # the nearest file takes precedence
    assert (config.sft.batch_size, config.run.seed, config.sft.val_every) == (4, 5, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: absent.yaml\n", "absent.yaml does not exist"),
        ("base: 3\n", "config.yaml:1: base: expected a config file"),
        ("base: []\n", "expected a config file"),
        ("base: config.yaml\n", "`base` comes back to it"),
        ("base: other.yaml\n", "`base` comes back to it"),
        ("run: {}\nbase: a\nbase: b\n", "config.yaml:3: base is given twice (first on line 2)"),
        ("sft: {base: a}\n", "unknown key sft.base"),
        ("base: bad.yaml\n", "bad.yaml:2); did you mean sft.steps?"),
    ],
)
def test_a_base_that_cannot_be(write, tmp_path, text, message):
    (tmp_path / "other.yaml").write_text("base: config.yaml\n")
    (tmp_path / "bad.yaml").write_text("sft:\n  step: 3\n")
    assert message in refusal(write(text))


@pytest.mark.parametrize(
    "tokens, message",
    [
        (["sft.steps=3"], "unexpected argument 'sft.steps=3'"),
        (["--sft.steps"], "unexpected argument '--sft.steps'"),
    ],
)
def test_malformed_command_line(tokens, message):
    assert message in refusal(None, *tokens)


# ---- impossible combinations


@pytest.mark.parametrize(
    "world, overrides, message",
    [
        (
            1,
            ["--parallel.tensor=2"],
            "parallel.tensor x parallel.pipeline = 2 x 1 = 2 does not divide the world size 1",
        ),
        (6, ["--parallel.tensor=2", "--parallel.pipeline=2"], "does not divide the world size 6"),
        (3, ["--parallel.tensor=3"], "parallel.tensor = 3 does not divide the attention heads: 4 (model.architecture)"),
        (4, ["--parallel.tensor=4", "--model.architecture.kv_heads=2"], "does not divide the key/value heads: 2"),
        (4, ["--parallel.pipeline=4"], "parallel.pipeline = 4 stages, but the model has 3 layers"),
        (2, ["--parallel.pipeline=2"], "parallel.pipeline = 2 does not divide the layers: 3"),
        (1, ["--parallel.sequence_parallel=true"], "parallel.sequence_parallel = true needs parallel.tensor above 1"),
        (
            2,
            ["--parallel.tensor=2", "--sft.token_budget=1023"],
            "sft.token_budget = 1023 is not a multiple of parallel.tensor = 2",
        ),
        (
            2,
            ["--parallel.tensor=2", "--rl.token_budget=2047"],
            "rl.token_budget = 2047 is not a multiple of parallel.tensor = 2",
        ),
        (
            4,
            ["--parallel.tensor=2", "--parallel.context=2", "--sft.token_budget=1028"],
            "sft.token_budget = 1028 is not a multiple of parallel.tensor (2) x 2 x parallel.context (4)",
        ),
        (
            1,
            ["--model.fp8=mxfp8", "--model.dtype=bfloat16", "--sft.token_budget=1040"],
            "not a multiple of the block of model.fp8 = 32",
        ),
        (
            2,
            ["--parallel.tensor=2", "--parallel.context=2"],
            "parallel.tensor x parallel.pipeline x parallel.context = 2 x 1 x 2 = 4 does not",
        ),
        (
            2,
            ["--parallel.context=2", "--model.spec=torch"],
            "parallel.context = 2 needs Transformer Engine, but model.spec = torch",
        ),
        (
            4,
            ["--parallel.context=2", "--sft.batch_size=33"],
            "sft.batch_size = 33 is not divisible by the data parallel size 2",
        ),
        (
            1,
            ["--model.fp8=blockwise", "--model.dtype=bfloat16", "--model.spec=torch-varlen"],
            "model.fp8 = blockwise needs Transformer Engine",
        ),
        (1, ["--model.fp8=blockwise"], "model.fp8 = blockwise needs model.dtype = bfloat16, not float32"),
        (4, ["--parallel.tensor=4", "--rollout.tensor=3"], "expected 1 or a divisor of parallel.tensor = 4"),
        (
            1,
            ["--rollout.tensor=2"],
            "rollout.tensor = 2: an engine spans a tensor parallel group or an even part of it; expected 1",
        ),
        (2, ["--sft.batch_size=33"], "sft.batch_size = 33 is not divisible by the data parallel size 2"),
        (
            2,
            ["--rl.prompts=3", "--rl.group=3"],
            "rl.prompts x rl.group = 3 x 3 = 9 is not divisible by the data parallel size 2",
        ),
        (1, ["--rl.updates=3"], "is not divisible by rl.updates = 3"),
        (
            1,
            ["--rl.algorithm.overlong_buffer=49"],
            "rl.algorithm.overlong_buffer = 49 tokens, but a response has 48 at most (rollout.max_response)",
        ),
        (
            1,
            ["--rl.algorithm=srft", "--rl.algorithm.kl_coef=0.1"],
            "rl.algorithm.kl_coef (command line) is not an option of srft; it belongs to grpo, dapo_d, ",
        ),
        (
            1,
            ["--rl.algorithm=upt", "--rl.algorithm.gamma=8"],
            "rl.algorithm.gamma = 8: none of the 8 rollouts of a prompt (rl.group) is left over",
        ),
        (
            1,
            ["--rl.algorithm=prefix_rft", "--rl.algorithm.high=0.5"],
            "expected low_end <= low_start <= high",
        ),
        (1, ["--sft.steps=20"], "sft.val_every = 50 is above sft.steps = 20"),
        (1, ["--sft.optimizer.min_lr=1"], "sft.optimizer.min_lr = 1.0 is above sft.optimizer.lr"),
        (
            1,
            ["--rollout.max_response=256"],
            "rollout.max_response = 256 tokens leaves no room for a prompt in the context of 256",
        ),
        (
            1,
            ["--rollout.max_prompt=209"],
            "rollout.max_prompt = 209 and rollout.max_response = 48 are together more than the context of 256",
        ),
        (
            1,
            ["--rollout.max_prompt=100", "--rl.token_budget=147"],
            "rl.token_budget = 147 tokens cannot hold rollout.max_prompt = 100 and rollout.max_response = 48",
        ),
        (1, ["--rl.token_budget=48"], "rl.token_budget = 48 tokens cannot hold a prompt and rollout.max_response = 48"),
        (1, ["--ceiling.delta=0.2"], "ceiling.delta = 0.2 must be below ceiling.delta2 = 0.1"),
        (1, ["--data.problems.min_terms=5"], "data.problems.min_terms = 5 is above data.problems.max_terms = 4"),
        (1, ["--data.train=a.jsonl"], "data.train is given without data.validation"),
        (1, ["--data.rl=a.jsonl"], "data.rl is given without data.test"),
        (1, ["--data.train=a.jsonl", "--data.validation=b.jsonl"], "data.train is given without data.rl and data.test"),
        (
            1,
            ["--model.architecture.heads=5"],
            "model.architecture.heads = 5 does not divide model.architecture.hidden = 128",
        ),
        (
            1,
            ["--model.architecture.kv_heads=3"],
            "model.architecture.kv_heads = 3 does not divide model.architecture.heads = 4",
        ),
        (1, ["--model.architecture.hidden=12"], "is odd"),
    ],
)
def test_impossible_combinations(monkeypatch, world, overrides, message):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert message in refusal(None, *overrides)


@pytest.mark.parametrize(
    "world, overrides",
    [
        (1, []),
        (4, ["--parallel.tensor=2", "--parallel.sequence_parallel=true", "--rollout.tensor=2"]),
        (4, ["--parallel.tensor=4", "--rollout.tensor=2"]),
        (3, ["--parallel.pipeline=3"]),
        (4, ["--parallel.context=4", "--model.spec=te"]),
        (4, ["--parallel.tensor=2", "--parallel.pipeline=2", "--model.architecture.layers=4"]),
    ],
)
def test_possible_combinations(monkeypatch, world, overrides):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    load(None, overrides)


def test_a_command_is_not_refused_for_a_section_it_does_not_use():
    overrides = ["--rl.updates=3", "--data.rl=a.jsonl"]
    load(None, overrides, sections=("run", "model", "parallel", "data", "sft"))
    assert "rl.updates" in refusal(None, *overrides, sections=("rl",))


@pytest.mark.parametrize("value", ["0", "two", ""])
def test_an_invalid_world_size(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert "WORLD_SIZE: expected a number of ranks" in refusal(None)


QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
}


def test_the_shape_comes_from_the_model_directory(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    monkeypatch.setenv("WORLD_SIZE", "8")
    load(None, [f"--model.path={tmp_path}", "--parallel.tensor=4", "--parallel.pipeline=2"])
    message = refusal(None, f"--model.path={tmp_path}", "--parallel.tensor=8")
    assert f"parallel.tensor = 8 does not divide the key/value heads: 4 ({tmp_path}/config.json)" in message


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json: not found"),
        ("{", "config.json: not valid JSON"),
        ("[]", "expected a JSON object"),
        (
            json.dumps({**QWEN, "architectures": ["GPT2LMHeadModel"]}),
            "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM",
        ),
        (
            json.dumps({**QWEN, "num_hidden_layers": None}),
            "config.json: key 'num_hidden_layers' is missing",
        ),
        (json.dumps({k: v for k, v in QWEN.items() if k != "intermediate_size"}), "key 'intermediate_size' is missing"),
    ],
)
def test_an_invalid_model_directory(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message in refusal(None, f"--model.path={tmp_path}")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from pctrain.config.load import load; load(None, []); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
