"""Findings of `pctrain doctor`, and how those of several ranks become one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GB = 1 << 30
State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, and advice for a result that is not ok."""

    check: str
    result: str
    state: State = "ok"
    advice: str = ""


def combined(by_rank: Sequence[list[Finding]]) -> list[Finding]:
    """Merge the findings of all ranks.

    A finding that all ranks share is listed once. Figures that differ become a range. Other differences are listed
    with the ranks that they belong to.
    """
    by_check: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            by_check.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    merged = []
    for check, ranks_of in by_check.items():
        if len(ranks_of) > 1 and all(finding.state == "ok" for finding in ranks_of):
            results = [finding.result for finding in ranks_of]
            lowest, highest = min(results, key=_leading_number), max(results, key=_leading_number)
            merged.append(Finding(check, f"{lowest} to {highest} over the ranks"))
            continue
        for finding, ranks in ranks_of.items():
            suffix = _rank_list(ranks) if len(ranks) < len(by_rank) else ""
            merged.append(Finding(check, finding.result + suffix, finding.state, finding.advice))
    return merged


def _rank_list(ranks: list[int]) -> str:
    more = " ..." if len(ranks) > 8 else ""
    return f" (rank {', '.join(map(str, ranks[:8]))}{more})"


def _leading_number(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return 0.0
