"""Run the operations' tests again, and the kernels' tests, with the Triton kernels on CPU tensors, interpreted.

TRITON_INTERPRET takes effect when Triton is imported, so this needs a separate process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


FILES = [
    "test_triton_softmax.py",
    "test_triton_head.py",
    "test_triton_mutations.py",
    "test_linear_logprob.py",
    "test_linear_token_loss.py",
    "test_rows.py",
    "test_vocab_parallel.py",
    pytest.param("test_logits.py", marks=pytest.mark.full),
]  # the other files cover the same kernels at more sizes
# 2048 rows would take a minute; the others do not reach the kernels, or import much
LEFT_OUT = "not never_exist and not extra_memory and not float64_inputs and not transformers"


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
            "-k",
            LEFT_OUT,
            HERE / file,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-500:]


def test_without_a_gpu_triton_is_not_imported() -> None:
    """The package and its operations work without Triton."""
    code = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from pctrain_kernels import linear_logprob_entropy
from pctrain_kernels.softmax import TorchSoftmax, softmax_of
options = {"temperature": 1.0, "want_entropy": False, "sharded": False, "scratch": None}
assert isinstance(softmax_of(torch.zeros(1, 2), torch.tensor([0]), **options), TorchSoftmax)
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
sum(linear_logprob_entropy(hidden, weight, torch.tensor([0, 3, -100]))).sum().backward()
print(weight.grad.isfinite().all())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "tensor(True)", run.stderr
