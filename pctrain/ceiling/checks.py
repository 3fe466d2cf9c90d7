"""Checked reading of curves: what is not a number, not in its range or not in order is refused, by name and place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pctrain.common.errors import UserError
from pctrain.files import json_file

MAX_SCORE = 100.0  # percent
LEAST_SE = 1e-4  # points: of more problems than there are, and below it squares lose their digits


def curve(
    eflops: Sequence[float], scores: Sequence[float], p_sft: float, max_score: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """`eflops` and `scores` as float64 [n], n >= 1, and `p_sft`; UserError where they are no curve."""
    try:
        x, y, p_sft = np.asarray(eflops, dtype=np.float64), np.asarray(scores, dtype=np.float64), float(p_sft)
    except (TypeError, ValueError) as error:
        raise UserError(f"ceiling fit: eflops, scores and p_sft must be numbers ({error})") from None
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise UserError(f"ceiling fit: need as many scores as eflops, one or more; found {y.shape} and {x.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise UserError(
            "ceiling fit: eflops, scores and p_sft must be finite; leave out the points that were not measured"
        )
    if (x < 0).any() or (np.diff(x) <= 0).any() or x[-1] == 0:
        raise UserError("ceiling fit: eflops must be 0 or more, increase from point to point and end above 0")
    maximum(max_score, "ceiling fit: max_score")
    if (y < 0).any() or (y > max_score).any() or not 0 <= p_sft <= max_score:
        raise UserError(f"ceiling fit: scores and p_sft must be in percent, 0 to the maximum, {max_score:g}")
    return x, y, p_sft


def maximum(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SCORE:  # NaN is neither
        raise UserError(
            f"{where} must be the highest score there can be, in percent, above 0 and at most 100; found {value!r}"
        )
    return float(value)


def standard_error(value: float | None, where: str) -> None:
    if value is not None and not LEAST_SE <= value <= MAX_SCORE:  # NaN is neither
        raise UserError(
            f"{where} must be a standard error in points, {LEAST_SE:g} to {MAX_SCORE:g}, or left out where unknown; "
            f"found {value!r}"
        )


# ---- files


def text(file: Path) -> str:
    """Contents of a text file, UTF-8. A pickle is named as one: it is never loaded, as loading one runs what it says."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise UserError(f"{file}: is empty; expected curves (JSON or CSV: pctrain fit --help)")
    if data[:1] == b"\x80" and data.rstrip()[-1:] == b".":
        raise UserError(
            f"{file}: is a Python pickle; pickles are not read, as reading one runs code. Write the curves as JSON or CSV "
            "(pctrain fit --help)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as text ({error}); expected curves as JSON or CSV in UTF-8") from None


def json_of(file: Path) -> object:
    return parsed(text(file), str(file))


def parsed(content: str, where: str) -> object:
    try:
        return json_file.parse(content)
    except json_file.MalformedJSON as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def mapping(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


def need(values: Mapping, key: str, where: str) -> object:
    if key not in values:
        raise UserError(f"{where}: the key `{key}` is missing; keys found: {', '.join(map(str, values)) or 'none'}")
    return values[key]


def number(values: Mapping, key: str, where: str) -> float:
    return as_number(need(values, key, where), f"{where}: `{key}`")


def as_number(value: object, where: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(f"{where} must be a finite number, 0 or more, found {value!r:.60}")
        return float(value)
    except (OverflowError, ValueError):  # a whole number above 1e308; one of more digits than Python prints
        raise UserError(f"{where} must be a finite number, found one too large") from None


def spread(values: Mapping, key: str, where: str) -> float | None:
    """A standard error in points; None where it is not stated, or 0 (all or no problems solved), which says nothing."""
    value = number(values, key, where) or None if values.get(key) is not None else None
    standard_error(value, f"{where}: `{key}`")
    return value


def percent(values: Mapping, key: str, where: str, max_score: float = MAX_SCORE) -> float:
    return at_most(number(values, key, where), max_score, f"{where}: `{key}`")


def at_most(value: float, max_score: float, where: str) -> float:
    if value > max_score:
        raise UserError(f"{where} must be a score in percent, at most {max_score:g}, found {value!r}")
    return value


def increasing(values: Sequence[float], where: str) -> np.ndarray:
    x = np.array(values, dtype=np.float64)
    falls = np.flatnonzero(np.diff(x) <= 0)
    if len(falls):
        before, after = x[falls[0]], x[falls[0] + 1]
        what = "given twice; keep one score for each EFLOPs" if before == after else "sort the points by EFLOPs"
        raise UserError(f"{where} must increase from point to point: {after:g} follows {before:g} ({what})")
    return x
