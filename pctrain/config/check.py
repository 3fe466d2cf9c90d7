"""Combinations of options that cannot work, found before anything heavy is imported.

Each check names the keys, their values, the rule and what to change. Several broken rules are told at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.config.tree import SYNCHRONISED, Config, OptimizerConfig, RLConfig
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import CONFIG
from pctrain.reward.verifiers import check_name


@dataclass(frozen=True)
class Shape:
    """What the layout checks need of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    experts: int  # 0: dense
    source: str  # where the figures come from, for the messages


def check_combinations(config: Config, world_size: int, sections: Collection[str]) -> None:
    """Refuses what cannot run on `world_size` ranks. Only rules about the given sections are applied.

    Raises:
        UserError: one line for each broken rule; or `model.path` without a readable config.json.
    """
    problems = []
    if {"model", "parallel"} <= set(sections):
        shape = model_shape(config)
        problems += _shape_problems(shape)
        problems += _layout_problems(config, shape, world_size)
        problems += _expert_problems(config, shape, trains=bool({"sft", "rl"} & set(sections)))
        if "rollout" in sections:
            problems += _rollout_problems(config, shape)
    par = config.parallel
    data_parallel = max(1, world_size // (par.tensor * par.pipeline * par.context))
    if "sft" in sections:
        problems += _sft_problems(config, data_parallel)
    if "rl" in sections:
        problems += _rl_problems(config, data_parallel)
    if "data" in sections:
        problems += _data_problems(config, sections)
    if "reward" in sections:
        problems += _reward_problems(config)
    if "eval" in sections:
        problems += _benchmark_problems(config)
    if "study" in sections:
        problems += _study_problems(config)
    if "ceiling" in sections and config.ceiling.delta >= config.ceiling.delta2:
        problems.append(
            f"ceiling.delta = {config.ceiling.delta} must be below ceiling.delta2 = {config.ceiling.delta2}"
        )
    if problems:
        raise UserError("\n".join(problems))


def model_shape(config: Config) -> Shape:
    """Return the sizes in config.json of `model.path`, or else those of `model.architecture`."""
    if config.model.path is None:
        a = config.model.architecture
        return Shape(a.layers, a.hidden, a.heads, a.kv_heads, a.ffn, a.context, 0, "model.architecture")
    hf = HFConfig.read(config.model.path)
    ffn, experts = (hf.experts.ffn, hf.experts.count) if hf.experts else (hf.ffn, 0)
    source = str(Path(config.model.path) / CONFIG)
    return Shape(hf.layers, hf.hidden, hf.heads, hf.kv_heads, ffn, hf.context, experts, source)


def _shape_problems(shape: Shape) -> Iterator[str]:
    if shape.source != "model.architecture":
        return  # a published model may have a head size of its own (head_dim)
    if shape.hidden % shape.heads:
        yield f"model.architecture.heads = {shape.heads} does not divide model.architecture.hidden = {shape.hidden}"
    elif shape.hidden // shape.heads % 2:
        yield (
            f"model.architecture: hidden / heads = {shape.hidden // shape.heads} is odd; "
            "rotary embeddings turn pairs of channels and need an even head size"
        )
    if shape.heads % shape.kv_heads:
        yield f"model.architecture.kv_heads = {shape.kv_heads} does not divide model.architecture.heads = {shape.heads}"


def _layout_problems(config: Config, shape: Shape, world_size: int) -> Iterator[str]:
    tensor, pipeline, context = config.parallel.tensor, config.parallel.pipeline, config.parallel.context
    ranks = tensor * pipeline * context
    if world_size % ranks:
        names, sizes = "parallel.tensor x parallel.pipeline", f"{tensor} x {pipeline}"
        if context > 1:
            names, sizes = f"{names} x parallel.context", f"{sizes} x {context}"
        yield (
            f"{names} = {sizes} = {ranks} does not divide the world size {world_size}; "
            f"start a multiple of {ranks} ranks (torchrun --nproc-per-node={ranks} -m pctrain ...) or lower them"
        )
    for name, value in (
        ("attention heads", shape.heads),
        ("key/value heads", shape.kv_heads),
        ("feed-forward width", shape.ffn),
    ):
        if value % tensor:
            yield f"parallel.tensor = {tensor} does not divide the {name}: {value} ({shape.source})"
    yield from _spec_problems(config)
    yield from _stage_problems(config, shape)
    expert = config.parallel.expert
    if expert > 1 and not shape.experts:
        yield f"parallel.expert = {expert}, but the model has no experts ({shape.source})"
    elif shape.experts % expert:
        yield f"parallel.expert = {expert} does not divide the experts: {shape.experts} ({shape.source})"
    elif world_size % (tensor * pipeline * expert):
        yield (
            f"parallel.expert = {expert} does not divide the data parallel size: {world_size} ranks / "
            f"(parallel.tensor {tensor} x parallel.pipeline {pipeline})"
        )
    if config.parallel.sequence_parallel and tensor == 1:
        yield "parallel.sequence_parallel = true needs parallel.tensor above 1: it shards along the sequence over the tensor parallel ranks"


def _spec_problems(config: Config) -> Iterator[str]:
    """What only Transformer Engine has. (Whether `auto` finds it is seen when the model is built.)"""
    model = config.model
    if model.fp8 is not None and model.dtype != "bfloat16":
        yield f"model.fp8 = {model.fp8} needs model.dtype = bfloat16, not {model.dtype}"
    given = {
        "parallel.context": config.parallel.context if config.parallel.context > 1 else None,
        "model.fp8": model.fp8,
    }
    if model.spec not in ("auto", "te"):
        yield from (
            f"{key} = {value} needs Transformer Engine, but model.spec = {model.spec}; set model.spec to te, or leave {key} out"
            for key, value in given.items()
            if value is not None
        )


def _expert_problems(config: Config, shape: Shape, trains: bool) -> Iterator[str]:
    if config.model.router_aux_loss and not shape.experts:
        yield f"model.router_aux_loss = {config.model.router_aux_loss}, but the model has no experts ({shape.source}); set it to 0"
    if trains and shape.experts and config.parallel.tensor > 1 and not config.parallel.sequence_parallel:
        yield (
            f"parallel.tensor = {config.parallel.tensor} of a mixture of experts ({shape.source}) is trained with sequence parallel "
            "only: set parallel.sequence_parallel to true"
        )


def _stage_problems(config: Config, shape: Shape) -> Iterator[str]:
    """Layers over pipeline stages: the first and the last may have a number of their own, the others share the rest evenly."""
    par = config.parallel
    given = {
        f"parallel.{key}": getattr(par, key)
        for key in ("first_stage_layers", "last_stage_layers")
        if getattr(par, key) is not None
    }
    if par.pipeline == 1:
        virtual = {"parallel.virtual_pipeline": par.virtual_pipeline} if par.virtual_pipeline > 1 else {}
        yield from (f"{key} = {value} needs parallel.pipeline above 1" for key, value in (virtual | given).items())
        return
    if par.pipeline > shape.layers:
        yield f"parallel.pipeline = {par.pipeline} stages, but the model has {shape.layers} layers ({shape.source})"
        return
    rest, stages = shape.layers - sum(given.values()), par.pipeline - len(given)
    if not given and rest % stages:
        yield (
            f"parallel.pipeline = {par.pipeline} does not divide the layers: {shape.layers} ({shape.source}); "
            "parallel.first_stage_layers and parallel.last_stage_layers take what is over"
        )
        return
    if rest < stages or (rest % stages if stages else rest):
        taken = " and ".join(f"{key} = {value}" for key, value in given.items())
        yield (
            f"{taken} leave {rest} of the {shape.layers} layers ({shape.source}) for the other {stages} of parallel.pipeline = "
            f"{par.pipeline} stages, which must have equally many, at least one"
        )
        return
    for layers in {*given.values(), *([rest // stages] if stages else [])}:
        if layers % par.virtual_pipeline:
            yield f"parallel.virtual_pipeline = {par.virtual_pipeline} does not divide the {layers} layers of a pipeline stage"


def _rollout_problems(config: Config, shape: Shape) -> Iterator[str]:
    if config.parallel.tensor % config.rollout.tensor:
        yield (
            f"rollout.tensor = {config.rollout.tensor}: an engine spans a tensor parallel group or an even part of it; "
            f"expected 1{f' or a divisor of parallel.tensor = {config.parallel.tensor}' if config.parallel.tensor > 1 else ''}"
        )
    for key, value in (
        ("rollout.max_response", config.rollout.max_response),
        ("eval.max_response", config.eval.max_response),
    ):
        if value is not None and value >= shape.context:
            yield f"{key} = {value} tokens leaves no room for a prompt in the context of {shape.context} tokens ({shape.source})"
        elif (
            value is not None
            and config.rollout.max_prompt is not None
            and config.rollout.max_prompt + value > shape.context
        ):
            yield (
                f"rollout.max_prompt = {config.rollout.max_prompt} and {key} = {value} are together more than the context of "
                f"{shape.context} tokens ({shape.source})"
            )


def _sft_problems(config: Config, data_parallel: int) -> Iterator[str]:
    sft = config.sft
    yield from _budget_problems("sft", sft.token_budget, config)
    if sft.batch_size % data_parallel:
        yield f"sft.batch_size = {sft.batch_size} is not divisible by the data parallel size {data_parallel}"
    if sft.epochs is not None:
        return  # how many steps that is, and what they allow, is known when the data are
    if sft.val_every > sft.steps:
        yield (
            f"sft.val_every = {sft.val_every} is above sft.steps = {sft.steps}: no validation loss would be measured on the way; "
            f"set sft.val_every to {sft.steps} or less"
        )
    yield from schedule_problems("sft.optimizer", sft.optimizer, sft.steps)


def _rl_problems(config: Config, data_parallel: int) -> Iterator[str]:
    rl = config.rl
    samples = rl.prompts * rl.group
    yield from _budget_problems("rl", rl.token_budget, config)
    if samples % data_parallel:
        yield f"rl.prompts x rl.group = {rl.prompts} x {rl.group} = {samples} is not divisible by the data parallel size {data_parallel}"
    if samples % rl.updates:
        yield f"rl.prompts x rl.group = {rl.prompts} x {rl.group} = {samples} is not divisible by rl.updates = {rl.updates}"
    high = rl.group - 1 if rl.keep_high is None else rl.keep_high
    if not rl.keep_low <= high <= rl.group:
        yield f"rl.keep_low = {rl.keep_low} to rl.keep_high = {high}: expected an ascending window within 0 to rl.group = {rl.group}"
    if config.rollout.max_response >= rl.token_budget:
        yield (
            f"rl.token_budget = {rl.token_budget} tokens cannot hold a prompt and rollout.max_response = {config.rollout.max_response}; "
            "a sequence must fit into one pack"
        )
    elif (
        config.rollout.max_prompt is not None
        and config.rollout.max_prompt + config.rollout.max_response > rl.token_budget
    ):
        yield (
            f"rl.token_budget = {rl.token_budget} tokens cannot hold rollout.max_prompt = {config.rollout.max_prompt} and "
            f"rollout.max_response = {config.rollout.max_response}; a sequence must fit into one pack"
        )
    yield from schedule_problems("rl.optimizer", rl.optimizer, rl.steps * rl.updates)
    yield from _algorithm_problems(rl, config.rollout.max_response)


def _algorithm_problems(rl: RLConfig, max_response: int) -> Iterator[str]:
    if rl.overlong_buffer > max_response:
        yield f"rl.overlong_buffer = {rl.overlong_buffer} tokens, but a response has {max_response} at most (rollout.max_response)"
    if rl.algorithm == "srft":
        given = {"rl.kl_coef": rl.kl_coef, "rl.dual_clip": rl.dual_clip}
        yield from (
            f"{key} = {value} is not read by rl.algorithm = srft, whose objective has no ratio and no KL; leave it out"
            for key, value in given.items()
            if value
        )
    if rl.algorithm == "upt" and rl.upt_gamma >= rl.group:
        yield f"rl.upt_gamma = {rl.upt_gamma}: no prompt of {rl.group} rollouts (rl.group) has more right, so none is learnt from by RL"
    if rl.algorithm == "prefix_rft":
        low, end, high = rl.prefix_low_start, rl.prefix_low_end, rl.prefix_high
        if not end <= low <= high:
            yield (
                f"rl.prefix_low_end = {end}, rl.prefix_low_start = {low}, rl.prefix_high = {high}: "
                "expected prefix_low_end <= prefix_low_start <= prefix_high"
            )


def _reward_problems(config: Config) -> Iterator[str]:
    try:
        check_name(config.reward)
    except UserError as error:
        yield str(error)
    if config.reward.timeout >= config.parallel.timeout:
        yield (
            f"reward.timeout = {config.reward.timeout:g} s must be below parallel.timeout = {config.parallel.timeout:g} s: a rank that "
            "waits that long for one verdict counts as hanging"
        )


def _budget_problems(section: str, token_budget: int, config: Config) -> Iterator[str]:
    par = config.parallel
    # What a rank gets of a pack: a part of it for every tensor parallel rank, cut into two pieces for every context parallel one; matrix
    # products in 8 bits take tokens by sixteens (in blocks of 32 for mxfp8).
    parts = {
        "parallel.tensor": par.tensor,
        "2 x parallel.context": 2 * par.context if par.context > 1 else 1,
        "the block of model.fp8": config.model.fp8_block,
    }
    parts = {name: size for name, size in parts.items() if size > 1}
    if token_budget % prod(parts.values()):
        rule = " x ".join(f"{name} = {size}" if len(parts) == 1 else f"{name} ({size})" for name, size in parts.items())
        yield f"{section}.token_budget = {token_budget} is not a multiple of {rule}"


def schedule_problems(section: str, optimizer: OptimizerConfig, steps: int) -> Iterator[str]:
    """Of a run of so many optimizer steps."""
    if optimizer.min_lr > optimizer.lr:
        yield f"{section}.min_lr = {optimizer.min_lr} is above {section}.lr = {optimizer.lr}"
    if optimizer.schedule == "wsd" and not 1 <= optimizer.decay <= steps - optimizer.warmup:
        yield (
            f"{section}.schedule = wsd with {section}.decay = {optimizer.decay}: expected 1 to {steps - optimizer.warmup}, "
            f"the {steps} optimizer steps less {section}.warmup = {optimizer.warmup}"
        )
    if optimizer.schedule != "wsd" and optimizer.decay:
        yield f"{section}.decay = {optimizer.decay} is read by {section}.schedule = wsd alone, not by {optimizer.schedule}; set it to 0"


def _data_problems(config: Config, sections: Collection[str]) -> Iterator[str]:
    data = config.data
    given = (
        "study.sets" if config.study.sets and "study" in sections else "data.train" if data.train is not None else None
    )
    if data.problems.min_terms > data.problems.max_terms:
        yield f"data.problems.min_terms = {data.problems.min_terms} is above data.problems.max_terms = {data.problems.max_terms}"
    # Problems are generated where no trajectories are given, and then for every set that is not given (data/prepare.py).
    if "sft" in sections:
        yield from _pair_problems({given or "data.train": given, "data.validation": data.validation})
        if given and data.test is None and config.sft.eval_every > 0:
            yield (
                f"{given} is given without data.test, but sft.eval_every = {config.sft.eval_every}: "
                "give data.test, or set sft.eval_every to 0"
            )
    if "rl" in sections:
        yield from _pair_problems({"data.rl": data.rl, "data.test": data.test})
        if given and data.rl is None and data.test is None:
            yield f"{given} is given without data.rl and data.test, the problems to sample and to score on: give all of them, or none"


def _pair_problems(pair: dict[str, object]) -> Iterator[str]:
    given = [name for name, value in pair.items() if value is not None]
    if len(given) == 1:
        [missing] = set(pair) - set(given)
        yield f"{given[0]} is given without {missing}: give both, or neither for generated problems"


def _benchmark_problems(config: Config) -> Iterator[str]:
    named = {"eval.judge": config.eval.judge}
    for name, benchmark in config.eval.benchmarks.items():
        if not SET_NAME.fullmatch(name):
            yield f"eval.benchmarks: {name!r} becomes the name of a folder: use letters, digits, ., _ and -, a letter or a digit first"
        named[f"eval.benchmarks.{name}.verifier"] = benchmark.verifier
    for key, verifier in named.items():
        if verifier is None:
            continue
        try:
            check_name(config.reward.model_copy(update={"verifier": verifier, "levenshtein": False}))
        except UserError as error:
            yield str(error).replace("reward.verifier", key, 1)
    if config.eval.judge is not None and ":" not in config.eval.judge:
        yield f"eval.judge = {config.eval.judge!r}: expected module:function, a function of your own"


SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a folder's


def _study_problems(config: Config) -> Iterator[str]:
    study = config.study
    if study.sets and config.data.train is not None:
        yield "study.sets and data.train are both given: the sets take the place of data.train, name its sources among them"
    for name in study.sets:
        if not SET_NAME.fullmatch(name):
            yield f"study.sets: {name!r} becomes the name of a folder: use letters, digits, ., _ and -, a letter or a digit first"
    for key in ("starts", "checkpoints", "algorithms", "seeds"):
        values = getattr(study, key)
        if twice := sorted({str(value) for value in values if values.count(value) > 1}):
            yield f"study.{key} names {', '.join(twice)} more than once"
    if any(seed < 0 for seed in study.seeds):
        yield f"study.seeds = {study.seeds}: a seed is 0 or more"
    if study.policy != "paper":
        default = type(study)()
        for key in ("starts", "checkpoints"):
            if getattr(study, key) != getattr(default, key):
                yield (
                    f"study.{key} = {getattr(study, key)} is read by study.policy = paper, but it is {study.policy}: "
                    "leave one of them out"
                )
    if study.policy == "compare" and config.rl.algorithm in SYNCHRONISED:
        yield (
            f"rl.algorithm = {config.rl.algorithm} learns from experts, but study.policy = compare makes pure RL with it: "
            "name grpo, dapo_d or dapo_dc"
        )
    if study.policy == "compare" and config.sft.eval_every == 0:
        yield "study.policy = compare holds SFT alone against the rest, but sft.eval_every = 0: SFT would never be scored; set it"
    yield from _checkpoint_problems(config)
    for name in study.algorithms:
        yield from _algorithm_problems(config.rl.model_copy(update={"algorithm": name}), config.rollout.max_response)


def _checkpoint_problems(config: Config) -> Iterator[str]:
    sft = config.sft
    for step in config.study.checkpoints:
        due = step % sft.checkpoint_every == 0 or step == sft.steps
        if step < 0 or not due or (sft.epochs is None and step > sft.steps):
            yield (
                f"study.checkpoints names step {step}, which will have no checkpoint: sft.checkpoint_every = {sft.checkpoint_every}, "
                f"sft.steps = {sft.steps}"
            )
