"""The order of calls on a GPU, with a stand-in for vLLM: memory is given back and taken again around the weights."""

import contextlib

import pytest

import pctrain.rollout.engine as engine_module
import pctrain.rollout.vllm_setup as vllm_setup
from pctrain.config.tree import RolloutConfig
from pctrain.rollout import Request, RolloutEngine
from pctrain.rollout.sharing import EngineGroups


class Recorder:
    """Records what the engine asks of vllm.LLM."""

    def __init__(self):
        self.calls = []

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, [name for name, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))
        return tags == ["kv_cache"]


@pytest.fixture
def engine(monkeypatch, tiny, tmp_path):
    tiny.build(False, seed=0).save_pretrained(tmp_path)
    llm = Recorder()
    monkeypatch.setattr(engine_module, "on_gpu", lambda: True)
    monkeypatch.setattr(engine_module, "start_llm", lambda *args, **kwargs: llm)
    monkeypatch.setattr(
        engine_module.torch.cuda, "empty_cache", lambda: llm.calls.append("the learner's cache is emptied")
    )
    monkeypatch.setattr(engine_module, "guest", lambda groups: contextlib.nullcontext())
    engine = RolloutEngine(tmp_path, RolloutConfig(), dtype="float32", context=64, eos_id=2)
    engine.stream = lambda: tiny.stream(tiny.build(False, seed=1))
    return engine


def test_order_of_calls_around_a_weight_update(engine):
    names = [name for name, _ in engine.stream()]
    weight_update = [
        "the learner's cache is emptied",
        ("wake_up", ["weights"]),
        ("reload_weights", names),
        ("wake_up", ["kv_cache"]),
        "reset_prefix_cache",
    ]
    engine.load_weights(engine.stream())
    assert engine._llm.calls == [("sleep", 2), *weight_update]
    engine._llm.calls.clear()
    engine.sleep()
    engine.sleep()  # asleep already
    engine.load_weights(engine.stream())
    assert engine._llm.calls == [("sleep", 2), *weight_update]


def test_no_sampling_while_asleep(engine):
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate([Request([5], 1)], temperature=1.0, max_response=1)


def test_options_by_device(monkeypatch, tmp_path):
    def options(gpu, world=1):
        groups = EngineGroups(1)
        groups.world = world
        monkeypatch.setattr(vllm_setup, "on_gpu", lambda: gpu)
        return vllm_setup.engine_options(
            tmp_path, RolloutConfig(gpu_memory=0.3, kv_cache_mb=64), groups, dtype="bfloat16", context=512
        )

    gpu, cpu = options(gpu=True), options(gpu=False)
    assert gpu["enable_sleep_mode"] and gpu["gpu_memory_utilization"] == 0.3 and "enforce_eager" not in gpu
    assert cpu["enforce_eager"] and cpu["kv_cache_memory_bytes"] == 64 << 20 and "enable_sleep_mode" not in cpu
    assert "distributed_executor_backend" not in gpu
    assert options(gpu=True, world=4)["distributed_executor_backend"] == "external_launcher"
