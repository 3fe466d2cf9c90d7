"""A user's reward function: what it may return, what is counted if it fails, and the message for a wrong name."""

import os
import subprocess
import sys

import pytest

from pctrain.common.errors import UserError
from pctrain.config.check import check_combinations
from pctrain.config.tree import Config, RewardConfig
from pctrain.reward import VerifierPool

MODULE = """
import asyncio, os, time
import numpy
from pathlib import Path
Path("imported").write_text(str(os.getpid()))
VALUES = {
    "true": True, "false": False, "one": 1, "half": 0.5, "numpy": numpy.float32(0.25), "numpy_bool": numpy.bool_(True),
    "two": 2, "minus": -0.5, "nan": float("nan"), "none": None, "string": "1", "list": [1], "array": numpy.zeros(2),
}
def judge(response, answer):
    if response == "raise":
        raise ValueError("no answer key")
    if response == "exit":
        raise SystemExit(4)
    if response == "die":
        os.kill(os.getpid(), 9)
    if response == "hang":
        time.sleep(3600)
    if response == "memory":
        return len(bytearray(1 << 40))
    if response == "print":
        print("a line of my own")
        return answer == "5"
    if response.startswith("long"):
        return len(response) == int(answer)
    return VALUES[response]
calls_open = 0
async def remote(response, answer):
    global calls_open
    if response == "together":
        calls_open += 1
        while calls_open < 8:
            await asyncio.sleep(0.01)
        return True
    if response == "hang":
        await asyncio.sleep(3600)
    if response == "block":
        time.sleep(3600)
    if response == "die":
        os._exit(1)
    if response == "timeouterror":
        raise TimeoutError("the judge did not answer")
    await asyncio.sleep(0.5)
    return response == answer
class Judge:
    async def __call__(self, response, answer):
        return 1
instance = Judge()
number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import json\nimport no_such_package\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pool(name, **options):
    return VerifierPool(RewardConfig(**{"verifier": name, "workers": 1, "timeout": 30} | options))


def test_what_the_function_returns_is_the_reward_or_a_counted_cause(folder):
    expected = {
        "true": (1, "right"),
        "false": (0, "wrong"),
        "one": (1, "right"),
        "half": (0.5, "partial"),
        "numpy": (0.25, "partial"),
        "numpy_bool": (1, "right"),
        "two": (0, "bad_value"),
        "minus": (0, "bad_value"),
        "nan": (0, "bad_value"),
        "none": (0, "bad_value"),
        "string": (0, "bad_value"),
        "list": (0, "bad_value"),
        "array": (0, "bad_value"),
        "raise": (0, "error"),
        "exit": (0, "error"),
        "die": (0, "crash"),
        "memory": (0, "memory"),
        "print": (1, "right"),
    }
    with pool("own_rewards:judge") as verifier:
        verdicts = dict(zip(expected, verifier.score([(response, "5") for response in expected]), strict=True))
    assert {key: (v.reward, v.cause) for key, v in verdicts.items()} == expected
    line = MODULE.splitlines().index('        raise ValueError("no answer key")') + 1
    assert "ValueError: no answer key" in verdicts["raise"].detail
    assert f"own_rewards.py, line {line})" in verdicts["raise"].detail
    assert "'1'" in verdicts["string"].detail
    assert int((folder / "imported").read_text()) != os.getpid() and "own_rewards" not in sys.modules


def test_a_hang_is_a_timeout_and_long_responses_pass(folder):
    with pool("own_rewards:judge", timeout=4) as verifier:
        assert [v.cause for v in verifier.score([("hang", "1"), ("true", "1")])] == ["timeout", "right"]
    with pool("own_rewards:judge", timeout=60) as verifier:  # far longer than a pipe holds
        assert verifier.score([("long" + "é" * 1_000_000, "1000004")])[0].cause == "right"


def test_a_process_that_does_not_read_does_not_stop_its_parent(folder):
    with pool("own_rewards:remote", timeout=1) as verifier:
        pairs = [("block", "a"), *((f"{n}" + "x" * 300_000, "b") for n in range(4))]
        assert [v.cause for v in verifier.score(pairs)] == ["timeout"] + ["wrong"] * 4


def test_async_functions_run_concurrently_each_under_its_deadline(folder):
    with pool("own_rewards:remote", timeout=20) as verifier:
        verdicts = verifier.score([("timeouterror", "x"), *((str(n), str(n % 2)) for n in range(30))])
        assert [v.cause for v in verdicts] == ["error", "right", "right"] + ["wrong"] * 28
        # Each of eight returns once all of them have been called: one after the other, the first would reach its
        # deadline.
        assert [v.cause for v in verifier.score([("together", str(n)) for n in range(8)])] == ["right"] * 8
    with pool("own_rewards:remote", timeout=4) as verifier:
        verdicts = verifier.score([("hang", "1"), ("2", "2"), ("3", "4")])
        assert [v.cause for v in verdicts] == ["timeout", "right", "wrong"]
        # One that blocks the loop, and one that kills it: the others that were open are asked again.
        verdicts = verifier.score([("2", "2"), ("block", "1"), ("3", "3")])
        assert [v.cause for v in verdicts] == ["right", "timeout", "right"]
        verdicts = verifier.score([("2", "2"), ("die", "1"), ("3", "3")])
        assert [v.cause for v in verdicts] == ["right", "crash", "right"]


def test_a_callable_object_may_be_async(folder):
    with pool("own_rewards:instance") as verifier:
        assert verifier.score([("a", "b")])[0].cause == "right"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_module_here:judge", ["no_module_here cannot be imported", "ModuleNotFoundError", "PYTHONPATH"]),
        ("broken_rewards:judge", ["no_such_package", "broken_rewards.py, line 2"]),
        ("own_rewards:juge", ["own_rewards.py has no juge", "judge, remote"]),
        ("own_rewards:number", ["number is not a function but 5"]),
        ("own_rewards:", ["expected module:function"]),
        ("own-rewards:judge", ["expected module:function"]),
        (":judge", ["expected module:function"]),
        ("../own_rewards.py:judge", ["expected module:function"]),
        ("stritc", ["'stritc' is no verifier", "did you mean strict?", "lenient"]),
        ("math-verify", ["strict, lenient, exact, choice", "module:function"]),
    ],
)
def test_a_wrong_name_is_an_error_before_anything_is_scored(folder, name, parts):
    with pytest.raises(UserError) as error:
        pool(name)
    assert "reward.verifier" in str(error.value) and all(part in str(error.value) for part in parts), error.value
    assert "Traceback" not in str(error.value)


def test_names_are_checked_with_the_config():
    config = Config()
    config.reward.verifier = "exakt"
    with pytest.raises(UserError, match="did you mean exact"):
        check_combinations(config, 1, ["reward"])
    config.reward.verifier, config.reward.levenshtein = "strict", True
    with pytest.raises(UserError, match=r"reward.levenshtein = true needs reward.verifier = lenient"):
        check_combinations(config, 1, ["reward"])
    check_combinations(config, 1, ["data"])


def test_a_module_that_ends_the_process_while_importing_is_an_error_with_its_output(folder):
    (folder / "ending_rewards.py").write_text(
        "import os, sys\nprint('licence expired', file=sys.stderr, flush=True)\nos._exit(7)\n"
    )
    with pytest.raises(UserError, match=r"(?s)status 7.*licence expired"):
        pool("ending_rewards:judge")


def test_the_learner_needs_no_module_of_the_users(folder):
    program = (
        "import sys; from pctrain.config.tree import RewardConfig; from pctrain.reward import VerifierPool\n"
        "pool = VerifierPool(RewardConfig(verifier='own_rewards:judge', timeout=30))\n"
        "print(pool.score([('half', '1')])[0].reward)\n"
        "print('own_rewards' in sys.modules, 'numpy' in sys.modules, 'math_verify' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder).stdout
    assert out.split() == ["0.5", "False", "False", "False"]
