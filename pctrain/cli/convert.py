"""`pctrain convert ...`: between Hugging Face directories and checkpoints."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command, Operands
from pctrain.common.errors import UserError
from pctrain.config.tree import Config, Section


class ConvertOptions(Section):
    """Options of `pctrain convert`."""

    verify: bool = Field(
        False,
        description="compare log-probs of random sequences with those of transformers; exit status 2 above 2e-4",
    )


def _hf_to_mcore(call: Call[ConvertOptions]) -> None:
    source, out = map(Path, call.operands)
    config = call.load_config(f"--model.path={source}")  # the layout is checked against its config.json
    _check_dtype(config, call.options)
    from pctrain.tools.convert import hf_to_mcore

    hf_to_mcore(config, source, out, call.options.verify)


def _mcore_to_hf(call: Call[ConvertOptions]) -> None:
    source, out = map(Path, call.operands)
    config = call.load_config()
    if config.model.path is None:
        raise UserError(
            f"pctrain {call.command.name} needs --model.path=HF, the Hugging Face directory that gives the config and "
            "the tokenizer"
        )
    _check_dtype(config, call.options)
    from pctrain.tools.convert import mcore_to_hf

    mcore_to_hf(config.with_model(config.model.path), source, out, call.options.verify)


def _check_dtype(config: Config, options: ConvertOptions) -> None:
    if options.verify and config.model.dtype != "float32":
        raise UserError(
            f"--verify compares in float32, but model.dtype = {config.model.dtype}; leave it at float32 (nothing is "
            f"lost)"
        )


COMMANDS = (
    Command(
        "convert hf-to-mcore",
        "turn a Hugging Face directory into a checkpoint (weights only) for model.checkpoint",
        "pctrain convert hf-to-mcore HF CHECKPOINT [--verify] [--section.key=value ...]",
        _hf_to_mcore,
        (
            "pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 --verify",
            "torchrun --nproc-per-node=2 -m pctrain convert hf-to-mcore Qwen3-0.6B checkpoints/step-0 "
            "--parallel.tensor=2",
        ),
        ConvertOptions,
        ("model", "parallel"),
        Operands(
            "HF CHECKPOINT",
            "2 folders",
            2,
            2,
            {"HF": "Hugging Face directory: config.json, safetensors", "CHECKPOINT": "new folder, named step-N"},
        ),
    ),
    Command(
        "convert mcore-to-hf",
        "turn the weights of a checkpoint into a Hugging Face directory",
        "pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF [--verify] [--section.key=value ...]",
        _mcore_to_hf,
        (
            "pctrain convert mcore-to-hf runs/sft/checkpoints/step-270 exported --model.path=Qwen3-0.6B --verify",
            "torchrun --nproc-per-node=2 -m pctrain convert mcore-to-hf CHECKPOINT OUT --model.path=HF "
            "--parallel.pipeline=2",
        ),
        ConvertOptions,
        ("model", "parallel"),
        Operands(
            "CHECKPOINT OUT",
            "2 folders",
            2,
            2,
            {
                "CHECKPOINT": "checkpoint folder, such as RUN/checkpoints/step-100, written at any layout",
                "OUT": "new folder; its config, tokenizer and weight dtypes come from model.path",
            },
        ),
    ),
)
