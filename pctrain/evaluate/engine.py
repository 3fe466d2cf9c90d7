"""One rollout engine for all models of a call: started with the first, the others' weights swapped in where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pctrain.common.device import DTYPES
from pctrain.common.errors import ToBeContinued, UserError
from pctrain.config.tree import Config
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.targets import Target
from pctrain.hf.config import HFConfig
from pctrain.hf.weight_files import HFReader
from pctrain.rollout import RolloutEngine
from pctrain.rollout.weight_stream import LM_HEAD
from pctrain.run import checkpoints, resume

if TYPE_CHECKING:
    from pctrain.core import Learner

EMBEDDING = "model.embed_tokens.weight"


def one_architecture(targets: Sequence[Target]) -> HFConfig:
    """What all models are. UserError naming what differs, where one is another one than the first."""
    first = HFConfig.read(targets[0].hf_dir)
    for target in targets[1:]:
        other = HFConfig.read(target.hf_dir)
        apart = [
            f"{f.name} {getattr(first, f.name)} and {getattr(other, f.name)}"
            for f in fields(first)
            if getattr(first, f.name) != getattr(other, f.name)
        ]
        if apart:
            raise UserError(
                f"{targets[0].path} and {target.path} are of two architectures ({', '.join(apart)}): one engine cannot hold "
                "both; evaluate them in two calls"
            )
    return first


class Engine:
    """A context manager. Every method is collective.

    context: longest prompt and response, tokens; a short one leaves more of the KV cache to each sequence.
    """

    def __init__(self, config: Config, hf: HFConfig, context: int):
        self._config, self._hf, self._context = config, hf, context
        self._engine: RolloutEngine | None = None
        self._core: Learner | None = None
        self._held: Target | None = None

    @watchdog.phase("swap")
    def holding(self, target: Target) -> RolloutEngine:
        """The engine with this model's weights."""
        if self._engine is None:
            self._engine = RolloutEngine(
                target.hf_dir,
                self._config.rollout,
                dtype=self._config.model.dtype,
                context=self._context,
                eos_id=self._hf.eos_id,
            )
            self._held = target if target.checkpoint is None else None
        if self._held != target:
            self._engine.load_weights(self._weights(target))
            self._held = target
        return self._engine

    def _weights(self, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
        if target.checkpoint is None:
            return hf_weights(target.hf_dir, DTYPES[self._config.model.dtype], self._hf.tied)
        from pctrain.core import Learner, checkpoint  # seconds, which Hugging Face directories do not need

        resume.verify(target.checkpoint, checkpoints.damaged_start)
        if self._core is None:
            model = self._config.model.model_copy(update={"path": target.hf_dir, "checkpoint": target.checkpoint})
            self._core = Learner(
                model, self._config.parallel, optimizer_config=None, total_steps=1, seed=self._config.run.seed
            )
        else:
            checkpoint.load_weights(target.checkpoint, self._core.chunks)
        return self._core.hf_weights()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if self._engine is not None and may_close(error):
            self._engine.close()


def may_close(error: BaseException | None) -> bool:
    """Whether an engine may be closed, which is collective: after a fault of one rank the others are elsewhere."""
    alone = isinstance(error, Exception) and not isinstance(error, (UserError, ToBeContinued))
    return not alone or parallel.world_size() == 1


def hf_weights(hf_dir: Path, dtype: torch.dtype, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor) of a Hugging Face directory in the order that an engine wants: a tied head comes after the embedding."""
    with HFReader(hf_dir) as reader:
        for name in reader.files:
            if name.endswith("rotary_emb.inv_freq") or (tied and name == LM_HEAD):
                continue
            tensor = reader[name][:].to(dtype)
            yield name, tensor
            if tied and name == EMBEDDING:
                yield LM_HEAD, tensor.clone()
