r"""A model with two answers: it ends every prompt `i+j=` by `\boxed{1}` or `\boxed{2}`, equally often.

Its scores are therefore between 0 and 1.
"""

import pytest

from tests.helpers import sets_cli, tiny

PROMPTS = [f"{i}+{i + 1}=" for i in range(30)]
TRAINING = [
    "--model.architecture.layers=1",
    "--model.architecture.hidden=32",
    "--model.architecture.heads=1",
    "--model.architecture.kv_heads=1",
    "--model.architecture.ffn=64",
    "--model.architecture.context=64",
    "--sft.steps=50",
    "--sft.batch_size=16",
    "--sft.token_budget=256",
    "--sft.val_every=50",
    "--sft.checkpoint_every=25",
    "--sft.optimizer.lr=2e-2",
    "--run.tensorboard=false",
]


@pytest.fixture(scope="session")
def two_answers(ranks, tmp_path_factory):
    """Its SFT run, with checkpoints at steps 25 and 50."""
    folder = tmp_path_factory.mktemp("two-answers")
    records = [{"prompt": p, "response": rf"\boxed{{{1 + i % 2}}}", "answer": 1} for i in range(4) for p in PROMPTS]
    data = sets_cli.write(folder / "train.jsonl", records)
    options = [f"--data.train={data}", f"--data.validation={data}", f"--run.dir={folder / 'run'}"]
    [(status, errors)] = ranks.run(tiny.cli, "sft", *TRAINING, *options, world=1, deadline=120)
    assert status == 0, errors
    return folder / "run"
