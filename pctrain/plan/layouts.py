"""Every layout over N ranks that a config can have: divisors that also pass the checks of config/check.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.check import check_combinations
from pctrain.config.tree import Config, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.run.config_file import Kind

CHECKED = ("model", "parallel", "rollout")
MOST_VIRTUAL = 4  # virtual stages per stage: with more, traffic grows by more than the bubble shrinks


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def with_layout(config: Config, parallel: ParallelConfig, rollout_tensor: int) -> Config:
    """Return a copy of a config at another layout."""
    rollout = config.rollout.model_copy(update={"tensor": rollout_tensor})
    return config.model_copy(update={"parallel": parallel, "rollout": rollout})


def problem(config: Config, gpus: int, kind: Kind) -> str | None:
    """Return why a config cannot run on `gpus` ranks, in the words of `pctrain sft` and `rl`; None if it can."""
    try:
        check_combinations(config, gpus, (*CHECKED, kind))
    except UserError as error:
        return str(error)
    return None


def candidates(
    config: Config, hf: HFConfig, gpus: int, kind: Kind, pinned: Collection[str], cpu: bool
) -> Iterator[Config]:
    """Yield configs that pass the checks, each at another layout. Recomputation, which no check reads, is as given.

    `pinned` are keys (`parallel.tensor`) that stay as they are.
    """
    for candidate in _divisible(config, hf, gpus, kind, pinned, cpu):
        if problem(candidate, gpus, kind) is None:
            yield candidate


def _divisible(
    config: Config, hf: HFConfig, gpus: int, kind: Kind, pinned: Collection[str], cpu: bool
) -> Iterator[Config]:
    def choose(key: str, values: list[Any]) -> list[Any]:
        section, name = key.split(".")
        return [getattr(getattr(config, section), name)] if key in pinned else values

    width = hf.ffn if hf.experts is None else hf.experts.ffn
    te = not cpu and config.model.spec in ("auto", "te")
    for tensor in choose("parallel.tensor", divisors(gcd(gpus, hf.heads, hf.kv_heads, width))):
        for pipeline in choose("parallel.pipeline", [n for n in divisors(gpus // tensor) if n <= hf.layers]):
            left = gpus // (tensor * pipeline)
            for context in choose("parallel.context", divisors(left) if te else [1]):
                for expert in choose("parallel.expert", divisors(gcd(left, hf.experts.count)) if hf.experts else [1]):
                    for stages in _stages(hf, pipeline, choose):
                        parallel = config.parallel.model_copy(
                            update={
                                "tensor": tensor,
                                "pipeline": pipeline,
                                "context": context,
                                "expert": expert,
                                "sequence_parallel": choose("parallel.sequence_parallel", [tensor > 1])[0],
                                "overlap_grad_reduce": choose("parallel.overlap_grad_reduce", [not cpu and left > 1])[
                                    0
                                ],
                                **stages,
                            }
                        )
                        for engine in choose("rollout.tensor", divisors(tensor)) if kind == "rl" else [1]:
                            yield with_layout(config, parallel, engine)


def _stages(hf: HFConfig, pipeline: int, choose: Callable[[str, list[Any]], list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the layers of the first and the last stage if they are uneven, with each number of virtual stages."""
    first, last = even_ends(hf.layers, pipeline)
    given = {
        "first_stage_layers": choose("parallel.first_stage_layers", [first])[0],
        "last_stage_layers": choose("parallel.last_stage_layers", [last])[0],
    }
    most = -(-hf.layers // pipeline)
    numbers = [n for n in divisors(most) if n <= MOST_VIRTUAL] if pipeline > 1 else [1]
    for virtual in choose("parallel.virtual_pipeline", numbers):
        yield {"virtual_pipeline": virtual, **given}


def even_ends(layers: int, pipeline: int) -> tuple[int | None, int | None]:
    """Return the layers of the first and the last stage so that the others have equally many; (None, None) if all can.

    The ends take the rest, at most as many as the others: they also hold the embedding and the head. The last, which
    also computes the head, takes the smaller part.
    """
    if layers % pipeline == 0 or pipeline == 1:
        return None, None
    middle = -(-layers // pipeline)
    ends = layers - middle * (pipeline - 2)
    if ends < 2:  # more stages than such an even share allows: the checks say so
        return None, None
    return ends - ends // 2, ends // 2


@dataclass(frozen=True)
class Limit:
    """The possible values of a layout key, and the reason."""

    key: str
    values: list[int]
    because: str

    def __str__(self) -> str:
        return f"{self.key}: {', '.join(map(str, self.values))} ({self.because})"


def limits(config: Config, hf: HFConfig, gpus: int, kind: Kind) -> list[Limit]:
    """Return what divides what, for this model and batch on `gpus` GPUs."""
    width = hf.ffn if hf.experts is None else hf.experts.ffn
    tensor = gcd(hf.heads, hf.kv_heads, width)
    of_tensor = f"{hf.heads} heads, {hf.kv_heads} key/value heads, feed-forward width {width}"
    even = [n for n in divisors(gpus) if hf.layers % n == 0]
    rules = [
        Limit("parallel.tensor", divisors(gcd(tensor, gpus)), of_tensor),
        Limit(
            "parallel.pipeline",
            even,
            f"{hf.layers} layers in equal stages; others by first_stage_layers, last_stage_layers",
        ),
    ]
    if hf.experts is not None:
        rules.append(Limit("parallel.expert", divisors(gcd(hf.experts.count, gpus)), f"{hf.experts.count} experts"))
    name, batch = "sft.batch_size", config.sft.batch_size
    if kind == "rl":
        name, batch = "rl.prompts x rl.group", config.rl.prompts * config.rl.group
    rules.append(Limit("data parallel size", [n for n in divisors(gpus) if batch % n == 0], f"{name} = {batch}"))
    return rules
