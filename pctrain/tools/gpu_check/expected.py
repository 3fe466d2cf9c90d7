"""How often the host waits for the GPU in the learner.

Counted on a fake GPU (tests/fake_cuda/test_learner.py, which fails if a count changes) for one rank and the specs
`torch-varlen` and `torch`. A wait is a value read by the host, an operation whose result's shape depends on values, or
a copy that is blocking or reads pageable memory. Keys are `kind: file:function`, the innermost function outside of
torch. `sft` is an SFT step, `rl` one update of an RL step, and `logprob` a pass without gradients.
"""

from __future__ import annotations

Table = dict[str, int]  # "kind: file:function" -> waits

SYNCS_PER_MICRO_BATCH: dict[str, Table] = {
    "sft": {},
    "rl": {},
    "logprob": {"copy to the host: pctrain/core/learner.py:Learner._token_values": 1},
}

_UPDATE: Table = {
    "item: megatron/core/distributed/finalize_model_grads.py:finalize_model_grads": 1,
    "item: megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
    "item: pctrain/core/optimizer.py:global_norm": 1,
}
SYNCS_PER_STEP: dict[str, Table] = {
    "sft": {**_UPDATE, "copy to the host: pctrain/core/step.py:_over_ranks": 1},
    "rl": {**_UPDATE, "copy to the host: pctrain/core/step.py:_over_ranks": 2},  # sums, and maxima
    "logprob": {},
}
