"""Rollouts under torchrun, next to megatron-core's groups, with one engine per rank and at tensor parallel 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module", params=["this CPU", "AVX2"])
def results(request, tiny, tmp_path_factory):
    """The output of two_ranks.py, which checks the learner's groups before, between and after.

    "AVX2" takes vLLM's path for CPUs without AVX-512, where its ranks talk over gloo instead of shared memory.
    """
    directory = tmp_path_factory.mktemp("ranks")
    tiny.build(True, seed=0).save_pretrained(directory / "model")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    if request.param == "AVX2":
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "avx2"), environment["PYTHONPATH"]])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(HERE / "two_ranks.py"),
        str(directory / "model"),
        str(directory / "out.json"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads((directory / "out.json").read_text())
    assert not (request.param == "AVX2" and found["2"]["has_shared_memory"])
    return found


@pytest.mark.parametrize("tensor", ["1", "2"])
def test_updated_weights_are_the_learners_on_every_engine(results, tensor):
    assert results[tensor]["difference"] < 1e-4  # fp32 noise of two implementations


def test_layouts_sample_the_same_tokens(results):
    assert results["1"]["first"] == results["2"]["first"]
    assert results["1"]["updated"] == results["2"]["updated"] != results["1"]["first"]
    one, two = (np.concatenate(results[tensor]["logprobs"]) for tensor in "12")
    assert np.abs(one - two).max() < 1e-4  # a sum over two shards is rounded otherwise


def test_completions_come_back_in_the_order_of_the_requests(results, tiny):
    """Scored by the oracle under the request's own prompt: a completion in another's place would be far off."""
    model = tiny.build(True, seed=1)
    prompts = [[5 + (7 * i + 3 * j) % 300 for j in range(12)] for i in range(9)]
    for prompt, tokens, logprobs in zip(prompts, results["1"]["updated"], results["1"]["logprobs"], strict=False):
        (row,) = tiny.oracle(model, 1.0)([prompt + tokens])
        assert np.abs(row[len(prompt) :] - logprobs).max() < 1e-4
    assert len(results["1"]["updated"]) == 10


def test_sharing_out_is_undone_for_any_number_of_engines(monkeypatch):
    import torch.distributed as dist

    from pctrain.common.errors import UserError
    from pctrain.rollout.sharing import EngineGroups

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    for world, tensor, total in [(1, 1, 5), (4, 1, 10), (4, 2, 7), (8, 2, 3), (4, 4, 6)]:
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        made = {}
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            groups = EngineGroups(tensor)
            made.setdefault(groups.index, groups.share(range(total)))
        assert sorted(made) == list(range(world // tensor))
        assert groups.unshare([made[index] for index in sorted(made)], total) == list(range(total))
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="does not divide the world size 3"):
        EngineGroups(2)


def test_tensor_parallel_ranks_that_disagree_are_an_error(monkeypatch):
    import torch.distributed as dist

    from pctrain.rollout.sharing import EngineGroups

    for name, value in {"is_initialized": True, "get_backend": "gloo", "get_world_size": 4, "get_rank": 0}.items():
        monkeypatch.setattr(dist, name, lambda group=None, value=value: value)

    def gathered(object_list, obj, group=None):
        object_list[:] = [["a"], ["a"], ["b"], ["c"]]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(RuntimeError, match="ranks 2 and 3 of one engine sampled different"):
        EngineGroups(2).gather(["a"])
