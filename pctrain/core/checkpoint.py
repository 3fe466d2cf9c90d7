"""Model, optimizer, schedule and RNG through megatron-core's dist_checkpointing: saved at one layout, loadable at another."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from pctrain.core import optimizer as optim
from pctrain.errors import UserError


def save(directory: Path, model, optimizer, scheduler) -> None:
    """Collective. Writes into `directory`, which must exist and be empty; completing and naming it is the run folder's part."""
    state = _sharded_state(model, optimizer, is_loading=False)
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = torch.get_rng_state()
    dist_checkpointing.save(state, str(directory), validate_access_integrity=False)


def save_weights(directory: Path, model) -> None:
    """Collective. As `save`, of the weights alone: the start of another run."""
    dist_checkpointing.save(_sharded_state(model, None, is_loading=False), str(directory), validate_access_integrity=False)


def load(directory: Path, model, optimizer=None, scheduler=None) -> None:
    """Collective. Without an optimizer: the weights alone (the start of another run)."""
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint folder such as RUN/checkpoints/step-100")
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(f"{directory}: not a pctrain checkpoint (metadata.json is missing); name a folder RUN/checkpoints/step-N")
    if optimizer is not None:
        optim.prime(optimizer)
    loaded = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(directory))
    model.module.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        optim.unshare_steps(optimizer)
        scheduler.load_state_dict(loaded["scheduler"])
        torch.set_rng_state(loaded["rng"])


def _sharded_state(model, optimizer, is_loading: bool) -> dict:
    # The fully reshardable format costs a gather over data parallel ranks and buys a resume at any TP x PP x DP.
    # (A new dict each time: megatron-core leaves its process group in it.)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    # The inner module's state, not the data parallel wrapper's: its names would carry the wrapper's prefix.
    state = {"model": model.module.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state
