"""The command line as a user meets it."""

import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pctrain.cli import main as cli
from pctrain.common.errors import UserError
from pctrain.config import help as config_help
from pctrain.config.algorithm import AlgorithmOptions, built_in
from pctrain.config.tree import Config
from pctrain.report.fit_options import FitOptions

ROOT = Path(__file__).resolve().parents[2]


def pctrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pctrain", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stub(monkeypatch):
    """Puts a module in the place of a command's implementation; returns what `main` was called with."""

    def stub(module: str, error: BaseException | None = None) -> list:
        calls = []

        def main(*arguments):
            calls.append(arguments)
            if error is not None:
                raise error

        fake, (package, _, name) = types.SimpleNamespace(main=main), module.rpartition(".")
        monkeypatch.setitem(sys.modules, module, fake)
        if (
            package in sys.modules
        ):  # another test may have imported the real one, which is an attribute of its package then
            monkeypatch.setattr(sys.modules[package], name, fake, raising=False)
        return calls

    return stub


def test_help_lists_the_commands_one_a_line_and_is_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = pctrain("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    for command in cli.COMMANDS:
        assert f"pctrain {command.name} " in done.stdout
    # Promised; of the processor, for the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pctrain.cli.main import main\n"
        "for c in [['--help'], ['sft', '--help'], ['rl', '-h'], ['fit', '--help'], ['sft', '--sft.stesp=1']]: main(c)\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    "command, sections",
    [
        ("sft", ["run", "model", "parallel", "data", "sft"]),
        ("rl", ["rl", "rollout", "reward"]),
        ("run", list(Config.model_fields)),
    ],
)
def test_command_help_shows_every_option_with_description_and_default(capsys, monkeypatch, command, sections):
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "examples:" in text and f"pctrain {command} --config" in text

    def check(section, prefix):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, AlgorithmOptions):
                options = {key: field for kind in built_in().values() for key, field in kind.option_fields().items()}
                assert f"--{prefix}.{name} NAME or" in text and len(options) > 20
                for key, option in options.items():
                    assert f"--{prefix}.{name}.{key} " in text and " ".join(option.description.split()) in text
            elif hasattr(value, "model_fields_set"):
                check(value, f"{prefix}.{name}")
            else:
                assert f"--{prefix}.{name} " in text
                assert " ".join(field.description.split()) in text

    for name in sections:
        check(getattr(Config(), name), name)
    assert "--run.seed INT seed of data order, initial weights and sampling (>= 0) [default: 0]" in text


def test_defaults_in_help_are_those_of_their_place():
    lines = config_help.option_lines(["rl.optimizer.lr", "sft.optimizer.lr"])
    assert [line.rpartition("[")[2] for line in lines if "default" in line] == ["default: 1e-05]", "default: 1e-06]"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "unknown command 'trian'; did you mean `pctrain "),
        (["rpeort", "x"], "did you mean `pctrain report`?"),
        (["xyzzy"], "commands are: sft, rl, run, show, fit, report, eval, data generate"),
        (["data"], "pctrain data needs a subcommand: generate, check"),
        (["data", "genrate"], "did you mean `pctrain data generate`?"),
        (["data", "generate"], "needs --out PATH (folder for train.jsonl,"),
        (["sft", "--sft.stesp=3"], "unknown key sft.stesp (command line); did you mean sft.steps?"),
        (["sft", "--config"], "--config needs a value"),
        (["sft", "--config=a.yaml", "--config", "b.yaml"], "--config is given more than once"),
        (["sft", "--config", "nope.yaml"], "nope.yaml does not exist"),
        (["sft", "--sft.steps"], "--sft.steps needs a value: --sft.steps=VALUE"),
        (["sft", "--sft.steps", "--run.seed=1"], "--sft.steps needs a value"),
        (["sft", "sft.steps=3"], "unexpected argument 'sft.steps=3': options have the form --section.key=value"),
        (["sft", "--sft.step=3"], "did you mean sft.steps?"),  # a prefix of a key is not the key
        (["sft", "-x"], "unexpected argument '-x'"),
        (["rl", "--temperature=1"], "unknown option --temperature; its options are: --debug-rollout-only"),
        (["fit"], "usage: pctrain fit CURVES"),
        (["fit", "a", "--out"], "--out needs a value: --out=VALUE"),
        (["fit", "a", "--out=b", "--out", "c"], "--out is given more than once: b, c"),
        (["show", "run", "--step=many"], "--step: expected a valid integer, got 'many'"),
        (["convert", "hf-to-mcore", "A", "--parallel.tensor=1"], "expected 2 folders, got A; usage: pctrain convert"),
        (["completion", "fish"], "expected bash or zsh, got 'fish'"),
        (["fit", "a", "--oot", "b"], "unknown option --oot; did you mean --out?"),
        (["report", "a", "b"], "usage: pctrain report SOURCE"),
    ],
)
def test_bad_input_is_one_message_and_status_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.out == ""


def test_module_exits_2_without_a_traceback():
    done = pctrain("sft", "--sft.stesp=3")
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and done.stderr.startswith("error: unknown key sft.stesp")
    )


def test_under_torchrun_only_rank_0_prints():
    quiet = pctrain("sft", "--sft.stesp=3", RANK="1", WORLD_SIZE="2")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "command, module", [("sft", "pctrain.sft.loop"), ("rl", "pctrain.rl.loop"), ("run", "pctrain.study.command")]
)
def test_training_commands_get_the_resolved_config(stub, command, module):
    calls = stub(module)
    assert cli.main([command, "--run.seed=3", "--run.dir", "runs/x"]) == 0
    ((config, *_),) = calls
    assert isinstance(config, Config) and config.run.seed == 3 and config.run.dir == Path("runs/x")


def test_fit_and_report_get_paths(stub):
    fit, report = stub("pctrain.report.fit_command"), stub("pctrain.report.command")
    assert cli.main(["fit", "curves.json", "--out", "f.json", "--reach=75,80", "--budget", "500"]) == 0
    assert cli.main(["fit", "curves.json"]) == 0
    assert cli.main(["report", "runs/a"]) == 0
    given = FitOptions(out=Path("f.json"), reach=[75.0, 80.0], budget=[500.0])
    assert fit == [(Path("curves.json"), given), (Path("curves.json"), FitOptions())]
    assert fit[1][1].out == Path("fits.json") and report == [(Path("runs/a"), None)]


def test_errors_of_a_command(stub, capsys):
    stub("pctrain.sft.loop", UserError("train.jsonl:3: malformed JSON"))
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err == "error: train.jsonl:3: malformed JSON\n"
    stub("pctrain.sft.loop", KeyboardInterrupt())
    assert cli.main(["sft"]) == 130
    stub("pctrain.sft.loop", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):  # a mistake of the program keeps its traceback
        cli.main(["sft"])


def test_environment_is_set_before_the_implementation_is_imported(stub, monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "TORCHDYNAMO_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts it back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stub("pctrain.sft.loop")
    assert cli.main(["sft"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HUB_OFFLINE"] == "0"  # the user's own setting stays


def test_data_generate(tmp_path):
    done = pctrain(
        "data", "generate", "--out", str(tmp_path / "d"), "--data.problems.train=20", "--data.problems.rl=30"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "rl.jsonl",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert len((tmp_path / "d" / "train.jsonl").read_text().splitlines()) == 20


def test_data_generate_too_many_writes_nothing(tmp_path):
    done = pctrain("data", "generate", f"--out={tmp_path / 'd'}", "--data.problems.max_operand=1")
    assert done.returncode == 2 and "different problems" in done.stderr and not (tmp_path / "d").exists()


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_of_a_group_lists_its_commands(capsys, word):
    assert cli.main(["data", word]) == 0
    text = capsys.readouterr().out
    assert "pctrain data check" in text and "pctrain data rank" in text and "pctrain sft" not in text


def test_options_may_come_before_between_and_after_operands(monkeypatch):
    from pctrain.cli.commands import COMMANDS
    from pctrain.cli.parser import parse

    convert = next(command for command in COMMANDS if command.name == "convert hf-to-mcore")
    for arguments in (
        ["--parallel.tensor=1", "A", "B", "--verify"],
        ["--verify", "A", "--parallel.tensor", "1", "B"],
        ["A", "B", "--parallel.tensor=1", "--verify=true"],
    ):
        call = parse(convert, arguments)
        assert (call.operands, call.settings, call.options.verify) == (["A", "B"], ["--parallel.tensor=1"], True)


def test_of_a_repeated_key_the_last_value_counts(stub):
    calls = stub("pctrain.sft.loop")
    assert (
        cli.main(["sft", "--sft.optimizer={warmup: 3}", "--run.seed=1", "--sft.optimizer.warmup=5", "--run.seed=2"])
        == 0
    )
    ((config,),) = calls
    assert (config.sft.optimizer.warmup, config.run.seed) == (5, 2)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command_and_key(capsys, shell):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("hf-to-mcore", "decontaminate", "--rl.optimizer.lr", "--debug-train-only"))


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
