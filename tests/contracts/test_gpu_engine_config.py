"""vLLM accepts the engine's options on a CUDA platform, and makes of them what the code and `pctrain plan` count on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ["bfloat16,1,141", "float32,1,141", "bfloat16,8,80", "bfloat16,1,40"]  # dtype, ranks, GiB of a GPU


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    from tests.helpers import tiny_llama

    hf_dir = tmp_path_factory.mktemp("hf")
    tiny_llama.build(False, 0).save_pretrained(hf_dir)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    command = [sys.executable, "-m", "tests.contracts.gpu_engine", str(hf_dir), *CASES]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(zip(CASES, json.loads(child.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_options_become_what_the_engine_counts_on(configs, case):
    config, (dtype, world, _) = configs[case], case.split(",")
    assert config["dtype"] == f"torch.{dtype}"
    assert config["executor"] == ("UniProcExecutor" if world == "1" else "ExecutorWithExternalLauncher")
    assert config["sleep_mode"] and config["sleep_mode_backend"] == "cumem"
    assert config["cuda_graphs"] == "FULL_AND_PIECEWISE" and config["prefix_caching"]
    assert (config["gpu_memory"], config["max_num_seqs"]) == (0.4, 256)
    assert config["logprobs_mode"] == "processed_logprobs"
    # tests/rollout/test_engine_gpu_calls.py runs the engine with a step in flight, as these do.
    assert config["async_scheduling"] and config["steps_in_flight"] == 2 and config["model_runner_v2"]


@pytest.mark.parametrize(("case", "tokens"), [(CASES[0], 16384), (CASES[2], 16384), (CASES[3], 8192)])
def test_tokens_of_the_largest_pass(configs, case, tokens):
    """`pctrain plan` counts this pass; vLLM takes more tokens from 70 GiB of device memory on."""
    assert configs[case]["max_num_batched_tokens"] == tokens
