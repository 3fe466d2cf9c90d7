"""The longest prompt: what the engine has to hold, and the problems that are longer."""

import json

import pytest

from pctrain.common.errors import UserError
from pctrain.config.tree import Config
from pctrain.rollout import worker as module
from pctrain.rollout.worker import RolloutWorker

CONTEXT = 256


@pytest.fixture
def make(hf_dirs, tmp_path, monkeypatch):
    """Return make(**options) -> RolloutWorker of problems with prompts of 3, 5 and 9 tokens.

    Its engine is the options that it would be started with.
    """
    monkeypatch.setattr(module, "RolloutEngine", lambda path, rollout, **options: options)
    lines = [
        {"prompt": prompt, "answer": "1", "response": response}
        for prompt, response in (("1+2", "3"), ("1+2+3", "6" * 12), ("1+2+3+4+5", "15"))
    ]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**options):
        rollout = {name: options.pop(name) for name in ("max_prompt", "max_response") if name in options}
        rl = {name: options.pop(name) for name in ("token_budget",) if name in options}
        data = {"test": tmp_path / "rl.jsonl", "rl": tmp_path / "rl.jsonl", **options}
        config = Config(
            model={"path": hf_dirs[True]},
            data=data,
            rl=rl,
            rollout={"max_response": 16, **rollout},
            eval={"max_response": 20},
        )
        return RolloutWorker(config)

    return make


def lengths(problems):
    return [len(problem.prompt_ids) for problem in problems]


def test_the_engine_holds_the_longest_prompt_with_the_longest_response(make):
    assert make().engine["context"] == CONTEXT
    assert make(max_prompt=9).engine["context"] == 9 + 20  # responses of the scores are longer than those of training
    assert make(max_prompt=9, max_response=24).engine["context"] == 9 + 24
    assert make(max_prompt=250).engine["context"] == CONTEXT


def test_longer_training_problems_are_errors_or_are_dropped(make):
    assert lengths(make(max_prompt=9).training_problems(with_expert=False)[0]) == [3, 5, 9]
    with pytest.raises(
        UserError, match=r"rl.jsonl:3: the prompt has 9 tokens, more than rollout.max_prompt of 8. Shorten"
    ):
        make(max_prompt=8).training_problems(with_expert=False)
    problems, dropped = make(max_prompt=8, overlong="drop").training_problems(with_expert=False)
    assert lengths(problems) == [3, 5] and [problem.index for problem in problems] == [0, 1]
    assert len(dropped) == 1 and "rl.jsonl:3: the prompt has 9 tokens" in dropped[0]


def test_so_are_experts_whose_trajectory_is_longer_than_a_response(make):
    worker = make(overlong="drop", max_response=8)
    problems, dropped = worker.training_problems(with_expert=True)
    assert lengths(problems) == [3, 9] and [problem.index for problem in problems] == [0, 1]
    assert "rl.jsonl:2: the expert's response has 13 tokens with EOS" in dropped[0]
    assert lengths(worker.training_problems(with_expert=False)[0]) == [3, 5, 9]
    with pytest.raises(
        UserError, match=r"rl.jsonl:2: the expert's response has 13 tokens with EOS, more than rollout.max_response = 8"
    ):
        make(max_response=8).training_problems(with_expert=True)


def test_whatever_is_sampled_fits_into_a_pack(make):
    with pytest.raises(
        UserError, match=r"the prompt has 9 tokens, more than rl.token_budget less rollout.max_response of 8"
    ):
        make(token_budget=24).training_problems(with_expert=False)
    assert lengths(make(token_budget=25).training_problems(with_expert=False)[0]) == [3, 5, 9]


def test_a_test_problem_is_never_dropped(make):
    assert lengths(make(max_prompt=9, overlong="drop").problems) == [3, 5, 9]
    with pytest.raises(UserError, match=r"the prompt has 9 tokens, more than rollout.max_prompt of 8"):
        make(max_prompt=8, overlong="drop").problems  # noqa: B018
    with pytest.raises(
        UserError, match=r"every problem is too long, for example .*rl.jsonl:3: the prompt has 9 tokens"
    ):
        make(max_prompt=2, overlong="drop").training_problems(with_expert=False)
