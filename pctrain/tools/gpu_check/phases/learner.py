"""Training in fp32 and bf16; variable-length attention against SDPA; grouped queries with and without repeats."""

from __future__ import annotations

import inspect

import numpy as np
import torch

from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check

STEPS, QUICK_STEPS = 20, 4
FALLEN = 0.97  # loss at the end, of the first
FIRST_LOSS, LAST_LOSS = 0.01, 0.05  # bf16 against fp32, relative: rounding, and what it adds up to
LOGPROBS = 0.03  # nats, mean: two attentions in bf16
HEADS, KEY_HEADS, DIM = 12, 4, 64
OUTPUT = 0.01  # relative error of attention's output in bf16


def run(check: Check) -> None:
    """Compare the specs on one model."""
    directory, rows = learning.model(check), learning.rows(check)
    count = QUICK_STEPS if check.quick else STEPS
    bf16 = "torch-varlen" if check.gpu else "torch"
    losses = {}
    for spec, dtype in (("torch", "float32"), (bf16, "bfloat16")):
        with learning.learner(check, directory, spec, dtype) as learner:
            _reset_peak(check)
            values = losses[dtype] = learning.steps(check, learner, rows, count)
            fell = values[-1] / values[0]
            check.measure(f"{spec} {dtype}: loss after {count} steps, of the first", fell, at_most=FALLEN)
            if check.gpu:
                check.measure(f"{spec} {dtype}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    for name, index, bound in (("first", 0, FIRST_LOSS), ("last", -1, LAST_LOSS)):
        difference = abs(losses["bfloat16"][index] / losses["float32"][index] - 1)
        check.measure(f"{bf16} bfloat16 against torch float32: {name} loss", difference, "relative", at_most=bound)
    if not check.gpu:
        check.skip("torch-varlen against SDPA", "needs a GPU")
        check.skip("grouped queries", "needs a GPU")
        return
    by_spec = {}
    for spec in ("torch", "torch-varlen"):
        with learning.learner(check, directory, spec, "bfloat16", train=False) as learner:
            by_spec[spec] = np.concatenate(learner.logprobs(rows, learning.token_budget(check)))
    difference = float(np.abs(by_spec["torch"] - by_spec["torch-varlen"]).mean())
    check.measure("torch-varlen against SDPA: log-probs", difference, "nats, mean", at_most=LOGPROBS)
    _grouped_queries(check)


def _reset_peak(check: Check) -> None:
    if check.gpu:
        torch.cuda.reset_peak_memory_stats()


def _grouped_queries(check: Check) -> None:
    """Compare `varlen_attn` with and without repeated keys and values, and with the definition per sequence."""
    from torch.nn.attention.varlen import varlen_attn

    from pctrain.core.layers.varlen_attention import causal_option

    causal = causal_option()
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [700, 1, 300]
    bounds = torch.tensor([0, 700, 701, 1001], dtype=torch.int32, device="cuda")

    def random(heads: int) -> torch.Tensor:
        return torch.randn(sum(lengths), heads, DIM, generator=generator, device="cuda").bfloat16()

    q, k, v = random(HEADS), random(KEY_HEADS), random(KEY_HEADS)
    repeated = [x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v)]
    out = varlen_attn(q, *repeated, bounds, bounds, max(lengths), max(lengths), **causal)
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(0, 1)[None] for x in pieces), is_causal=True
        )[0].transpose(0, 1)
        for pieces in zip(*(x.split(lengths) for x in (q, *repeated)), strict=True)
    ]
    want = torch.cat(expected)
    error = float((out.double() - want).norm() / want.norm())
    check.measure("varlen_attn with repeated keys, against float64", error, "relative error", at_most=OUTPUT)
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        check.skip("grouped queries", f"varlen_attn of torch {torch.__version__} has no enable_gqa")
        return
    grouped = varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths), enable_gqa=True, **causal)
    error = float((grouped.double() - want).norm() / want.norm())
    check.measure("varlen_attn with enable_gqa, against float64", error, "relative error", at_most=OUTPUT)
