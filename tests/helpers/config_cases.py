"""Load a config that is refused, for tests of the message."""

from pathlib import Path
from typing import Any

import pytest

from pctrain.common.errors import UserError
from pctrain.config.load import load


def refusal(path: Path | None, *overrides: str, **options: Any) -> str:
    """Return the message with which `load` refuses a config."""
    with pytest.raises(UserError) as error:
        load(path, list(overrides), **options)
    return str(error.value)
