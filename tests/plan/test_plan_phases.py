"""The phases of the plan, counted by hand, and its constants against the packages that it models."""

from unittest import mock

import pytest

from pctrain.config.load import read
from pctrain.plan.gpus import GIB, GPUS
from pctrain.plan.options import PlanOptions
from pctrain.plan.planner import Planner
from pctrain.plan.rollouts import ASLEEP, prefill_tokens
from tests.helpers.plan_models import MODELS, write_config

QWEN = 7_615_616_512
HEAD = 152_064 * 3584  # elements of the largest matrix
RL = ["--model.dtype=bfloat16", "--rl.token_budget=16384", "--rollout.max_response=4096", "--rollout.gpu_memory=0.4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_config(folder / name, shape) for name, shape in MODELS.items()}


def _planner(model, *options, gpus=1, gpu="h200", kind="rl", **assumed):
    typed = [f"--model.path={model}", *RL, *options]
    return Planner.of(read(None, typed), PlanOptions(gpus=gpus, gpu=gpu, kind=kind, **assumed), ())


def _memory(model, *options, **assumed):
    return _planner(model, *options, **assumed).as_configured().memory


def test_phases_of_sft_and_rl(models):
    sft = _memory(models["qwen-7b"], kind="sft")
    assert list(sft.phases) == ["load", "update", "save"] and sft.peak.phase == "update"
    assert sum(sft.of("save").parts.values()) == sft.of("save").total < sft.of("update").total
    rl = _memory(models["qwen-7b"], "--rl.algorithm.kl_coef=0.01", "--rl.updates=2")
    expected = ["load", "swap", "verify", "rollout", "logprob", "reference", "update", "save"]
    assert list(rl.phases) == expected and rl.peak.total == max(moment.total for moment in rl.phases.values())


def test_parameters_exist_twice_while_the_model_is_built(models):
    parts = _memory(models["qwen-7b"], "--sft.batch_size=512", gpus=64, kind="sft").of("load").parts
    assert parts["workspace"] == 2 * QWEN and "optimizer" not in parts
    assert parts["weights"] == pytest.approx(2 * QWEN, rel=1e-5)
    # On one rank the optimizer's masters, made of one parameter at a time, are more than that.
    alone = _memory(models["qwen-7b"], kind="sft").of("load").parts
    assert alone["optimizer"] == pytest.approx(4 * QWEN, rel=1e-5) and alone["workspace"] == 2 * HEAD
    # With enough data parallel ranks, little optimizer state and short packs it is the fullest moment.
    short = ["--sft.token_budget=1024", "--sft.batch_size=512", "--parallel.recompute=full"]
    assert _memory(models["qwen-7b"], *short, gpus=512, kind="sft").peak.phase == "load"


def test_a_weight_update_of_one_rank(models):
    memory = _memory(models["qwen-7b"])
    # The head in full, which vLLM copies into a new module first.
    assert memory.of("swap").parts["stream"] == 2 * HEAD * 2
    assert memory.of("swap").parts["engine"] == pytest.approx(2 * QWEN + ASLEEP)


def test_a_weight_update_of_sharded_ranks(models):
    sharded = ["--parallel.tensor=4", "--rollout.tensor=2"]
    # The head is larger than a bucket: all of it, this rank's quarter, a bucket; loaded in full, and a half of it.
    parts = _memory(models["qwen-7b"], *sharded, gpus=8).of("swap").parts
    assert parts["stream"] == pytest.approx(2 * HEAD * (1 + 1 / 4) + (512 << 20) + 2 * HEAD * 1.5)
    experts = _memory(models["qwen-30b-a3b"], "--parallel.expert=8", gpus=8).of("swap").parts
    module = 3 * 768 * 2048 * 128 * 2  # all experts of a layer
    assert experts["stream"] == pytest.approx(151_936 * 2048 * 2 + (512 << 20) + 2 * module)


def test_the_verification_runs_next_to_the_engine(models):
    plan = _planner(models["qwen-7b"], prompt=1000).as_configured()
    parts = plan.memory.of("verify").parts
    assert parts["engine"] == pytest.approx(0.4 * 139.7 * GIB - 16384 * 2 * (3 * 18944 + 4 * 3584))
    # Five rows of 1008 tokens: two chunks of logits of 2520 rows. Next to them the states before and after the norm.
    assert parts["logits"] == 2520 * 152_064 * 4 and parts["workspace"] == 2 * 5040 * 3584 * 2
    assert plan.memory.of("rollout").parts["engine"] == pytest.approx(0.4 * 139.7 * GIB)
    # Two data parallel ranks share the rows of eight engines: 20 each, cut into packs of at most rl.token_budget.
    several = _memory(models["qwen-7b"], "--parallel.tensor=4", gpus=8, prompt=1000).of("verify").parts
    assert several["workspace"] == 2 * 16384 * 3584 * 2
    fewer = _memory(models["qwen-7b"], "--parallel.tensor=4", "--rollout.tensor=2", gpus=8, prompt=1000).of("verify")
    assert fewer.parts["workspace"] == 2 * 10 * 1008 * 3584 * 2


def test_host_memory_of_a_save(models):
    host = _memory(models["qwen-7b"], gpus=8, kind="sft").host
    # State of all parameters; while it is gathered three tensors of their size, and three of an eighth. Weights pinned.
    gathered = 12 * QWEN * (1 + 1 + 1 / 8)
    assert gathered + 2 * QWEN < host.save_rank < gathered + 4 * QWEN
    assert host.save_node == pytest.approx(host.save_rank + 7 * 12 * QWEN / 8) and host.reference_node == 0
    # Of two nodes, the second has no first rank of a group.
    assert _memory(models["qwen-7b"], gpus=16, kind="sft").host.save_node < host.save_node
    # Four shards: the same bytes of state on a node, in four processes.
    cut = _memory(models["qwen-7b"], "--parallel.tensor=4", gpus=8, kind="sft").host
    assert cut.save_rank == pytest.approx(host.save_rank / 4, rel=0.2) and cut.save_node > 2 * cut.save_rank
    few = _memory(models["qwen-7b"], "--parallel.overlap_grad_reduce=true", gpus=8, kind="sft").host
    assert few.save_rank < 0.6 * host.save_rank  # buckets of 40 million elements


def test_host_memory_of_a_resume(models):
    host = _memory(models["qwen-7b"], gpus=16, kind="sft").host
    assert host.load_rank == 12 * QWEN and host.load_node == 8 * host.load_rank  # every rank reads the whole state
    cut = _memory(models["qwen-7b"], "--parallel.tensor=4", gpus=8, kind="sft").host
    assert cut.load_node == 8 * cut.load_rank and cut.load_rank == pytest.approx(host.load_rank / 4, rel=0.01)
    # A rank of 8 expert parallel ones reads an eighth of the experts.
    experts = _memory(models["qwen-30b-a3b"], "--parallel.expert=8", gpus=8, kind="sft").host
    whole = _memory(models["qwen-30b-a3b"], gpus=8, kind="sft").host
    assert whole.load_rank - experts.load_rank == 12 * 7 / 8 * 48 * 128 * 3 * 768 * 2048


def test_an_offloaded_reference_is_pinned_on_every_rank(models):
    options = ["--rl.algorithm.kl_coef=0.01", "--rl.reference_offload=true"]
    memory = _memory(models["qwen-7b"], *options, gpus=8)
    assert 8 * 2 * QWEN <= memory.host.reference_node < 2 * 8 * 2 * QWEN
    assert {phase for phase, moment in memory.phases.items() if "reference" in moment.parts} == {"reference"}


def test_ways_out_name_the_reference_and_the_dtype(models):
    options = ["--model.dtype=float32", "--parallel.tensor=8", "--rollout.max_prompt=1024"]
    fp32 = _planner(models["llama-3b"], *options, gpus=8, gpu="a100-40")
    ways = fp32.ways_out(fp32.as_configured())
    assert any("--model.dtype=bfloat16" in way for way in ways), ways
    options = ["--rl.algorithm.kl_coef=0.01", "--rollout.gpu_memory=0.5", "--rollout.max_prompt=1024"]
    layout = ["--parallel.tensor=2", "--parallel.recompute=full"]
    reference = _planner(models["qwen-7b"], *options, *layout, gpus=8, gpu="h100")
    tight = reference.as_configured()
    assert not tight.fits and tight.memory.peak.phase == "rollout"
    assert any("--rl.reference_offload=true" in way for way in reference.ways_out(tight))


# ---- constants of the packages that are modeled


@pytest.mark.parametrize("kind", sorted(GPUS))
def test_vllms_largest_pass(kind):
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    names = {"a100-40": "NVIDIA A100-SXM4-40GB", "a100-80": "NVIDIA A100-SXM4-80GB"}
    platform = mock.create_autospec(arg_utils.current_platform, instance=True)
    platform.get_device_total_memory.return_value = int(GPUS[kind].memory)
    platform.get_device_name.return_value = names.get(kind, f"NVIDIA {kind.upper()}")
    platform.is_tpu.return_value = platform.is_cpu.return_value = False
    with mock.patch.object(arg_utils, "current_platform", platform):
        tokens, _ = arg_utils.EngineArgs.get_batch_defaults(1)
    assert tokens[UsageContext.LLM_CLASS] == prefill_tokens(GPUS[kind])


def test_constants_of_the_core_and_the_rollout_worker():
    from pctrain.core import weight_buckets
    from pctrain.plan import activations, memory
    from pctrain.rollout import engine, worker
    from pctrain_kernels import head

    assert memory.BUCKET == weight_buckets.BUCKET_BYTES
    assert (memory.VERIFY_ROWS, memory.VERIFY_TOKENS) == (worker.VERIFY_PROMPTS + 1, engine.VERIFY_TOKENS)
    assert (activations.GPU_LOGITS, activations.CPU_LOGITS) == (head.GPU_LOGITS_BYTES, head.CPU_LOGITS_BYTES)
