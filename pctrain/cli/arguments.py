"""What every command is made of: its entry in the table, and how it reads its arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.tree import Config


@dataclass(frozen=True)
class Command:
    """One verb. `options`: the config sections it reads, or single options; they are printed by `--help`, and whole sections are searched
    for impossible combinations."""

    name: str
    summary: str
    usage: str
    handler: Callable[[Command, list[str]], None]
    examples: tuple[str, ...]
    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_config(command: Command, arguments: list[str]) -> Config:
    path, overrides = take(arguments, "--config")
    sections = {option.split(".")[0] for option in command.options}
    config = config_load.load(Path(path) if path is not None else None, overrides, sections=sections)
    set_environment()
    return config


def take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `option VALUE` or `option=VALUE`, and the other arguments."""
    values, rest, position = [], [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == option:
            position += 1
            if position == len(arguments) or arguments[position].startswith("--"):
                raise UserError(f"{option} needs a value")
            values.append(arguments[position])
        elif argument.startswith(f"{option}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
        position += 1
    if len(values) > 1:
        raise UserError(f"{option} is given more than once: {', '.join(values)}")
    if values == [""]:
        raise UserError(f"{option} needs a value")
    return (values[0] if values else None), rest


def set_environment() -> None:
    """Settings that libraries read when they are imported. What the user has set stays."""
    defaults = {
        # The engine lives in the learner's process; in a process of its own, weights could not be swapped in place.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The tokenizer's threads and the forks of worker processes do not mix.
        "TOKENIZERS_PARALLELISM": "false",
        # Every model is a local directory; without this a typing error becomes minutes of retries against a hub.
        "HF_HUB_OFFLINE": "1",
        # vLLM's extension tells every rank at its import how it binds memory to the NUMA node.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not _has_gpu():
        # Ranks, engine and verifiers share the cores: two processes of two threads on two cores are ten times slower than of one.
        defaults["OMP_NUM_THREADS"] = "1"
        # Compiling takes longer than a small model's whole run, and vLLM on CPUs would try.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _has_gpu() -> bool:
    """Whether a CUDA device is visible, told without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and os.path.exists("/dev/nvidiactl")
