"""Live curves of a run: TensorBoard events, and Weights & Biases if it is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.tree import RunConfig


def check(settings: RunConfig) -> None:
    """Raise UserError if the config asks for a package that is not installed."""
    if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb = {settings.wandb}, but wandb is not installed: pip install wandb, or leave run.wandb out"
        )


class Trackers:
    """Writers of numbers as `<kind>/<key>` over the steps. Trackers that `run.*` does not name are not imported."""

    def __init__(self, path: Path, settings: RunConfig, config: Mapping[str, Any], purge_step: int | None) -> None:
        """Open the trackers of a run.

        Args:
            path: the run folder.
            settings: the `run` section.
            config: the whole config in plain values, which W&B shows.
            purge_step: TensorBoard hides what an earlier start of this run wrote at this step and later ones.
        """
        self._tensorboard: Any = None
        self._wandb: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and readers do not need it

            self._tensorboard = SummaryWriter(str(path), purge_step=purge_step)
        if settings.wandb is not None:
            self._wandb = _start_wandb(path, settings.wandb, config)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write the values of one step. Values that are not numbers are skipped."""
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def flush(self) -> None:
        """Bring TensorBoard's events to the file."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(path: Path, project: str, config: Mapping[str, Any]) -> Any:
    """Start or resume the W&B run of a run folder. W&B's own variables set it up (WANDB_MODE=offline, ...)."""
    import wandb

    run = wandb.init(
        project=project,
        name=path.name,
        id=hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(path),
        config=dict(config),
        settings=wandb.Settings(console="off"),
    )
    # An axis of our own: W&B's counter only rises, and a resumed run returns to its checkpoint.
    run.define_metric("*", step_metric="step")
    return run
