"""Two ranks under torchrun: rollouts next to a megatron-core learner, with one engine per rank, then one over both.

See test_engine_ranks.py.

torchrun --nproc-per-node 2 two_ranks.py MODEL_DIR OUT.json
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pctrain.config.tree import RolloutConfig
from pctrain.rollout import Request, RolloutEngine, sampling_seed
from tests.helpers import tiny_llama as tiny

DIRECTORY, OUT = sys.argv[1:]
PROMPTS = [[5 + (7 * i + 3 * j) % 300 for j in range(12)] for i in range(9)]  # 9: the two engines get 5 and 4
LONG = [5 + (11 * j) % 300 for j in range(200)]
REQUESTS = [Request(prompt, sampling_seed(0, "test", 0, i, 0)) for i, prompt in enumerate([*PROMPTS, LONG])]


def check_groups(tensor: int) -> None:
    """The learner's groups are the ones it made, and work."""
    total = torch.ones(1)
    dist.all_reduce(total)
    sizes = {
        parallel_state.get_tensor_model_parallel_group(): tensor,
        parallel_state.get_data_parallel_group(): 2 // tensor,
    }
    for group, size in sizes.items():
        share = torch.ones(1)
        dist.all_reduce(share, group=group)
        assert (total.item(), share.item()) == (2, size)
    assert dist.get_world_size() == 2 and parallel_state.get_tensor_model_parallel_world_size() == tensor


def layout(tensor: int) -> dict:
    """A learner at TP = `tensor` (DP takes the rest) and engines of the same tensor parallel size."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    check_groups(tensor)
    environment = dict(os.environ)
    rollout = RolloutConfig(tensor=tensor, kv_cache_mb=64, temperature=0.7)
    engine = RolloutEngine(DIRECTORY, rollout, dtype="float32", context=256, eos_id=tiny.EOS)
    check_groups(tensor)
    # Two ranks of one engine talk through shared memory where vLLM's library has it (with AVX-512), else over gloo. The
    # memory is mapped but has no name any more: a killed run leaves nothing that the next one would trip over.
    has_shared_memory = hasattr(torch.ops._C, "init_shm_manager")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
    assert bool(mapped) == (tensor == 2 and has_shared_memory), mapped
    assert all(line.rstrip().endswith("(deleted)") for line in mapped), mapped
    first = engine.generate(REQUESTS, temperature=1.0, max_response=12, logprobs=True)
    batches = [REQUESTS[:4], REQUESTS[4:5], REQUESTS[5:]]  # of one request: the other engine has nothing to do
    fed = list(engine.generate_batches(batches, temperature=1.0, max_response=12, logprobs=True))
    assert [completion for batch in fed for completion in batch] == first and [len(batch) for batch in fed] == [4, 1, 5]
    model = tiny.build(True, seed=1)
    engine.load_weights(tiny.stream(model))
    difference = engine.verify(tiny.oracle(model, 0.7), [*PROMPTS[:3], LONG], tiny.EOS)
    check_groups(tensor)
    updated = engine.generate(REQUESTS, temperature=1.0, max_response=12, logprobs=True)
    engine.close()
    check_groups(tensor)
    assert dict(os.environ) == environment
    parallel_state.destroy_model_parallel()
    return {
        "has_shared_memory": has_shared_memory,
        "difference": difference,
        "first": [c.token_ids for c in first],
        "updated": [c.token_ids for c in updated],
        "logprobs": [c.logprobs for c in updated],
    }


def main() -> None:
    dist.init_process_group("gloo")
    results = {"1": layout(1), "2": layout(2)}
    both: list = [None, None]
    dist.all_gather_object(both, results)
    assert both[0] == both[1]  # every rank has every completion, in order
    if dist.get_rank() == 0:
        with open(OUT, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
