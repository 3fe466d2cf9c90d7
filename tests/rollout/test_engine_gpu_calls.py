"""The engine as on a GPU: it gives memory back and takes it again around a weight update, and a step stays in flight.

The driver's calls are replaced (tests/helpers/gpu_memory.py); the rest is vLLM's own code on its CPU engine.
"""

import random
import time

import pytest

import pctrain.rollout.engine as engine_module
import pctrain.rollout.vllm_setup as vllm_setup
from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.distributed.health import watchdog
from pctrain.rollout import Request, RolloutEngine, sampling_seed
from pctrain.rollout.sharing import EngineGroups
from tests.helpers.gpu_memory import GpuMemory

EOS, CONTEXT = 2, 256
CLOSE = 1e-4  # fp32 noise; wrong weights give more than 0.1
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(3, 320) for _ in range(12)] for _ in range(3)]
SLEEP = ["unmap weights", "unmap kv_cache", "empty cache"]
WAKE = ["empty cache", "map weights", "empty cache", "map kv_cache"]


class OnGpu:
    """A running engine that takes itself to be on a GPU, and the memory of that GPU."""

    def __init__(self, tiny, directory, patch):
        self.tiny = tiny
        tiny.build(False, seed=0).save_pretrained(directory)
        self.engine = RolloutEngine(directory, RolloutConfig(kv_cache_mb=64), dtype="float32", context=256, eos_id=EOS)
        self.memory = GpuMemory(self.engine._llm, patch)
        patch.setattr(engine_module, "on_gpu", lambda: True)

    def update_weights(self, seed):
        def stream():
            for name, tensor in self.tiny.stream(self.tiny.build(False, seed)):
                self.memory.learner_cache = True  # the gathered tensor's memory, which torch's allocator keeps
                yield name, tensor

        self.memory.calls.clear()
        self.engine.load_weights(stream())

    def difference(self, seed):
        return self.engine.verify(self.tiny.oracle(self.tiny.build(False, seed), 1.0), PROMPTS, EOS)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def on_gpu(request, monkeypatch, tiny, tmp_path):
    """Async scheduling is vLLM's default on a GPU, and off on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    update_config = CpuPlatform.check_and_update_config.__func__

    def with_scheduling(cls, vllm_config):
        update_config(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = request.param

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_scheduling))
    rig = OnGpu(tiny, tmp_path, monkeypatch)
    assert rig.engine._llm.llm_engine.engine_core.engine_core.async_scheduling == request.param
    yield rig
    rig.engine.close()  # raises if the memory of a sleeping engine is unmapped once more
    assert not rig.memory.mapped


def requests(count):
    return [Request([5 + index, 7, 9], sampling_seed(0, "test", 0, index, 0)) for index in range(count)]


def test_memory_around_weight_updates(on_gpu):
    on_gpu.update_weights(1)
    assert on_gpu.memory.calls == [*SLEEP, *WAKE]
    assert on_gpu.difference(1) < CLOSE
    on_gpu.engine.generate(requests(40), temperature=1.5, max_response=20)  # some end by EOS, so a step is in flight
    core = on_gpu.engine._llm.llm_engine.engine_core.engine_core
    assert bool(core.batch_queue) == core.async_scheduling
    on_gpu.engine.sleep()
    on_gpu.engine.sleep()  # asleep already
    assert on_gpu.memory.mapped == set()
    with pytest.raises(RuntimeError, match="asleep"):
        on_gpu.engine.generate(requests(1), temperature=1.0, max_response=1)
    on_gpu.update_weights(2)
    assert on_gpu.memory.calls == WAKE and on_gpu.memory.mapped == {"weights", "kv_cache"}
    assert on_gpu.difference(2) < CLOSE


def test_closing_a_sleeping_engine(on_gpu):
    on_gpu.engine.sleep()


def test_closing_after_a_failed_weight_update(on_gpu):
    with pytest.raises(UserError, match="did not come"):
        on_gpu.engine.load_weights(iter(()))
    assert on_gpu.memory.mapped == {"weights"}


def test_an_engine_that_does_not_wake_is_noticed(on_gpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu.engine._llm, "wake_up", lambda tags=None: True)
        with pytest.raises(RuntimeError, match="not fully awake"):
            on_gpu.update_weights(1)


def test_a_start_counts_as_progress_for_a_while(monkeypatch, tiny, tmp_path):
    tiny.build(False, seed=0).save_pretrained(tmp_path)
    beats = []

    def slow_options(*_args, **_kwargs):
        before = watchdog._beat
        time.sleep(0.5)
        beats.append(watchdog._beat > before)
        raise ValueError("that is all")

    def start():
        with pytest.raises(UserError, match="that is all"):
            RolloutEngine(tmp_path, RolloutConfig(), dtype="float32", context=64, eos_id=EOS)

    monkeypatch.setattr(vllm_setup, "engine_options", slow_options)
    monkeypatch.setattr(vllm_setup, "START_BEAT_SECONDS", 0.05)
    start()
    monkeypatch.setattr(vllm_setup, "START_SECONDS", 0.0)
    start()
    assert beats == [True, False]


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
