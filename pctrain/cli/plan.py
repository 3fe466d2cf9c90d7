"""`pctrain plan` and `doctor`: what a run needs, and whether this machine has it."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command
from pctrain.common.environment import set_environment
from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.tree import Section
from pctrain.plan.options import PlanOptions


class DoctorOptions(Section):
    """Options of `pctrain doctor`."""

    folder: Path = Field(
        Path("."), description="folder where runs will be written: check that it is writable and has space"
    )
    full: bool = Field(
        False,
        description="first run every phase of launch/gpu_check.py (kernels, learner, checkpoints, engine; ten minutes "
        "on a GPU); results go to gpu-check in the folder",
    )


def _plan(call: Call[PlanOptions]) -> None:
    config = call.read_config()  # its layout is not checked yet: it may be for another number of GPUs
    from pctrain.plan.command import main
    from pctrain.plan.launching import LAYOUT_KEYS

    layout = {f"--{key}" for key in (*LAYOUT_KEYS, "rollout.tensor")}
    pinned = [setting for setting in call.settings if setting.partition("=")[0] in layout]
    others = [setting for setting in call.settings if setting not in pinned]
    base = config_load.read(call.config_file, others)
    file = [] if call.config_file is None else ["--config", str(call.config_file)]
    main(config, base, call.options, {setting[2:].partition("=")[0] for setting in pinned}, [*file, *others])


def _doctor(call: Call[DoctorOptions]) -> None:
    set_environment()
    failed = _run_phases(call.options.folder) if call.options.full else False
    from pctrain.tools import doctor

    if doctor.main(call.options.folder) or failed:
        raise SystemExit(1)


def _run_phases(folder: Path) -> bool:
    """Run the phases of the GPU check, on the CPU where pctrain is installed for one; return whether one failed."""
    from pctrain.tools.doctor.gpus import kind
    from pctrain.tools.gpu_check.command import run
    from pctrain.tools.gpu_check.phase_table import choose

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("doctor --full checks one GPU: start it without torchrun. Expected one rank")
    return bool(run(choose(None), folder / "gpu-check", cpu=kind() == "cpu"))


COMMANDS = (
    Command(
        "plan",
        "what a config needs in memory, time and bandwidth on N GPUs, which layouts fit, and how to launch the fastest",
        "pctrain plan --gpus N --gpu KIND [--config FILE] [--kind sft|rl] [--out FILE] [--figure FILE] "
        "[--section.key=value ...]",
        _plan,
        (
            "pctrain plan --config configs/retu/rl-pipeline.yaml --gpus 8 --gpu h100",
            "pctrain plan --gpus 128 --gpu h200 --model.path=Qwen2.5-7B --model.dtype=bfloat16 --sft.batch_size=512 "
            "--sft.token_budget=16384",
            "pctrain plan --config sft.yaml --gpus 64 --gpu a100-80 --parallel.tensor=4        # tensor is fixed, the "
            "rest is searched",
            "pctrain plan --config configs/quickstart.yaml --gpus 2 --gpu cpu --kind rl",
        ),
        PlanOptions,
        (
            "model",
            "parallel",
            "sft.batch_size",
            "sft.token_budget",
            "rl.algorithm",
            "rl.prompts",
            "rl.group",
            "rl.updates",
            "rl.round_prompts",
            "rl.token_budget",
            "rl.reference_offload",
            "rollout.tensor",
            "rollout.max_prompt",
            "rollout.max_response",
            "rollout.max_sequences",
            "rollout.gpu_memory",
            "rollout.kv_cache_mb",
        ),
        notes="Planning needs no GPU, weights or data: it reads only config.json of model.path. It tries every "
        "layout that divides the GPUs and passes the checks of `pctrain sft` and `rl`; layout keys on the command "
        "line are fixed. Each number is printed with its source; docs/plan.md explains them.",
    ),
    Command(
        "doctor",
        "check this machine: versions, devices, memory, interconnect; say what is wrong and how to fix it",
        "pctrain doctor [--folder DIR] [--full]",
        _doctor,
        (
            "pctrain doctor",
            "pctrain doctor --full",
            "torchrun --standalone --nproc-per-node=2 -m pctrain doctor --folder /shared/runs",
        ),
        DoctorOptions,
    ),
)
