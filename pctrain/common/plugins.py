"""What a user brings along as `module:name`, a reward or an algorithm: imported from the current directory or PYTHONPATH."""

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
    """Why there is no such thing, in words for the user."""


def is_own(name: str) -> bool:
    """Whether the value of an option names something of the user's, and nothing of pctrain's."""
    return ":" in name


def load(name: str, kind: str, of_kind: Callable[[Any], bool]) -> Any:
    """What `name` stands for. `kind`: what is looked for, in the plural; `of_kind` tells which objects of the module are.

    Raises:
        LoadError: the module's own error where it cannot be imported; what there is where it has no such name.
    """
    module_name, _, wanted = name.partition(":")
    if sys.path[0] != os.getcwd():
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        own = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if own.filename.startswith("<frozen") else f" ({own.filename}, line {own.lineno})"
        raise LoadError(
            f"module {module_name} cannot be imported: {type(error).__name__}: {error}{where}; looked in {os.getcwd()} and "
            "PYTHONPATH"
        ) from None
    found = getattr(module, wanted, None)
    if found is None:
        there = [key for key, value in vars(module).items() if of_kind(value) and value.__module__ == module_name]
        raise LoadError(f"{module.__file__} has no {wanted}; its {kind}: {', '.join(there) or 'none'}")
    return found
