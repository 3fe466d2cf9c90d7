"""Findings of `pctrain doctor`, and how those of several ranks become one list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

GB = 1 << 30
State = Literal["ok", "note", "wrong"]
UNLIKE_STOPS = ("torch", "NCCL")  # ranks that differ in these may wait for each other without an end


@dataclass(frozen=True)
class Finding:
    """The result of one check, and advice for a result that is not ok.

    Attributes:
        check: what was checked.
        result: what was found.
        state: ok, note (a run works, but slower or otherwise than expected) or wrong.
        advice: what was expected, and what to do.
        across: "same" if the ranks must have the same result, "distinct" if no two of them may.
        stops: True if the ranks cannot be connected with it, so that nothing is measured.
    """

    check: str
    result: str
    state: State = "ok"
    advice: str = ""
    across: Literal["any", "same", "distinct"] = "any"
    stops: bool = False


def combined(by_rank: Sequence[list[Finding]], hosts: Sequence[str] = ()) -> list[Finding]:
    """Merge the findings of all ranks. `hosts` are the ranks' host names.

    A finding that all ranks share is listed once. Figures that differ become a range. Other differences are listed
    with the ranks that they belong to. Results that must agree, and do not, are one wrong finding; so are results that
    must differ, and do not.
    """
    by_check: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in dict.fromkeys(findings):
            by_check.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    merged = []
    for ranks_of in by_check.values():
        across = next(iter(ranks_of)).across
        if across == "same":
            merged += _same(ranks_of, hosts)
        elif across == "distinct":
            merged += _distinct(ranks_of, hosts)
        else:
            merged += _any(ranks_of, len(by_rank))
    return merged


def _any(ranks_of: dict[Finding, list[int]], world: int) -> list[Finding]:
    if len(ranks_of) > 1 and all(finding.state == "ok" for finding in ranks_of):
        results = [finding.result for finding in ranks_of]
        lowest, highest = min(results, key=_leading_number), max(results, key=_leading_number)
        return [Finding(next(iter(ranks_of)).check, f"{lowest} to {highest} over the ranks")]
    return [
        replace(finding, result=finding.result + (f" ({_ranks(ranks)})" if len(ranks) < world else ""))
        for finding, ranks in ranks_of.items()
    ]


def _same(ranks_of: dict[Finding, list[int]], hosts: Sequence[str]) -> list[Finding]:
    if len(ranks_of) == 1:
        return list(ranks_of)
    check = next(iter(ranks_of)).check
    results = "; ".join(f"{finding.result} on {_places(ranks, hosts)}" for finding, ranks in ranks_of.items())
    own = [finding.advice for finding in ranks_of if finding.state == "wrong"]
    advice = (
        "all ranks need the same: use one environment on a shared file system, or run launch/setup.sh on every node"
    )
    stops = check in UNLIKE_STOPS or any(finding.stops for finding in ranks_of)
    return [Finding(check, results, "wrong", "; ".join([advice, *dict.fromkeys(own)]), stops=stops)]


def _distinct(ranks_of: dict[Finding, list[int]], hosts: Sequence[str]) -> list[Finding]:
    shared = [
        replace(finding, result=f"{finding.result} belongs to {_places(ranks, hosts)}", state="wrong", stops=True)
        for finding, ranks in ranks_of.items()
        if len(ranks) > 1
    ]
    if shared or len(ranks_of) == 1:
        return shared or list(ranks_of)
    return [Finding(next(iter(ranks_of)).check, f"{len(ranks_of)} different ones")]


def _places(ranks: list[int], hosts: Sequence[str]) -> str:
    names = ", ".join(_first(dict.fromkeys(hosts[rank] for rank in ranks))) if hosts else ""
    return f"{names} ({_ranks(ranks)})" if names else _ranks(ranks)


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(_first(map(str, ranks)))}"


def _first(items: Iterable[str]) -> list[str]:
    listed = list(items)
    return [*listed[:8], "..."] if len(listed) > 8 else listed


def _leading_number(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return 0.0
