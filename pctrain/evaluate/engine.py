"""One rollout engine for all models of an evaluation: it starts with one and takes the others by weight updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pctrain.common.device import DTYPES
from pctrain.common.errors import UserError
from pctrain.config.tree import Config
from pctrain.core import session
from pctrain.distributed.health import watchdog
from pctrain.evaluate.targets import Target
from pctrain.hf.config import HFConfig
from pctrain.hf.weight_files import HFReader
from pctrain.hf.weight_names import EMBEDDING, LM_HEAD, is_constant
from pctrain.rollout import RolloutEngine
from pctrain.run import checkpoints

if TYPE_CHECKING:
    from pctrain.core import Learner


def common_architecture(targets: Sequence[Target]) -> HFConfig:
    """Return the config that all models share. Raises UserError naming what differs, if one differs from the first."""
    first = HFConfig.read(targets[0].hf_dir)
    for target in targets[1:]:
        other = HFConfig.read(target.hf_dir)
        differences = [
            f"{field.name} {getattr(first, field.name)} and {getattr(other, field.name)}"
            for field in fields(first)
            if getattr(first, field.name) != getattr(other, field.name)
        ]
        if differences:
            raise UserError(
                f"{targets[0].path} and {target.path} are of two architectures ({', '.join(differences)}): one engine "
                "cannot hold both; evaluate them in two calls"
            )
    return first


class SharedEngine:
    """A rollout engine that holds one model after the other. A context manager; every method is collective."""

    def __init__(self, config: Config, hf: HFConfig, context: int, eos_id: int) -> None:
        """Prepare an engine that starts at its first use.

        Args:
            config: the evaluation's config.
            hf: the architecture of all models.
            context: longest prompt and response, in tokens; a short one leaves more of the KV cache to each sequence.
            eos_id: the token that ends a response.
        """
        self._config = config
        self._hf = hf
        self._context = context
        self._eos_id = eos_id
        self._engine: RolloutEngine | None = None
        self._learner: Learner | None = None
        self._held: Target | None = None

    @watchdog.phase("swap")
    def load(self, target: Target) -> RolloutEngine:
        """Return the engine with this model's weights."""
        if self._engine is None:
            self._engine = RolloutEngine(
                target.hf_dir,
                self._config.rollout,
                dtype=self._config.model.dtype,
                context=self._context,
                eos_id=self._eos_id,
            )
            self._held = target if target.checkpoint is None else None
        if self._held != target:
            self._engine.sleep()  # before the learner is built, or loads another checkpoint, in the same GPU's memory
            self._engine.load_weights(self._weights(target))
            self._held = target
        return self._engine

    def _weights(self, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
        if target.checkpoint is None:
            return hf_weights(target.hf_dir, DTYPES[self._config.model.dtype], self._hf.tied)
        from pctrain.core import Learner, checkpoint  # takes seconds, and Hugging Face directories do not need it

        session.verify(target.checkpoint, checkpoints.damaged_start)
        if self._learner is None:
            model = self._config.model.resolved(target.hf_dir, target.checkpoint)
            self._learner = Learner(
                model, self._config.parallel, optimizer_config=None, total_steps=1, seed=self._config.run.seed
            )
        else:
            checkpoint.load_weights(target.checkpoint, self._learner.chunks)
        return self._learner.hf_weights()

    def __enter__(self) -> SharedEngine:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if self._engine is not None:
            self._engine.close_after(error)


def hf_weights(hf_dir: Path, dtype: torch.dtype, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) of a Hugging Face directory, with a tied head after the embedding."""
    with HFReader(hf_dir) as reader:
        for name in reader.files:
            if is_constant(name) or (tied and name == LM_HEAD):
                continue
            tensor = reader[name][:].to(dtype)
            yield name, tensor
            if tied and name == EMBEDDING:
                yield LM_HEAD, tensor.clone()
