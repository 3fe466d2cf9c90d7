"""`state.json` of a checkpoint: the values a run resumes with, besides the model. Each is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.compute.ledger import SUMS
from pctrain.files import json_file

STATE = "state.json"
_ADVICE = "Take the checkpoint from its source again"


def state_text(state: Mapping[str, Any]) -> str:
    """Return the text of state.json. `state` holds plain JSON values."""
    return json.dumps(state)


def read_state(checkpoint: Path, *needed: str) -> dict[str, Any]:
    """Return the state of a checkpoint. `needed`: keys besides the ledger that must be present.

    Raises:
        UserError: the file is missing, or no run wrote it in this form.
    """
    file = Path(checkpoint) / STATE
    if not file.exists():
        raise UserError(f"{file}: not found. Name a checkpoint of a run, RUN/checkpoints/step-N")
    state = json_file.read_object(file, _ADVICE)
    fault = _state_fault(state)
    if fault is None:
        missing = [key for key in needed if key not in state]
        fault = f"`{missing[0]}` is missing" if missing else None
    if fault is not None:
        raise UserError(f"{file}: {fault}, so no run wrote it in this form. {_ADVICE}")
    return state


def _state_fault(state: dict[str, Any]) -> str | None:
    """Return what is wrong with a state, or None."""
    for find_fault in (_ledger_fault, _prompts_fault, _validations_fault, _losses_fault, _skipped_fault):
        fault = find_fault(state)
        if fault is not None:
            return fault
    return None


def _ledger_fault(state: dict[str, Any]) -> str | None:
    ledger = state.get("ledger")
    totals = ledger.get("totals") if isinstance(ledger, dict) else None
    if not isinstance(ledger, dict) or not isinstance(totals, dict):
        return "`ledger.totals` is missing"
    if not all(isinstance(total, dict) and total.keys() >= set(SUMS) for total in totals.values()):
        return f"`ledger.totals` must have {', '.join(sorted(SUMS))} for each phase"
    numbers = [ledger.get("joint"), *(value for total in totals.values() for value in total.values())]
    return None if all(map(_is_number, numbers)) else "a number in `ledger` is missing, negative or not finite"


def _prompts_fault(state: dict[str, Any]) -> str | None:
    if "prompts" not in state:
        return None
    prompts = state["prompts"]
    if not isinstance(prompts, dict) or not isinstance(prompts.get("carried"), list):
        return "`prompts` must have `position` and `carried`"
    counts = [prompts.get("position"), *prompts["carried"]]
    return None if all(map(_is_count, counts)) else "a count in `prompts` is not a whole number"


def _validations_fault(state: dict[str, Any]) -> str | None:
    validations = state.get("validations", [])
    if not isinstance(validations, list) or not all(isinstance(e, list) and len(e) == 5 for e in validations):
        return "`validations` must be a list of lists of 5"
    if not all(_is_number(value) for entry in validations for value in entry[:4]):
        return "a number in `validations` is missing, negative or not finite"
    if not all(_is_count(entry[0]) and isinstance(entry[4], bool) for entry in validations):
        return "a step in `validations` is not a whole number, or its last entry is neither true nor false"
    return None


def _losses_fault(state: dict[str, Any]) -> str | None:
    losses = state.get("recent_losses", [])
    if not isinstance(losses, list):
        return "`recent_losses` must be a list"
    return None if all(map(_is_number, losses)) else "a number in `recent_losses` is missing, negative or not finite"


def _skipped_fault(state: dict[str, Any]) -> str | None:
    return None if _is_count(state.get("skipped_in_a_row", 0)) else "`skipped_in_a_row` is not a whole number"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that is finite, not negative, and small enough for a float."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)
