"""A user's reward: `module:function`, called with (response, answer), returning a number in [0, 1] or a bool. For worker processes only.

A judge may take the problem as well: where its third parameter is called `prompt`, it gets it (`eval.judge`).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

from pctrain.common import plugins
from pctrain.common.plugins import LoadError
from pctrain.reward.verdict import RIGHT, WRONG, Verdict


def load(name: str) -> Callable[[str, str], Any]:
    """The function, from the current directory or PYTHONPATH. LoadError with the module's own error where there is none."""
    function = plugins.load(name, "functions", inspect.isfunction)
    if not callable(function):
        raise LoadError(f"{name} is no function but {function!r:.80}")
    return function


def is_async(function: Callable) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))


def asked_with(function: Callable[..., Any], question: dict[str, Any]) -> dict[str, str]:
    """What it is called with beside response and answer: the prompt, where the question has one and the function wants it."""
    wanted = "prompt" in question and "prompt" in inspect.signature(function).parameters
    return {"prompt": question["prompt"]} if wanted else {}


def judge_with(function: Callable[..., Any]) -> Callable[..., Verdict]:
    """`function` as (response, answer) -> Verdict."""

    def judge(response: str, answer: str, **more: str) -> Verdict:
        try:
            return verdict_of(function(response, answer, **more))
        except (Exception, SystemExit) as error:
            return verdict_of_error(error)

    return judge


def verdict_of(value: Any) -> Verdict:
    """right at 1 (or True), wrong at 0, partial between, else bad_value: a NaN, a string or None is no reward."""
    # NumPy's bool is no Real, and both its scalars and one-element tensors have item().
    plain = (
        value.item()
        if not isinstance(value, Real) and hasattr(value, "item") and getattr(value, "size", 1) in (1, ())
        else value
    )
    if not isinstance(plain, Real) or not 0 <= plain <= 1:
        return Verdict(0.0, "bad_value", f"the function returned {value!r:.80}, not a number in [0, 1]")
    reward = float(plain)
    if 0 < reward < 1:
        return Verdict(reward, "partial")
    return RIGHT if reward else WRONG


def verdict_of_error(error: BaseException) -> Verdict:
    """What the function raised."""
    if isinstance(error, MemoryError):
        return Verdict(0.0, "memory", "the function asked for more than reward.memory_mb")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Verdict(0.0, "error", f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"[:500])
