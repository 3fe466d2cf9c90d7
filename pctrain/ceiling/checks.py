"""Checked reading of curves. Values that are missing, not numbers, out of range or out of order raise a UserError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pctrain.common.errors import UserError
from pctrain.files import json_file

MAX_SCORE = 100.0  # percent
LEAST_SE = 1e-4  # points; squares of smaller values lose their digits, and no test set is large enough to give them


def curve(eflops: ArrayLike, scores: ArrayLike, p_sft: float, max_score: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return `eflops` and `scores` as float64 [n], n >= 1, and `p_sft`.

    Raises:
        UserError: they are not a curve.
    """
    try:
        x = np.asarray(eflops, dtype=np.float64)
        y = np.asarray(scores, dtype=np.float64)
        p_sft = float(p_sft)
    except (TypeError, ValueError) as error:
        raise UserError(f"ceiling fit: eflops, scores and p_sft must be numbers ({error})") from None
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise UserError(
            f"ceiling fit: got scores of shape {y.shape} and eflops of shape {x.shape}. "
            "Give as many scores as eflops, one or more."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise UserError("ceiling fit: eflops, scores and p_sft must be finite. Leave out points without a measurement.")
    if (x < 0).any() or (np.diff(x) <= 0).any() or x[-1] == 0:
        raise UserError("ceiling fit: eflops must be 0 or more, increase from point to point and end above 0.")
    maximum(max_score, "ceiling fit: max_score")
    if (y < 0).any() or (y > max_score).any() or not 0 <= p_sft <= max_score:
        raise UserError(f"ceiling fit: scores and p_sft must be in percent, from 0 to the maximum of {max_score:g}.")
    return x, y, p_sft


def maximum(value: object, where: str) -> float:
    """Return `value` if it can be the highest possible score, in percent."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SCORE:  # refuses NaN too
        raise UserError(
            f"{where} must be the highest possible score in percent, above 0 and at most 100; found {value!r}"
        )
    return float(value)


def standard_error(value: float | None, where: str) -> None:
    """Refuse a standard error that is given but out of range."""
    if value is not None and not LEAST_SE <= value <= MAX_SCORE:  # refuses NaN too
        raise UserError(
            f"{where} must be a standard error in points, {LEAST_SE:g} to {MAX_SCORE:g}; found {value!r}. "
            "Leave it out if it is unknown."
        )


# ---- files


def text(file: Path) -> str:
    """Return the contents of a UTF-8 text file. A pickle is refused: loading one would run the code it holds."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise UserError(f"{file}: is empty; expected curves (JSON or CSV: pctrain fit --help)")
    if data[:1] == b"\x80" and data.rstrip()[-1:] == b".":
        raise UserError(
            f"{file}: is a Python pickle; pickles are not read, because loading one runs code. Write the curves as "
            "JSON or CSV (pctrain fit --help)."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as text ({error}); expected curves as JSON or CSV in UTF-8") from None


def json_of(file: Path) -> object:
    """Return the parsed contents of a JSON file."""
    return parsed(text(file), str(file))


def parsed(content: str, where: str) -> object:
    """Return the value of the JSON text `content`, which was read from `where`."""
    try:
        return json_file.parse(content)
    except json_file.MalformedJSON as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def mapping(value: object, where: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


def need(values: Mapping[str, Any], key: str, where: str) -> Any:
    """Return `values[key]`; a missing key is a UserError that lists the keys there are."""
    if key not in values:
        raise UserError(f"{where}: the key `{key}` is missing; keys found: {', '.join(map(str, values)) or 'none'}")
    return values[key]


def number(values: Mapping[str, Any], key: str, where: str) -> float:
    """Return `values[key]` if it is a finite number, 0 or more."""
    return as_number(need(values, key, where), f"{where}: `{key}`")


def as_number(value: object, where: str) -> float:
    """Return `value` if it is a finite number, 0 or more."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(f"{where} must be a finite number, 0 or more, found {value!r:.60}")
        return float(value)
    except (OverflowError, ValueError):  # an integer above 1e308, or one with more digits than Python prints
        raise UserError(f"{where} must be a finite number, found one too large") from None


def spread(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """Return the standard error `values[key]` in points, or None if it is not stated or 0.

    A standard error of 0 (all or none of the problems solved) says nothing about the true error.
    """
    if values.get(key) is None:
        return None
    value = number(values, key, where) or None
    standard_error(value, f"{where}: `{key}`")
    return value


def percent(values: Mapping[str, Any], key: str, where: str, max_score: float = MAX_SCORE) -> float:
    """Return `values[key]` if it is a score in percent."""
    return at_most(number(values, key, where), max_score, f"{where}: `{key}`")


def at_most(value: float, max_score: float, where: str) -> float:
    """Return the score `value` if it does not exceed `max_score`."""
    if value > max_score:
        raise UserError(f"{where} must be a score in percent, at most {max_score:g}, found {value!r}")
    return value


def increasing(values: Sequence[float], where: str) -> np.ndarray:
    """Return `values` as float64 [n] if they increase from point to point."""
    x = np.array(values, dtype=np.float64)
    falls = np.flatnonzero(np.diff(x) <= 0)
    if len(falls):
        before, after = x[falls[0]], x[falls[0] + 1]
        what = "given twice; keep one score for each EFLOPs" if before == after else "sort the points by EFLOPs"
        raise UserError(f"{where} must increase from point to point: {after:g} follows {before:g} ({what})")
    return x
