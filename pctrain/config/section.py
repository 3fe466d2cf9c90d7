"""The base class of every section of the config tree, and of the options of a command."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of options. Unknown keys are errors, and values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)
