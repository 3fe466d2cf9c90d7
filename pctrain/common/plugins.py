"""User code given as `module:name` (a reward, an algorithm), imported from the current directory or PYTHONPATH."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class LoadError(Exception):
    """User code that cannot be loaded. The message says why."""


def is_own(name: str) -> bool:
    """Return whether an option's value names user code, and not something of pctrain."""
    return ":" in name


def load(name: str, kind: str, accepts: Callable[[Any], bool]) -> Any:
    """Return the object that `module:name` names.

    Args:
        name: the name.
        kind: what is looked for, in the plural, for the message.
        accepts: returns whether an object is of that kind. The message lists those of the module.

    Raises:
        LoadError: the module cannot be imported (with its own error), or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if sys.path[0] != os.getcwd():
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}, line {frame.lineno})"
        raise LoadError(
            f"module {module_name} cannot be imported: {type(error).__name__}: {error}{where}; looked in {os.getcwd()} "
            "and PYTHONPATH"
        ) from None
    loaded = getattr(module, attribute, None)
    if loaded is None:
        known = [key for key, value in vars(module).items() if accepts(value) and value.__module__ == module_name]
        raise LoadError(f"{module.__file__} has no {attribute}; its {kind}: {', '.join(known) or 'none'}")
    return loaded
