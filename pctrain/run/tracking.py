"""Curves for people to look at while a run goes on: TensorBoard events, and Weights & Biases where it is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.tree import Config


def check(config: Config) -> None:
    """Raises UserError where the config asks for a package that is not installed."""
    if config.run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb = {config.run.wandb}, but wandb is not installed: pip install wandb, or leave run.wandb out"
        )


class Trackers:
    """Writes numbers as `<kind>/<key>` over the steps. What `run.*` does not ask for costs nothing, not even an import."""

    def __init__(self, path: Path, config: Config, purge_step: int | None):
        """`purge_step`: TensorBoard hides what an earlier start of this run wrote at this step and later ones."""
        self._tensorboard = self._wandb = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and not needed by readers

            self._tensorboard = SummaryWriter(str(path), purge_step=purge_step)
        if config.run.wandb is not None:
            self._wandb = _start_wandb(path, config)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Values that are no numbers are passed over."""
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def flush(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(path: Path, config: Config) -> Any:
    """One W&B run for one run folder, however often it is started. It is set up by W&B's own variables (WANDB_MODE=offline, ...)."""
    import wandb

    run = wandb.init(
        project=config.run.wandb,
        name=path.name,
        id=hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(path),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off"),
    )
    # An axis of our own: W&B's counter only rises, and a resumed run goes back to its checkpoint.
    run.define_metric("*", step_metric="step")
    return run
