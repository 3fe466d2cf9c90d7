"""A user's reward function, `module:function`. Only worker processes import it.

The function is called with (response, answer) and returns a number in [0, 1] or a bool. A judge (`eval.judge`) that has
a parameter named `prompt` also gets the problem's prompt.
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
    """Import the function from the current directory or PYTHONPATH.

    Raises:
        LoadError: the module cannot be imported, or it has no such function.
    """
    function = plugins.load(name, "functions", inspect.isfunction)
    if not callable(function):
        raise LoadError(f"{name} is not a function but {function!r:.80}. Name a function as module:function.")
    return function


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling the function gives a coroutine."""
    call = type(function).__call__  # an object may have an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def extra_arguments(function: Callable[..., Any], question: dict[str, Any]) -> dict[str, str]:
    """Return the arguments besides response and answer: the prompt, if there is one and the function takes it."""
    wanted = "prompt" in question and "prompt" in inspect.signature(function).parameters
    return {"prompt": question["prompt"]} if wanted else {}


def judge_with(function: Callable[..., Any]) -> Callable[..., Verdict]:
    """Wrap `function` so that it returns a Verdict."""

    def judge(response: str, answer: str, **more: str) -> Verdict:
        try:
            return verdict_of(function(response, answer, **more))
        except (Exception, SystemExit) as error:
            return verdict_of_error(error)

    return judge


def verdict_of(value: Any) -> Verdict:
    """Return the verdict for a function's result: right for 1 or True, wrong for 0, partial between, else bad_value.

    A NaN, a string and None are bad values.
    """
    plain: Any = value
    # NumPy's bool is not a Real; NumPy scalars and one-element tensors have item().
    if not isinstance(value, Real) and hasattr(value, "item") and getattr(value, "size", 1) in (1, ()):
        plain = value.item()
    is_number = isinstance(plain, Real)
    if not is_number or not 0 <= plain <= 1:
        return Verdict(0.0, "bad_value", f"the function returned {value!r:.80}, not a number in [0, 1]")
    reward = float(plain)
    if 0 < reward < 1:
        return Verdict(reward, "partial")
    return RIGHT if reward else WRONG


def verdict_of_error(error: BaseException) -> Verdict:
    """Return the verdict for an exception of the function."""
    if isinstance(error, MemoryError):
        return Verdict(0.0, "memory", "the function asked for more than reward.memory_mb")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Verdict(0.0, "error", f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"[:500])
