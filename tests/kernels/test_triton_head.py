"""The operations through the Triton kernels, with half precision products as on a GPU, against their definition."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py", allow_module_level=True)

from pctrain_kernels import (
    linear_logprob_entropy,
    linear_token_loss,
)
from pctrain_kernels.triton_softmax import TritonSoftmax
from tests.helpers.kernel_inputs import (
    clipped_policy,
    make_inputs,
    make_streams,
    relative,
)
from tests.helpers.triton_cases import (
    EXAMPLE,
    check_head,
    head_inputs,
    name_of,
    pairwise,
)

HEAD_CASES = pairwise(
    {
        "dtype": [torch.float32, torch.float16, torch.bfloat16],
        "vocab": [1, 127, 1000, 1003],
        "tokens": [0, 1, 17],
        "temperature": [1.0, 0.7, 1.7],
        "ignored": ["none", "some", "all"],
        "upstream": ["logprob", "entropy", "both"],
        "layout": ["contiguous", "padded", "sliced"],
        "chunk": ["one", "odd", "all"],
    }
)


@pytest.mark.parametrize("options", HEAD_CASES, ids=name_of)
def test_both_operations_agree_with_the_definition(options: dict, gpu_products) -> None:
    check_head(options)


def test_half_precision_gradients_reuse_the_memory_of_the_logits(gpu_products) -> None:
    check_head(EXAMPLE)
    assert gpu_products.dlogits
    # Rows of 127 fp32 logits begin 128 apart, so their bf16 gradients begin 256 apart.
    assert all(dlogits.stride() == (256, 1) and dlogits.shape[1] == 127 for dlogits in gpu_products.dlogits)


def test_backward_reads_the_logits_once(gpu_products, monkeypatch) -> None:
    hidden, weight, target = head_inputs(EXAMPLE)
    logprob, entropy = linear_logprob_entropy(hidden, weight, target)
    monkeypatch.setattr(TritonSoftmax, "statistics", lambda self: pytest.fail("the statistics are known in backward"))
    (logprob + entropy).sum().backward()
    assert weight.grad.isfinite().all()


def test_accumulation_over_micro_batches_is_one_batch(gpu_products) -> None:
    hidden, weight, target = make_inputs(16, 300)
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    streams, token_weight = make_streams(hidden, weight, target)

    def run(rows: slice, main_grad: Tensor) -> None:
        pieces = {name: stream[rows] for name, stream in streams.items()}
        linear_token_loss(
            hidden[rows],
            weight,
            target[rows],
            clipped_policy,
            streams=pieces,
            denom=9,
            token_weight=token_weight[rows],
            grad_weight_out=main_grad,
        )

    whole, halves = torch.zeros(2, *weight.shape).unbind()
    run(slice(None), whole)
    run(slice(0, 8), halves)
    run(slice(8, None), halves)
    assert relative(halves, whole.double()) < 1e-6  # the order of an fp32 sum
