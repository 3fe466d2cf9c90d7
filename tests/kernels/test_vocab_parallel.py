"""Vocabulary and sequence parallel heads on gloo ranks against float64 on one process; ranks are equal bit for bit.

All cases run in one call on four ranks: two groups of two, then all four.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from pctrain_kernels import head as head_module
from pctrain_kernels import linear_logprob_entropy, linear_token_loss, parallel, reference
from tests.helpers.kernel_inputs import (
    GRADIENT_TOLERANCE,
    LOGPROB_TOLERANCE,
    VALUE_TOLERANCE,
    clipped_policy,
    double,
    make_inputs,
    make_streams,
    relative,
)


@dataclass(frozen=True)
class Case:
    shards: tuple[int, ...]  # rows of the weight on each rank
    tokens: int = 20
    valid: int | None = None
    temperature: float = 1.0
    ignored: float = 0.3
    chunk: int | None = None
    budget: int | None = None  # bytes of a chunk's logits, where the default chunk size is tested
    sequence_parallel: bool = False
    main_grad: bool = False
    offset: float = 0.0  # added to all logits of a shard, times its index

    def inputs(self):
        hidden, weight, target = make_inputs(self.tokens, sum(self.shards), ignored=self.ignored, valid=self.valid)
        with torch.no_grad():
            hidden[:, 0] = 1
            for rank, end in enumerate(torch.tensor(self.shards).cumsum(0).tolist()):
                weight[end - self.shards[rank] : end, 0] = self.offset * rank
        streams, token_weight = make_streams(
            hidden, weight, target, temperature=self.temperature, valid_vocab=self.valid
        )
        return hidden, weight, target, streams, token_weight

    @property
    def options(self) -> dict:
        return {"valid_vocab": self.valid, "temperature": self.temperature}


CASES = {
    "even": Case((50, 50)),
    "uneven": Case((40, 61), temperature=0.7, chunk=7),
    "unevenly chunked by default": Case((16, 85), budget=4 * 90 * 5),
    "padding in the last shard": Case((60, 60), valid=97, main_grad=True),
    "a shard of padding alone": Case((90, 30), valid=80, main_grad=True, chunk=6),
    "a shard without rows": Case((90, 0)),
    "one shard far above": Case((50, 50), offset=200.0),
    "sequence parallel": Case((40, 61), sequence_parallel=True, chunk=7),
    "sequence parallel, main grad": Case((50, 50), sequence_parallel=True, main_grad=True),
    "no tokens": Case((50, 50), tokens=0, main_grad=True),
    "no tokens, sequence parallel": Case((50, 50), tokens=0, sequence_parallel=True),
    "all ignored": Case((40, 61), ignored=1.1, sequence_parallel=True, main_grad=True),
    "four even": Case((25, 25, 25, 25), chunk=1, tokens=4),
    "four uneven": Case((30, 11, 50, 10), temperature=1.7, offset=3.0),
    "four, two of padding": Case((30, 30, 30, 30), valid=55, main_grad=True, chunk=9),
    "four, sequence parallel": Case(
        (30, 11, 50, 10), sequence_parallel=True, main_grad=True, valid=95, budget=4 * 50 * 3
    ),
}


def run_cases(cases: dict[str, Case]) -> dict[str, dict]:
    """Return both operations' results by case; runs on every rank."""
    rank = dist.get_rank()
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    results = {name: run_case(case, groups[len(case.shards)]) for name, case in cases.items()}
    for pair in pairs:
        dist.destroy_process_group(pair) if rank in dist.get_process_group_ranks(pair) else None
    return results


def run_case(case: Case, group: dist.ProcessGroup) -> dict:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    full_hidden, full_weight, target, streams, token_weight = case.inputs()
    start = sum(case.shards[:rank])
    shard = full_weight.detach()[start : start + case.shards[rank]]
    sequence = (
        full_hidden.detach().chunk(world)[rank] if case.sequence_parallel and case.tokens else full_hidden.detach()
    )
    main_grads = [torch.zeros_like(shard) if case.main_grad else None for _ in range(2)]
    leaves = [(sequence.clone().requires_grad_(), shard.clone().requires_grad_()) for _ in range(2)]
    options = {
        "group": group,
        "vocab_start": start,
        "chunk_tokens": case.chunk,
        "sequence_parallel": case.sequence_parallel,
    }
    options |= case.options
    loss_options = options | {"streams": streams, "denom": 7, "token_weight": token_weight}

    collectives = []
    budget, gather = head_module.CPU_LOGITS_BYTES, parallel._all_gather

    def counted(output, tensor, group):
        collectives.append(tuple(tensor.shape))
        return gather(output, tensor, group=group)

    head_module.CPU_LOGITS_BYTES, parallel._all_gather = case.budget or budget, counted
    try:
        logprob, entropy = linear_logprob_entropy(*leaves[0], target, grad_weight_out=main_grads[0], **options)
        forward_collectives = list(collectives)
        (logprob.sum() - 0.3 * (entropy * torch.arange(case.tokens)).sum()).backward()
        with torch.no_grad():
            evaluated = linear_token_loss(
                *leaves[1], target, clipped_policy, grad_weight_out=main_grads[1], **loss_options
            )
        collectives.clear()
        loss, metrics = linear_token_loss(
            *leaves[1], target, clipped_policy, grad_weight_out=main_grads[1], **loss_options
        )
        loss.backward()
    finally:
        head_module.CPU_LOGITS_BYTES, parallel._all_gather = budget, gather
    return {
        "logprob": logprob.detach(),
        "entropy": entropy.detach(),
        "loss": loss.detach(),
        "metrics": metrics,
        "evaluated": {"loss": evaluated[0], **evaluated[1]},
        "grad_hidden": [hidden.grad for hidden, _ in leaves],
        "grad_weight": main_grads if case.main_grad else [weight.grad for _, weight in leaves],
        "forward_collectives": forward_collectives,
        "loss_collectives": collectives,
    }


@pytest.fixture(scope="module")
def results(ranks) -> dict[str, list[dict]]:
    """Return {case: results by rank of its group}; the second group of two follows the first."""
    by_rank = ranks.run(run_cases, CASES, world=4)
    return {name: [by_rank[rank][name] for rank in range(4)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_process_and_ranks_agree_bit_for_bit(results, name: str) -> None:
    case, by_rank = CASES[name], results[name]
    hidden, weight, target, streams, token_weight = case.inputs()
    inputs = double(hidden, weight)
    logprob, entropy = reference.linear_logprob_entropy(*inputs, target, **case.options)
    objective = logprob.sum() - 0.3 * (entropy * torch.arange(case.tokens)).sum()
    loss, metrics = reference.linear_token_loss(
        *inputs,
        target,
        clipped_policy,
        streams={key: stream.double() for key, stream in streams.items()},
        denom=7,
        token_weight=token_weight.double(),
        **case.options,
    )
    want_gradients = [torch.autograd.grad(value, inputs) for value in (objective, loss)]

    for got in by_rank:
        for key in ("logprob", "entropy", "loss"):
            assert torch.equal(got[key], by_rank[0][key])
        assert got["metrics"] == by_rank[0]["metrics"] and got["evaluated"] == by_rank[0]["evaluated"]
        if not case.sequence_parallel:
            assert all(torch.equal(*pair) for pair in zip(got["grad_hidden"], by_rank[0]["grad_hidden"], strict=True))

    got, world = by_rank[0], len(case.shards)
    # A few units of fp32 rounding of the largest logits: their absolute error is a relative error of the probabilities.
    rounding = 4 * 2**-23 * case.offset * (world - 1)
    torch.testing.assert_close(got["logprob"].double(), logprob, rtol=0, atol=LOGPROB_TOLERANCE + rounding)
    torch.testing.assert_close(got["entropy"].double(), entropy, rtol=0, atol=LOGPROB_TOLERANCE + rounding)
    for key, want in {"loss": loss, **metrics}.items():
        for value in (got["loss"] if key == "loss" else got["metrics"][key], got["evaluated"][key]):
            torch.testing.assert_close(
                value.double(), want.detach(), rtol=VALUE_TOLERANCE + rounding, atol=20 * VALUE_TOLERANCE
            )
    for op, (want_hidden, want_weight) in enumerate(want_gradients):
        grad_hidden = got["grad_hidden"][op]
        if case.sequence_parallel:
            grad_hidden = torch.cat([by_rank[rank]["grad_hidden"][op] for rank in range(world)])
        grad_weight = torch.cat([by_rank[rank]["grad_weight"][op] for rank in range(world)])
        tolerance = GRADIENT_TOLERANCE + rounding
        assert relative(grad_hidden, want_hidden) < tolerance and relative(grad_weight, want_weight) < tolerance
        if not (target != -100).any():
            assert not grad_hidden.any() and not grad_weight.any()


def test_one_collective_a_forward_and_one_a_chunk(results) -> None:
    forward, loss = (results["uneven"][0][key] for key in ("forward_collectives", "loss_collectives"))
    labelled = int((CASES["uneven"].inputs()[2] != -100).sum())
    assert forward == [(4, labelled)]
    assert len(loss) == -(-labelled // 7) and sum(shape[1] for shape in loss) == labelled
    # By default the largest shard sets the chunk size (85 rows here; the 16 rows of this rank would allow 28 rows at
    # once).
    assert all(shape[1] <= 5 for shape in results["unevenly chunked by default"][0]["loss_collectives"])
