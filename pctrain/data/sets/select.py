"""`pctrain data select`: a subset by difficulty, length and size.

Difficulty is the win rate that `pctrain data winrate` wrote (PAPER.md 4): easy is 1, hard at most 0.25. Lengths and rates are read first
and kept as two numbers a record; then the choice is made, and the chosen records are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.data.records import Fault
from pctrain.data.sets.options import Request, SelectOptions
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data, Item
from pctrain.hf.tokenizer import Tokenizer

EASY, HARD = 1.0, 0.25
_QUANTILES = (0, 10, 50, 90, 100)


def main(request: Request[SelectOptions]) -> None:
    options, hf_dir = request.options, request.config.model.path
    _check(options)
    tokenizer = Tokenizer(hf_dir) if hf_dir is not None else None
    by_length = options.min_length is not None or options.max_length is not None or options.prefer != "random"
    data = Data(request.paths, request.config.data.fields, need=("response",) if by_length else ())
    with Outputs(request, data.files) as outputs:
        figures = measure(data, options, (lambda text: len(tokenizer.encode(text))) if tokenizer else len)
        reasons = reasons_to_drop(figures, options)
        outputs.write(_kept(data, reasons, figures, outputs))
        unit = "tokens" if tokenizer else "characters"
        chosen = figures.usable & (reasons == "")
        distribution = _distribution(figures, chosen)
        outputs.report(outputs.finish(figures.read, length_unit=unit, distribution=distribution))
        _print_distribution(distribution, unit)


def _check(options: SelectOptions) -> None:
    if options.take == "uniform" and options.size is None:
        raise UserError(
            "--take=uniform draws evenly over the win rates and needs --size=N, the number of records to draw"
        )
    if options.prefer != "random" and options.size is None:
        raise UserError(
            f"--prefer={options.prefer} says which of the records stay where more qualify than --size; give --size=N"
        )
    if options.min_length is not None and options.max_length is not None and options.min_length > options.max_length:
        raise UserError(
            f"--min_length={options.min_length} is above --max_length={options.max_length}: nothing would qualify"
        )
    if options.take is options.size is options.min_length is options.max_length is None:
        raise UserError("pctrain data select: nothing to select by; give --take, --size, --min_length or --max_length")


class Figures:
    """By place: float64 `rate` (NaN where the record has none), int64 `length` of the trajectory, bool `usable`."""

    def __init__(self, rates: list[float], lengths: list[int]):
        self.rate, self.length = np.array(rates, np.float64), np.array(lengths, np.int64)
        self.usable = self.length >= 0
        self.read = len(rates)


def measure(data: Data, options: SelectOptions, length_of: Callable[[str], int]) -> Figures:
    """The first reading. Raises UserError for a record without the column of the win rate, where the choice depends on it."""
    rates, lengths = [], []
    fault = None
    for item in data.items("measuring"):
        if isinstance(item, Fault):
            fault = fault or item
            rates.append(np.nan)
            lengths.append(-1)
            continue
        rates.append(_rate(item, options.by, needed=options.take is not None))
        lengths.append(length_of(item.record.trajectory or ""))
    figures = Figures(rates, lengths)
    data.refuse_empty(int(figures.usable.sum()), fault)
    return figures


def _rate(item: Item, column: str, needed: bool) -> float:
    if column not in item.value:
        if not needed:
            return np.nan
        raise UserError(
            f"{item.where}: the record has no column {column!r}; `pctrain data winrate` writes it, or name another one by --by"
        )
    rate = item.value[column]
    if rate is None:
        return np.nan
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise UserError(f"{item.where}: column {column!r}: expected a share from 0 to 1, or null, got {rate!r}")
    return float(rate)


def reasons_to_drop(figures: Figures, options: SelectOptions) -> np.ndarray:
    """One text a record, "" where it is selected.

    Raises:
        UserError: fewer records qualify than --size.
    """
    reasons = np.full(figures.read, "", dtype=object)

    def drop(where: np.ndarray, reason: str) -> None:
        reasons[where & (reasons == "") & figures.usable] = reason

    if options.take is not None:
        drop(np.isnan(figures.rate), "no win rate")
    if options.take == "easy":
        drop(figures.rate < EASY, "not easy")
    if options.take == "hard":
        drop(figures.rate > HARD, "not hard")
    if options.min_length is not None:
        drop(figures.length < options.min_length, "too short")
    if options.max_length is not None:
        drop(figures.length > options.max_length, "too long")
    if options.size is not None:
        qualified = np.flatnonzero((reasons == "") & figures.usable)
        if len(qualified) < options.size:
            counts = ", ".join(
                f"{count} {reason}" for reason, count in Counter(filter(None, reasons.tolist())).most_common()
            )
            raise UserError(
                f"--size={options.size}: only {len(qualified)} of {int(figures.usable.sum())} records qualify"
                f"{f' ({counts})' if counts else ''}; lower --size or widen the choice"
            )
        chosen = np.zeros(figures.read, bool)
        chosen[_draw(qualified, figures, options)] = True
        drop(~chosen, "not drawn")
    return reasons


def _draw(qualified: np.ndarray, figures: Figures, options: SelectOptions) -> np.ndarray:
    """`--size` of the places that qualify."""
    order = np.random.default_rng(options.seed).permutation(qualified)
    if options.prefer != "random":  # of equal lengths the seed decides
        lengths = figures.length[order]
        order = order[np.argsort(-lengths if options.prefer == "longest" else lengths, kind="stable")]
    if options.take != "uniform":
        return order[: options.size]
    levels = np.unique(figures.rate[qualified])
    by_level = [order[figures.rate[order] == level] for level in levels]
    return np.concatenate(
        [places[:share] for places, share in zip(by_level, even_shares([len(p) for p in by_level], options.size))]
    )


def even_shares(there: list[int], size: int) -> list[int]:
    """How many to take of each level: as even as what is there allows, `size` in all. What cannot be even goes to the first levels."""
    shares = [0] * len(there)
    left = size
    while left:
        open_levels = [i for i, count in enumerate(there) if shares[i] < count]
        each = left // len(open_levels)
        for i in open_levels:
            more = min(there[i] - shares[i], max(each, 1), left)
            shares[i] += more
            left -= more
    return shares


def _kept(data: Data, reasons: np.ndarray, figures: Figures, outputs: Outputs) -> Iterator[dict[str, Any]]:
    for item in data.items("writing"):
        if isinstance(item, Fault):
            outputs.drop(item.where, None, f"unusable: {item.cause}", message=item.message)
        elif reasons[item.place]:
            evidence = {"length": figures.length[item.place], "win_rate": figures.rate[item.place]}
            outputs.drop(item.where, item.record.id, reasons[item.place], **evidence)
        else:
            yield item.value


def _distribution(figures: Figures, chosen: np.ndarray) -> dict[str, Any]:
    """Before and after: records by win rate, and quantiles of the length."""
    rows: dict[str, Any] = {"win_rate": [], "length": []}
    for level in np.unique(figures.rate[figures.usable & ~np.isnan(figures.rate)]).tolist():
        at = figures.rate == level
        rows["win_rate"].append(
            {"win_rate": level, "before": int((at & figures.usable).sum()), "after": int((at & chosen).sum())}
        )
    unrated = np.isnan(figures.rate) & figures.usable
    rows["win_rate"].append({"win_rate": None, "before": int(unrated.sum()), "after": int((unrated & chosen).sum())})
    before, after = figures.length[figures.usable], figures.length[chosen]
    for quantile in _QUANTILES:
        rows["length"].append(
            {
                "percentile": quantile,
                "before": float(np.percentile(before, quantile)),
                "after": float(np.percentile(after, quantile)) if len(after) else None,
            }
        )
    return rows


def _print_distribution(distribution: dict[str, Any], unit: str) -> None:
    from rich.table import Table

    table = Table(title="before and after", title_justify="left")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    rated = [row for row in distribution["win_rate"] if row["win_rate"] is not None]
    for row in rated[:20]:
        table.add_row(f"win rate {row['win_rate']:g}", f"{row['before']:,}", f"{row['after']:,}")
    if len(rated) > 20:
        table.add_row(f"{len(rated) - 20} more win rates: in the manifest", "", "")
    none = distribution["win_rate"][-1]
    table.add_row("no win rate", f"{none['before']:,}", f"{none['after']:,}")
    for row in distribution["length"]:
        name = {0: "shortest", 50: "median length", 100: "longest"}.get(
            row["percentile"], f"{row['percentile']} % are at most"
        )
        table.add_row(f"{name} ({unit})", f"{row['before']:,.0f}", f"{row['after']:,.0f}")
    make_console().print(table)
