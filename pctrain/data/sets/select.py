"""`pctrain data select`: selects a subset by difficulty, length and size.

Difficulty is the win rate that `pctrain data winrate` wrote (arXiv 2512.11470, section 4): easy is 1, hard is at most
0.25. The first pass keeps the length and the win rate of each record. Then the records are chosen, and a second pass
copies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.data.records import Fault
from pctrain.data.sets.options import CommandCall, SelectOptions
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data, Item
from pctrain.hf.tokenizer import Tokenizer

EASY, HARD = 1.0, 0.25
_QUANTILES = (0, 10, 50, 90, 100)


def main(call: CommandCall[SelectOptions]) -> None:
    """Run the command."""
    options, hf_dir = call.options, call.config.model.path
    _check(options)
    unit = "characters" if hf_dir is None else "tokens"
    measure_length: Callable[[str], int] = len if hf_dir is None else _token_counter(hf_dir)
    by_length = options.min_length is not None or options.max_length is not None or options.prefer != "random"
    data = Data(call.paths, call.config.data.fields, need=("response",) if by_length else ())
    with Outputs(call, data.files) as outputs:
        figures = measure(data, options, measure_length)
        reasons = reasons_to_drop(figures, options)
        outputs.write(_keep(data, reasons, figures, outputs))
        chosen = figures.usable & (reasons == "")
        distribution = _distribution(figures, chosen)
        outputs.report(outputs.finish(figures.read, length_unit=unit, distribution=distribution))
        _print_distribution(distribution, unit)


def _token_counter(hf_dir: Path) -> Callable[[str], int]:
    tokenizer = Tokenizer(hf_dir)
    return lambda text: len(tokenizer.encode(text))


def _check(options: SelectOptions) -> None:
    if options.take == "uniform" and options.size is None:
        raise UserError("--take=uniform draws evenly over the win rates. Set --size=N, the number of records to draw.")
    if options.prefer != "random" and options.size is None:
        raise UserError(
            f"--prefer={options.prefer} has an effect only if more records qualify than --size. Set --size=N."
        )
    if options.min_length is not None and options.max_length is not None and options.min_length > options.max_length:
        raise UserError(
            f"--min-length={options.min_length} is above --max-length={options.max_length}, so no record would qualify"
        )
    if options.take is options.size is options.min_length is options.max_length is None:
        raise UserError("pctrain data select: no criterion. Set --take, --size, --min-length or --max-length.")


class Figures:
    """The win rate and the length of each record, by its place.

    Attributes:
        rate: float64 [n], NaN if the record has no win rate.
        length: int64 [n], the length of the trajectory, -1 if the record is unusable.
        usable: bool [n].
        read: n, the number of records.
    """

    def __init__(self, rates: list[float], lengths: list[int]):
        self.rate, self.length = np.array(rates, np.float64), np.array(lengths, np.int64)
        self.usable = self.length >= 0
        self.read = len(rates)


def measure(data: Data, options: SelectOptions, measure_length: Callable[[str], int]) -> Figures:
    """Read the win rate and the length of every record: the first pass.

    Raises:
        UserError: a record does not have the column of the win rate, and the choice depends on it.
    """
    rates: list[float] = []
    lengths: list[int] = []
    fault = None
    for item in data.items("measuring"):
        if isinstance(item, Fault):
            fault = fault or item
            rates.append(np.nan)
            lengths.append(-1)
            continue
        rates.append(_rate(item, options.by, needed=options.take is not None))
        lengths.append(measure_length(item.record.trajectory or ""))
    figures = Figures(rates, lengths)
    data.refuse_empty(int(figures.usable.sum()), fault)
    return figures


def _rate(item: Item, column: str, needed: bool) -> float:
    if column not in item.value:
        if not needed:
            return np.nan
        raise UserError(
            f"{item.where}: the record has no column {column!r}. "
            "Run `pctrain data winrate` to write it, or name another column with --by."
        )
    rate = item.value[column]
    if rate is None:
        return np.nan
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise UserError(f"{item.where}: column {column!r}: expected a share from 0 to 1, or null, got {rate!r}")
    return float(rate)


def reasons_to_drop(figures: Figures, options: SelectOptions) -> np.ndarray:
    """Return one reason per record as an object array; the reason is "" for a record that is selected.

    Raises:
        UserError: fewer records qualify than --size.
    """
    reasons = np.full(figures.read, "", dtype=object)

    def drop(mask: np.ndarray, reason: str) -> None:
        reasons[mask & (reasons == "") & figures.usable] = reason

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
            dropped = Counter(filter(None, reasons.tolist())).most_common()
            counts = ", ".join(f"{count} {reason}" for reason, count in dropped)
            raise UserError(
                f"--size={options.size}: only {len(qualified)} of {int(figures.usable.sum())} records qualify"
                f"{f' ({counts})' if counts else ''}. Lower --size, or relax the criteria."
            )
        chosen = np.zeros(figures.read, bool)
        chosen[_draw(qualified, figures, options, options.size)] = True
        drop(~chosen, "not drawn")
    return reasons


def _draw(qualified: np.ndarray, figures: Figures, options: SelectOptions, size: int) -> np.ndarray:
    """Draw `size` of the places that qualify."""
    order = np.random.default_rng(options.seed).permutation(qualified)
    if options.prefer != "random":  # the seed decides between equal lengths
        lengths = figures.length[order]
        order = order[np.argsort(-lengths if options.prefer == "longest" else lengths, kind="stable")]
    if options.take != "uniform":
        return order[:size]
    levels = np.unique(figures.rate[qualified])
    by_level = [order[figures.rate[order] == level] for level in levels]
    shares = even_shares([len(places) for places in by_level], size)
    return np.concatenate([places[:share] for places, share in zip(by_level, shares, strict=True)])


def even_shares(available: list[int], size: int) -> list[int]:
    """Return how many records to take of each level: as evenly as possible, `size` in total.

    What cannot be spread evenly goes to the first levels.
    """
    shares = [0] * len(available)
    left = size
    while left:
        open_levels = [i for i, count in enumerate(available) if shares[i] < count]
        each = left // len(open_levels)
        for i in open_levels:
            more = min(available[i] - shares[i], max(each, 1), left)
            shares[i] += more
            left -= more
    return shares


def _keep(data: Data, reasons: np.ndarray, figures: Figures, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """Yield the selected records in a second pass, and drop the others."""
    for item in data.items("writing"):
        if isinstance(item, Fault):
            outputs.drop_unusable(item)
        elif reasons[item.place]:
            evidence = {"length": figures.length[item.place], "win_rate": figures.rate[item.place]}
            outputs.drop(item.where, item.record.id, reasons[item.place], **evidence)
        else:
            yield item.value


def _distribution(figures: Figures, chosen: np.ndarray) -> dict[str, Any]:
    """Return the records by win rate and the quantiles of the length, before and after the selection."""
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
        table.add_row(f"{len(rated) - 20} more win rates are in the manifest", "", "")
    unrated = distribution["win_rate"][-1]
    table.add_row("no win rate", f"{unrated['before']:,}", f"{unrated['after']:,}")
    names = {0: "shortest", 50: "median length", 100: "longest"}
    for row in distribution["length"]:
        name = names.get(row["percentile"], f"{row['percentile']}th percentile of the length")
        table.add_row(f"{name} ({unit})", f"{row['before']:,.0f}", f"{row['after']:,.0f}")
    make_console().print(table)
