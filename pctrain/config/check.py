"""Find combinations of options that cannot work, before anything heavy is imported.

Each message names the keys, their values, the rule and what to change. All broken rules are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod

from pctrain.common.errors import UserError
from pctrain.config.algorithm import with_shared
from pctrain.config.check_layout import Shape, check_experts, check_layout, check_shape, model_shape
from pctrain.config.data import DataConfig
from pctrain.config.model import ModelConfig, ParallelConfig
from pctrain.config.sampling import EvalConfig, RewardConfig, RolloutConfig
from pctrain.config.study import CeilingConfig, StudyConfig
from pctrain.config.training import OptimizerConfig, RLConfig, SFTConfig
from pctrain.config.tree import Config
from pctrain.config.verifiers import check_verifier

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_combinations(config: Config, world_size: int, sections: Collection[str]) -> None:
    """Refuse what cannot run on `world_size` ranks. Only the rules about the given sections are applied.

    Raises:
        UserError: one line for each broken rule, or `model.path` without a readable config.json.
    """
    problems = list(_problems(config, world_size, set(sections)))
    if problems:
        raise UserError("\n".join(problems))


def _problems(config: Config, world_size: int, sections: set[str]) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if {"model", "parallel"} <= sections:
        shape = model_shape(model)
        yield from check_shape(shape)
        yield from check_layout(model, parallel, shape, world_size)
        yield from check_experts(model, parallel, shape, trains=bool({"sft", "rl"} & sections))
        if "rollout" in sections:
            yield from _check_rollout(config.rollout, config.eval, parallel, shape)
    data_parallel = max(1, world_size // (parallel.tensor * parallel.pipeline * parallel.context))
    if "sft" in sections:
        yield from _check_budget("sft", config.sft.token_budget, model, parallel)
        yield from _check_sft(config.sft, data_parallel)
    if "rl" in sections:
        yield from _check_budget("rl", config.rl.token_budget, model, parallel)
        yield from _check_rl(config.rl, config.rollout, data_parallel)
    if "data" in sections:
        yield from _check_data(config, sections)
    if "reward" in sections:
        yield from _check_reward(config.reward, parallel)
    if "eval" in sections:
        yield from _check_benchmarks(config.eval, config.reward)
    if "study" in sections:
        yield from _check_study(config)
    if "ceiling" in sections:
        yield from _check_ceiling(config.ceiling)


def _check_ceiling(ceiling: CeilingConfig) -> Iterator[str]:
    if ceiling.delta >= ceiling.delta2:
        yield f"ceiling.delta = {ceiling.delta} must be below ceiling.delta2 = {ceiling.delta2}"


# ---- training --------------------------------------------------------------------------------------------------------


def _check_rollout(
    rollout: RolloutConfig, evaluation: EvalConfig, parallel: ParallelConfig, shape: Shape
) -> Iterator[str]:
    if parallel.tensor % rollout.tensor:
        divisors = f" or a divisor of parallel.tensor = {parallel.tensor}" if parallel.tensor > 1 else ""
        yield (
            f"rollout.tensor = {rollout.tensor}: an engine spans a tensor parallel group or an even part of it; "
            f"expected 1{divisors}"
        )
    responses = {"rollout.max_response": rollout.max_response, "eval.max_response": evaluation.max_response}
    for key, length in responses.items():
        if length is None:
            continue
        if length >= shape.context:
            yield (
                f"{key} = {length} tokens leaves no room for a prompt in the context of {shape.context} tokens "
                f"({shape.source})"
            )
        elif rollout.max_prompt is not None and rollout.max_prompt + length > shape.context:
            yield (
                f"rollout.max_prompt = {rollout.max_prompt} and {key} = {length} are together more than the context of "
                f"{shape.context} tokens ({shape.source})"
            )


def _check_sft(sft: SFTConfig, data_parallel: int) -> Iterator[str]:
    if sft.batch_size % data_parallel:
        yield f"sft.batch_size = {sft.batch_size} is not divisible by the data parallel size {data_parallel}"
    if sft.epochs is not None:
        return  # the number of steps is known once the data is read
    if sft.val_every > sft.steps:
        yield (
            f"sft.val_every = {sft.val_every} is above sft.steps = {sft.steps}: no validation loss would be measured "
            f"on the way; set sft.val_every to {sft.steps} or less"
        )
    yield from schedule_problems("sft.optimizer", sft.optimizer, sft.steps)


def _check_rl(rl: RLConfig, rollout: RolloutConfig, data_parallel: int) -> Iterator[str]:
    samples = rl.prompts * rl.group
    product = f"rl.prompts x rl.group = {rl.prompts} x {rl.group} = {samples}"
    if samples % data_parallel:
        yield f"{product} is not divisible by the data parallel size {data_parallel}"
    if samples % rl.updates:
        yield f"{product} is not divisible by rl.updates = {rl.updates}"
    high = rl.group - 1 if rl.keep_high is None else rl.keep_high
    if not rl.keep_low <= high <= rl.group:
        yield (
            f"rl.keep_low = {rl.keep_low} to rl.keep_high = {high}: expected an ascending window within 0 to rl.group "
            f"= {rl.group}"
        )
    if rollout.max_response >= rl.token_budget:
        yield (
            f"rl.token_budget = {rl.token_budget} tokens cannot hold a prompt and rollout.max_response = "
            f"{rollout.max_response}; a sequence must fit into one pack"
        )
    elif rollout.max_prompt is not None and rollout.max_prompt + rollout.max_response > rl.token_budget:
        yield (
            f"rl.token_budget = {rl.token_budget} tokens cannot hold rollout.max_prompt = {rollout.max_prompt} and "
            f"rollout.max_response = {rollout.max_response}; a sequence must fit into one pack"
        )
    yield from schedule_problems("rl.optimizer", rl.optimizer, rl.steps * rl.updates)
    yield from rl.algorithm.problems(rl.group, rollout.max_response)


def _check_budget(section: str, token_budget: int, model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    # A pack is cut into a part for each tensor parallel rank, and each part into two pieces for each context parallel
    # rank. 8-bit matrix products take tokens in blocks.
    parts = {
        "parallel.tensor": parallel.tensor,
        "2 x parallel.context": 2 * parallel.context if parallel.context > 1 else 1,
        "the block of model.fp8": model.fp8_block,
    }
    parts = {name: size for name, size in parts.items() if size > 1}
    if token_budget % prod(parts.values()):
        form = "{} = {}" if len(parts) == 1 else "{} ({})"
        rule = " x ".join(form.format(name, size) for name, size in parts.items())
        yield f"{section}.token_budget = {token_budget} is not a multiple of {rule}"


def schedule_problems(section: str, optimizer: OptimizerConfig, steps: int) -> Iterator[str]:
    """Yield what is wrong with a learning rate schedule over `steps` updates. `section` is the optimizer's key."""
    if optimizer.min_lr > optimizer.lr:
        yield f"{section}.min_lr = {optimizer.min_lr} is above {section}.lr = {optimizer.lr}"
    longest = steps - optimizer.warmup
    if optimizer.schedule == "wsd" and not 1 <= optimizer.decay <= longest:
        yield (
            f"{section}.schedule = wsd with {section}.decay = {optimizer.decay}: expected 1 to {longest}, the {steps} "
            f"optimizer steps less {section}.warmup = {optimizer.warmup}"
        )
    if optimizer.schedule != "wsd" and optimizer.decay:
        yield (
            f"{section}.decay = {optimizer.decay} is read by {section}.schedule = wsd alone, not by "
            f"{optimizer.schedule}; set it to 0"
        )


# ---- data ------------------------------------------------------------------------------------------------------------


def _check_data(config: Config, sections: set[str]) -> Iterator[str]:
    """Yield which sets are missing. Without trajectories every set that is not given is generated (data/prepare.py)."""
    data, problems = config.data, config.data.problems
    if problems.min_terms > problems.max_terms:
        yield (
            f"data.problems.min_terms = {problems.min_terms} is above data.problems.max_terms = {problems.max_terms}"
        )
    trajectories = _given_trajectories(data, config.study, sections)
    if "sft" in sections:
        yield from _check_pair({trajectories or "data.train": trajectories, "data.validation": data.validation})
        if trajectories and data.test is None and config.sft.eval_every > 0:
            yield (
                f"{trajectories} is given without data.test, but sft.eval_every = {config.sft.eval_every}: give "
                "data.test, or set sft.eval_every to 0"
            )
    if "rl" in sections:
        yield from _check_pair({"data.rl": data.rl, "data.test": data.test})
        if trajectories and data.rl is None and data.test is None:
            yield (
                f"{trajectories} is given without data.rl and data.test, the problems to sample and to score on: give "
                "all of them, or none"
            )


def _given_trajectories(data: DataConfig, study: StudyConfig, sections: set[str]) -> str | None:
    """Return the key that names trajectories, or None if no key does."""
    if study.sets and "study" in sections:
        return "study.sets"
    return None if data.train is None else "data.train"


def _check_pair(pair: Mapping[str, object]) -> Iterator[str]:
    given = [name for name, value in pair.items() if value is not None]
    if len(given) == 1:
        [missing] = set(pair) - set(given)
        yield f"{given[0]} is given without {missing}: give both, or neither for generated problems"


# ---- rewards and benchmarks ------------------------------------------------------------------------------------------


def _check_reward(reward: RewardConfig, parallel: ParallelConfig) -> Iterator[str]:
    yield from _check_verifier(reward, "reward.verifier")
    if reward.timeout >= parallel.timeout:
        yield (
            f"reward.timeout = {reward.timeout:g} s must be below parallel.timeout = {parallel.timeout:g} s: a rank "
            "that waits that long for one verdict counts as hanging"
        )


def _check_benchmarks(evaluation: EvalConfig, reward: RewardConfig) -> Iterator[str]:
    verifiers = {"eval.judge": evaluation.judge}
    for name, benchmark in evaluation.benchmarks.items():
        yield from _check_folder_name("eval.benchmarks", name)
        verifiers[f"eval.benchmarks.{name}.verifier"] = benchmark.verifier
    for key, verifier in verifiers.items():
        if verifier is not None:
            named = reward.model_copy(update={"verifier": verifier, "levenshtein": False})
            yield from _check_verifier(named, key)
    if evaluation.judge is not None and ":" not in evaluation.judge:
        yield f"eval.judge = {evaluation.judge!r}: expected module:function, your own function"


def _check_verifier(reward: RewardConfig, key: str) -> Iterator[str]:
    try:
        check_verifier(reward, key)
    except UserError as error:
        yield str(error)


def _check_folder_name(key: str, name: str) -> Iterator[str]:
    if not FOLDER_NAME.fullmatch(name):
        yield (
            f"{key}: {name!r} becomes the name of a folder: use letters, digits, ., _ and -, with a letter or a digit "
            f"first"
        )


# ---- study -----------------------------------------------------------------------------------------------------------


def _check_study(config: Config) -> Iterator[str]:
    study = config.study
    if study.sets and config.data.train is not None:
        yield "study.sets and data.train are both given: the sets replace data.train, so name its sources among them"
    for name in study.sets:
        yield from _check_folder_name("study.sets", name)
    yield from _check_repetitions(study)
    if any(seed < 0 for seed in study.seeds):
        yield f"study.seeds = {study.seeds}: a seed is 0 or more"
    yield from _check_policy(config)
    yield from _check_study_checkpoints(study, config.sft)
    yield from _check_study_algorithms(study, config.rl, config.rollout.max_response)


def _check_repetitions(study: StudyConfig) -> Iterator[str]:
    lists: dict[str, list[str]] = {
        "starts": list(study.starts),
        "checkpoints": [str(step) for step in study.checkpoints],
        "algorithms": [options.name for options in study.algorithms],
        "seeds": [str(seed) for seed in study.seeds],
    }
    for key, values in lists.items():
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            yield f"study.{key} names {', '.join(repeated)} more than once"


def _check_policy(config: Config) -> Iterator[str]:
    study = config.study
    if study.policy != "paper":
        default = StudyConfig()
        for key in ("starts", "checkpoints"):
            if getattr(study, key) != getattr(default, key):
                yield (
                    f"study.{key} = {getattr(study, key)} is read by study.policy = paper, but it is {study.policy}: "
                    "leave one of them out"
                )
    if study.policy == "compare" and config.rl.algorithm.needs_expert:
        yield (
            f"rl.algorithm = {config.rl.algorithm.name} learns from experts, but study.policy = compare makes pure RL "
            "with it: name grpo, dapo_d or dapo_dc"
        )
    if study.policy == "compare" and config.sft.eval_every == 0:
        yield (
            "study.policy = compare compares SFT alone with the rest, but sft.eval_every = 0: SFT would never be "
            "scored; set it"
        )


def _check_study_checkpoints(study: StudyConfig, sft: SFTConfig) -> Iterator[str]:
    for step in study.checkpoints:
        is_saved = step % sft.checkpoint_every == 0 or step == sft.steps
        is_late = sft.epochs is None and step > sft.steps
        if step < 0 or not is_saved or is_late:
            yield (
                f"study.checkpoints names step {step}, which will have no checkpoint: sft.checkpoint_every = "
                f"{sft.checkpoint_every}, sft.steps = {sft.steps}"
            )


def _check_study_algorithms(study: StudyConfig, rl: RLConfig, max_response: int) -> Iterator[str]:
    algorithms = study.algorithms
    for options in algorithms:
        yield from with_shared(options, rl.algorithm).problems(rl.group, max_response)
    if not algorithms or study.policy == "compare":  # compare also runs rl.algorithm
        return
    read = {key for options in algorithms for key in options.option_fields()}
    for key, value in rl.algorithm.changed().items():
        if key not in read:
            names = ", ".join(options.name for options in algorithms)
            yield f"rl.algorithm.{key} = {value} is not read by study.algorithms = {names}, which have no such option"
