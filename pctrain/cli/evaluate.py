"""`pctrain eval`: models on benchmarks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.arguments import Command, set_environment, take
from pctrain.cli.options import parse
from pctrain.common.errors import UserError
from pctrain.config import load as config_load
from pctrain.config.help import own_option_lines
from pctrain.config.tree import Section

# Not `rollout`: its checks want room for eval.max_response, which the context cuts short here.
_CHECKED = ("run", "model", "parallel", "reward", "eval")


class EvalOptions(Section):
    out: Path = Field(
        description="folder of the results; an unfinished call goes on there, and finds the samples of models it has"
    )


def _eval(command: Command, arguments: list[str]) -> None:
    operands, options, rest = parse(command, arguments, EvalOptions)
    if not operands:
        raise UserError(f"pctrain eval: expected one or more models; usage: {command.usage}")
    path, overrides = take(rest, "--config")
    config_file = Path(path) if path is not None else None
    given = config_load.read(config_file, overrides)
    if given.model.checkpoint is not None:
        raise UserError(
            f"model.checkpoint = {given.model.checkpoint}: pctrain eval takes checkpoints as operands; leave it out"
        )
    from pctrain.evaluate.targets import find

    targets = find(operands, given.model.path)
    config = config_load.load(config_file, [*overrides, f"--model.path={targets[0].hf_dir}"], sections=_CHECKED)
    set_environment()
    from pctrain.evaluate.command import main

    main(config, targets, options.out)


COMMANDS = (
    Command(
        "eval",
        "models on benchmarks: avg@k, pass@k with intervals, two verifiers, every sample kept",
        "pctrain eval MODEL... --out DIR [--config FILE] [--section.key=value ...]",
        _eval,
        (
            "pctrain eval Qwen2.5-7B --out scores --eval.benchmarks='{math500: math500.jsonl, aime24: {path: aime24.parquet, samples: 16}}'",
            "pctrain eval runs/rl/checkpoints/step-* runs/sft/checkpoints/step-720 --out scores --config configs/retu/eval.yaml",
            "torchrun --nproc-per-node=8 -m pctrain eval runs/sft runs/rl --out scores --config benchmarks.yaml --eval.judge=my_judge:judge",
        ),
        ("run.seed", "model", "parallel", "data.template", "rollout", "reward", "eval"),
        (
            "  MODEL          Hugging Face directory, folder of a finished run (its hf/), or checkpoint RUN/checkpoints/step-N; several of",
            "                 one architecture share one engine. The others are compared with the first, problem by problem",
            *own_option_lines(EvalOptions),
            "",
            "Known layouts: GSM8K, MATH, Minerva, OlympiadBench, AIME, GPQA, ARC, prompt + answer; others by `fields` of a benchmark:",
            "  eval:",
            "    instruction: 'Put your final answer in \\boxed{}.'",
            "    benchmarks:",
            "      math500: math500.jsonl",
            "      aime24: {path: aime24.parquet, samples: 16}",
            "      gpqa: gpqa.jsonl                                        # multiple choice is judged by its letter",
            "      mine: {path: own.jsonl, fields: {prompt: q, answer: gold}}",
            "Checkpoints of an RL run, and what it started from, also give curves.json for `pctrain fit`. Stopped at any moment, the same",
            "command goes on. What the figures mean: docs/evaluate.md",
        ),
    ),
)
