"""Read curves of any trainer in the two simplest forms, a CSV and a JSON list.

A CSV has a header. The columns `curve` (a name, for several curves in one file) and `score_se` (points) are optional:

    curve,eflops,score,score_se
    my run,0,68.6,1.0
    my run,3.5,69.9,1.0

The row at 0 EFLOPs is the score at the switch point, P_sft. In JSON, `p_sft_se`, `score_se` (points) and `max_score`
(percent) are optional:

    {"curves": [{"name": "my run", "p_sft": 68.6, "eflops": [3.5, 6.4], "scores": [69.9, 70.1],
                 "score_se": 1.0, "max_score": 100}]}
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.ceiling import checks
from pctrain.ceiling.curve import Curve
from pctrain.common.errors import UserError

COLUMNS = ("curve", "eflops", "score", "score_se")
KEYS = ("name", "p_sft", "p_sft_se", "eflops", "scores", "score_se", "max_score")


def read_csv(file: Path) -> list[Curve]:
    """Return the curves in the order of their names, or one curve named as the file if there is no column `curve`."""
    rows = csv.reader(checks.text(file).splitlines(), skipinitialspace=True)
    try:
        header = [name.strip().lower() for name in next(rows)]
        _check_header(header, file)
        by_curve: dict[str, list[tuple[str, dict[str, str]]]] = {}
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{file}, line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(
                    f"{where}: has {len(row)} values, but the header has {len(header)} ({', '.join(header)})"
                )
            values = dict(zip(header, row, strict=True))
            by_curve.setdefault(values.get("curve", file.stem).strip(), []).append((where, values))
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: not CSV ({error})") from None
    if not by_curve:
        raise UserError(f"{file}: a header and no rows. Expected one row per score.")
    return [_csv_curve(name, lines, f"{file}: curve {name!r}") for name, lines in by_curve.items()]


def _check_header(header: list[str], file: Path) -> None:
    missing = {"eflops", "score"} - set(header)
    unknown = set(header) - set(COLUMNS)
    if missing or unknown or len(set(header)) != len(header):
        raise UserError(
            f"{file}, line 1: the header must name the columns eflops and score, and may name curve and score_se, each "
            f"once. Found {', '.join(map(repr, header))}."
        )


def _csv_curve(name: str, lines: list[tuple[str, dict[str, str]]], where: str) -> Curve:
    x = checks.increasing([_csv_number(values, "eflops", place) for place, values in lines], f"{where}: eflops")
    scores = [
        checks.at_most(_csv_number(values, "score", place), checks.MAX_SCORE, f"{place}: `score`")
        for place, values in lines
    ]
    if x[0] != 0 or len(x) == 1:
        what = "at 0 EFLOPs, the score at the switch point (P_sft)" if x[0] != 0 else "after the switch point"
        raise UserError(f"{where}: no row {what}")
    errors = [
        _csv_number(values, "score_se", place) if values.get("score_se", "").strip() else 0.0 for place, values in lines
    ]
    for error, (place, _) in zip(errors, lines, strict=True):
        checks.standard_error(error or None, f"{place}: `score_se`")
    stated = [error for error in errors[1:] if error > 0]
    return Curve(
        name,
        None,
        None,
        scores[0],
        x[1:],
        np.array(scores[1:]),
        p_sft_se=errors[0] or None,
        score_se=float(np.median(stated)) if stated else None,
    )


def _csv_number(values: dict[str, str], key: str, where: str) -> float:
    try:
        value = float(values[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: `{key}` must be a finite number, 0 or more, found {values[key]!r:.60}")
    return value


def read_json(document: Mapping[str, Any], file: Path) -> list[Curve]:
    """Return the curves of a parsed JSON file with the key `curves`."""
    if not isinstance(document["curves"], list) or not document["curves"]:
        raise UserError(f"{file}: `curves` must be a list of one or more objects with the keys {', '.join(KEYS)}")
    return [_json_curve(entry, f"{file}: curves[{i}]") for i, entry in enumerate(document["curves"])]


def _json_curve(value: object, where: str) -> Curve:
    entry = checks.mapping(value, where)
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        raise UserError(f"{where}: unknown key `{unknown[0]}`; the keys are {', '.join(KEYS)}")
    name = checks.need(entry, "name", where)
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: `name` must be a non-empty string, found {name!r:.60}")
    top = checks.maximum(entry.get("max_score", checks.MAX_SCORE), f"{where}: `max_score`")
    x, y = (_numbers(checks.need(entry, key, where), f"{where}: `{key}`") for key in ("eflops", "scores"))
    if len(x) != len(y):
        raise UserError(f"{where}: {len(x)} eflops and {len(y)} scores. Give one score for each.")
    if x[0] == 0:
        raise UserError(f"{where}: `eflops` must begin above 0. The score at the switch point is `p_sft`.")
    for i, score in enumerate(y):
        checks.at_most(score, top, f"{where}: scores[{i}]")
    return Curve(
        name,
        None,
        None,
        checks.percent(entry, "p_sft", where, top),
        checks.increasing(x, f"{where}: eflops"),
        np.array(y),
        p_sft_se=checks.spread(entry, "p_sft_se", where),
        score_se=checks.spread(entry, "score_se", where),
        max_score=top,
    )


def _numbers(values: object, where: str) -> list[float]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} must be a list of one or more numbers, found {type(values).__name__}")
    return [checks.as_number(value, f"{where}[{i}]") for i, value in enumerate(values)]
