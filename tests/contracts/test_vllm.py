"""The rollout engine's uses of vLLM beyond calls: results, fields, methods by name, environment variables."""

import ast
import inspect
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine.llm_engine import LLMEngine

from pctrain.config.tree import RolloutConfig
from pctrain.rollout import Request, queue, vllm_setup
from pctrain.rollout.sharing import EngineGroups


@pytest.mark.parametrize(
    ("function", "returns"),
    [
        (LLM.enqueue, "list[str]"),
        (LLM.reset_prefix_cache, "bool"),
        (LLM.wake_up, "bool"),
        (LLMEngine.is_sleeping, "bool"),
        (LLMEngine.step, "list[vllm.outputs.RequestOutput | vllm.outputs.PoolingRequestOutput]"),
    ],
)
def test_results(function, returns):
    annotation = inspect.signature(function).return_annotation
    assert inspect.formatannotation(annotation).removeprefix("'").removesuffix("'") == returns


def test_sampling_parameters_and_outputs():
    sampling = queue.Sampling(temperature=0.7, max_response=5, logprobs=True, top_p=0.9)
    parameters = sampling.parameters(Request([1], seed=3), eos_id=2)
    given = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 5, "seed": 3, "stop_token_ids": [2], "logprobs": 0}
    assert {name: getattr(parameters, name) for name in given} == given
    assert isinstance(parameters, SamplingParams) and parameters.flat_logprobs and not parameters.detokenize
    assert {"token_ids", "logprobs", "finish_reason"} <= {field.name for field in fields(CompletionOutput)}
    assert {"request_id", "outputs", "finished"} <= set(inspect.signature(RequestOutput).parameters)
    assert {"token_ids", "logprobs"} <= {field.name for field in fields(FlatLogprobs)}


@pytest.mark.parametrize("gpu", [False, True])
def test_engine_options_are_fields(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_setup, "on_gpu", lambda: gpu)
    groups = EngineGroups(1)
    groups.world = 2
    options = vllm_setup.engine_options(tmp_path, RolloutConfig(), groups, dtype="bfloat16", context=64)
    assert set(options) <= {field.name for field in fields(EngineArgs)}


def test_reload_weights_takes_the_stream_on_either_runner(monkeypatch):
    """LLM.collective_rpc passes it by name, through the worker, to the runner that vLLM chooses."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
    from vllm.v1.worker.gpu_worker import Worker

    for owner in (Worker, RunnerV1, RunnerV2):
        inspect.signature(owner.reload_weights).bind(None, weights_iterator=iter(()))
    engine = ast.unparse(ast.parse(Path(inspect.getfile(vllm_setup)).with_name("engine.py").read_text()))
    assert "collective_rpc('reload_weights', kwargs={'weights_iterator': checked})" in engine


def test_variables_that_vllm_reads_expandable_segments_from():
    """It turns them off around its memory pools, so it must see what torch was told."""
    from vllm.device_allocator import alloc_conf

    assert alloc_conf.ALLOC_CONF_ENV_VARS[:2] == ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in alloc_conf.ALLOC_CONF_ENV_VARS[:2]:
        assert alloc_conf.expandable_segments_enabled_from_env({name: "expandable_segments:True"})
