"""The reference model's weights in host memory, and back for a pass."""

from __future__ import annotations

import time

import numpy as np

from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check

EXTRA = 0.02  # of the weights: device memory that the offloaded reference may keep


def run(check: Check) -> None:
    """Compare log-probs before training, of the trained model, and of the reference."""
    import torch

    rows, budget = learning.rows(check), learning.token_budget(check)
    spec, dtype = ("torch-varlen", "bfloat16") if check.gpu else ("torch", "float32")

    def allocated() -> int:
        return torch.cuda.memory_allocated() if check.gpu else 0

    with learning.learner(check, learning.model(check), spec, dtype) as learner:
        start = learner.logprobs(rows, budget)
        learning.steps(check, learner, rows, 2)
        trained = learner.logprobs(rows, budget)
        before = allocated()
        learner.keep_reference(offload=True)
        if check.gpu:
            weights = sum(p.nbytes for module in learner.modules for p in module.parameters())
            extra = (allocated() - before) / weights
            check.measure("device memory of the offloaded reference, of the weights", extra, at_most=EXTRA)
        began = time.perf_counter()
        with learner.reference():
            reference = learner.logprobs(rows, budget)
        check.measure("a pass of the reference", time.perf_counter() - began, "s")
        again = learner.logprobs(rows, budget)
    check.expect("the reference has the start weights", _same(reference, start))
    check.expect("training changed the model", not _same(trained, start))
    check.expect("afterwards the trained weights are back", _same(again, trained))


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
