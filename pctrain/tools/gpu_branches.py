"""What differs on a GPU: every file that asks `device.on_gpu`, what it does there, by which documented API, and how far it was run.

`pctrain doctor --explain gpu` prints it; README.md has it as a table. A test holds the list against the code: a new branch must stand
here.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_YET = "not yet run"


@dataclass(frozen=True)
class Branch:
    """`files`: below pctrain/ (kernels/ where they begin with it). `covered`: what stands in for a GPU in the tests."""

    what: str
    files: tuple[str, ...]
    api: str
    source: str
    covered: str
    state: str = NOT_YET


BRANCHES = (
    Branch(
        "process groups over NCCL, one GPU a rank",
        ("distributed/parallel.py", "core/patches/cpu.py"),
        'torch.distributed.init_process_group("nccl"), torch.cuda.set_device',
        "docs.pytorch.org/docs/stable/distributed.html",
        "the same calls over gloo, 1 to 4 ranks",
    ),
    Branch(
        "layer spec te: Transformer Engine's linear layers and attention; context parallelism; 8 bits by model.fp8",
        ("core/layers/spec.py",),
        "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec; TransformerConfig.fp8",
        "docs.nvidia.com/megatron-core/developer-guide/latest/",
        "its construction, the cut of sequences over ranks, a run with another attention in its place",
    ),
    Branch(
        "layer spec torch-varlen: a GPU without Transformer Engine",
        ("core/layers/spec.py",),
        "torch.nn.attention.varlen.varlen_attn",
        "docs.pytorch.org/docs/stable/nn.attention.varlen.html",
        "against the definition with a stand-in; the real one without data (meta tensors)",
    ),
    Branch(
        "weights gathered in one collective",
        ("core/weights.py",),
        "torch.distributed.all_gather_into_tensor",
        "docs.pytorch.org/docs/stable/distributed.html",
        "gloo's broadcasts in its place, bit for bit",
    ),
    Branch(
        "checkpoints written in the background by a forked process",
        ("core/learner.py",),
        "megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue",
        "docs.nvidia.com/megatron-core/developer-guide/latest/",
        "the same path on the CPU",
    ),
    Branch(
        "the reference model's weights in pinned host memory",
        ("core/reference.py",),
        "torch.Tensor.pin_memory",
        "docs.pytorch.org/docs/stable/generated/torch.Tensor.pin_memory.html",
        "without pinning",
    ),
    Branch(
        "what a rank waits in collectives, by events on its stream",
        ("distributed/waits.py",),
        "torch.cuda.Event(enable_timing=True)",
        "docs.pytorch.org/docs/stable/generated/torch.cuda.Event.html",
        "the host's clock on the CPU; the events with a stand-in",
    ),
    Branch(
        "the fastest matrix product, what MFU is a share of",
        ("core/peak.py",),
        "torch.cuda.synchronize",
        "docs.pytorch.org/docs/stable/notes/cuda.html",
        "on the CPU, a smaller one",
    ),
    Branch(
        "vLLM: CUDA graphs, sleep level 2, tagged wake-up, swap of weights in place, memory share rollout.gpu_memory",
        ("rollout/engine.py", "rollout/vllm_setup.py"),
        "vllm.LLM(enable_sleep_mode=True), LLM.sleep(level=2), LLM.wake_up(tags=[...]), reload_weights, reset_prefix_cache",
        "docs.vllm.ai/en/latest/features/sleep_mode/",
        "the order of the calls with a stand-in; all else on vLLM's CPU engine",
    ),
    Branch(
        "Triton kernels beneath pctrain_kernels",
        ("kernels/pctrain_kernels/backend.py",),
        "triton.jit",
        "triton-lang.org/main/python-api/triton.html",
        "every test in Triton's interpreter; compiled for sm_90 and sm_100 without a spill (kernels/README.md)",
    ),
    Branch(
        "bandwidth and matrix products of `pctrain doctor`",
        ("tools/doctor_measures.py",),
        "torch.cuda, torch.distributed.all_reduce",
        "docs.pytorch.org/docs/stable/cuda.html",
        "the same measures on the CPU and over gloo",
    ),
)


def markdown() -> str:
    """The table of README.md."""
    lines = ["| on a GPU | state | what the tests run in its place |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {b.what} | {b.state} | {b.covered} |" for b in BRANCHES)])


def explain() -> str:
    parts = []
    for branch in BRANCHES:
        files = ", ".join(file if file.startswith("kernels/") else f"pctrain/{file}" for file in branch.files)
        parts.append(
            f"{branch.what}\n  state    {branch.state}\n  files    {files}\n  API      {branch.api}\n"
            f"  source   https://{branch.source}\n  tested   {branch.covered}"
        )
    return "\n\n".join(parts)
