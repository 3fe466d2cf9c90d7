"""`pctrain eval`: models on benchmarks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pctrain.cli.command import Call, Command, Operands
from pctrain.common.errors import UserError
from pctrain.config.tree import Section

# Without `rollout`: its checks ask for room for eval.max_response, which is cut to the context here.
_CHECKED = ("run", "model", "parallel", "reward", "eval")


class EvalOptions(Section):
    """Options of `pctrain eval`."""

    out: Path = Field(
        description="folder for the results; an unfinished evaluation resumes there, and reuses the samples it has"
    )


def _evaluate(call: Call[EvalOptions]) -> None:
    given = call.read_config()
    if given.model.checkpoint is not None:
        raise UserError(
            f"model.checkpoint = {given.model.checkpoint}: pctrain eval takes checkpoints as operands; leave it out"
        )
    from pctrain.evaluate.targets import find

    targets = find(call.operands, given.model.path)
    config = call.load_config(f"--model.path={targets[0].hf_dir}", sections=_CHECKED)
    from pctrain.evaluate.command import main

    main(config, targets, call.options.out)


COMMANDS = (
    Command(
        "eval",
        "models on benchmarks: avg@k, pass@k with intervals, two verifiers, every sample saved",
        "pctrain eval MODEL... --out DIR [--config FILE] [--section.key=value ...]",
        _evaluate,
        (
            "pctrain eval Qwen2.5-7B --out scores --eval.benchmarks='{math500: math500.jsonl, aime24: {path: "
            "aime24.parquet, samples: 16}}'",
            "pctrain eval runs/rl/checkpoints/step-* runs/sft/checkpoints/step-720 --out scores --config "
            "configs/retu/eval.yaml",
            "torchrun --nproc-per-node=8 -m pctrain eval runs/sft runs/rl --out scores --config benchmarks.yaml "
            "--eval.judge=my_judge:judge",
        ),
        EvalOptions,
        ("run.seed", "model", "parallel", "data.template", "rollout", "reward", "eval"),
        Operands(
            "MODEL",
            "one or more models",
            1,
            None,
            {
                "MODEL": "Hugging Face directory, folder of a finished run (its hf/), or checkpoint "
                "RUN/checkpoints/step-N. Models with one architecture share an engine. Each is compared with the "
                "first, problem by problem."
            },
        ),
        "Known layouts: GSM8K, MATH, Minerva, OlympiadBench, AIME, GPQA, ARC, prompt + answer. For any other, name its "
        "columns in `fields`:\n"
        "  eval:\n"
        "    instruction: 'Put your final answer in \\boxed{}.'\n"
        "    benchmarks:\n"
        "      math500: math500.jsonl\n"
        "      aime24: {path: aime24.parquet, samples: 16}\n"
        "      gpqa: gpqa.jsonl                                        # multiple choice is judged by its letter\n"
        "      mine: {path: own.jsonl, fields: {prompt: q, answer: gold}}\n"
        "Checkpoints of an RL run together with its starting point also give curves.json for `pctrain fit`. After an "
        "interruption the same command resumes. What the figures mean: docs/evaluate.md",
    ),
)
