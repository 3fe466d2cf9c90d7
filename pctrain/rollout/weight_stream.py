"""Checks on the weights that the learner sends to vLLM.

vLLM itself only warns about an incomplete update, and then samples from half-old weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pctrain.common.errors import UserError
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import is_hf_directory
from pctrain.hf.weight_files import HFReader
from pctrain.hf.weight_names import EMBEDDING, LM_HEAD


def expected_weights(hf_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a weight update must bring, from the safetensors headers of `hf_dir`.

    With tied embeddings `lm_head.weight` is one of them, though the files leave it out, because without it vLLM's head
    would keep its old weights.
    """
    if not is_hf_directory(hf_dir) or not any(hf_dir.glob("*.safetensors")):
        raise UserError(
            f"{hf_dir}: expected a Hugging Face directory with config.json and *.safetensors; "
            "save the model with save_pretrained(..., safe_serialization=True)"
        )
    with HFReader(hf_dir) as reader:
        shapes = reader.shapes()
    if HFConfig.read(hf_dir).tied:
        shapes[LM_HEAD] = shapes[EMBEDDING]
    return shapes


class CheckedStream:
    """Passes (Hugging Face name, tensor) on to vLLM, and refuses what would end in wrong weights without an error.

    * a name or shape that the model does not have, a name twice, and (in `finish`) a name that did not come;
    * a tensor in the storage of an earlier one: vLLM keeps tensors until their layer is complete, so a reused buffer
      would change under it.
    """

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]], expected: dict[str, tuple[int, ...]]):
        self._stream = stream
        self._expected = expected
        self._seen: set[str] = set()
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        # Address -> (name, reference) of tensors that vLLM or the learner may still hold.
        alive: dict[int, tuple[str, weakref.ref]] = {}
        for name, tensor in self._stream:
            self._check_name_and_shape(name, tensor)
            owner, reference = alive.get(tensor.data_ptr(), ("", None))
            if reference is not None and reference() is not None:
                raise ValueError(
                    f"weight update: {name!r} shares the storage of {owner!r}; each tensor of the stream needs its own"
                )
            alive[tensor.data_ptr()] = (name, weakref.ref(tensor))
            self._seen.add(name)
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    def _check_name_and_shape(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._expected:
            raise UserError(
                f"weight update: the learner sent {name!r}, which the rollout engine's model does not have. "
                "Start the engine from the learner's own Hugging Face directory"
            )
        if name in self._seen:
            raise UserError(f"weight update: the learner sent {name!r} twice")
        if tuple(tensor.shape) != self._expected[name]:
            raise UserError(
                f"weight update: {name!r} has shape {tuple(tensor.shape)}, "
                f"the rollout engine's model expects {self._expected[name]}"
            )

    def finish(self) -> None:
        """Check, after the last tensor, that none is missing; UserError names those that are."""
        missing = [name for name in self._expected if name not in self._seen]
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"weight update: {len(missing)} of {len(self._expected)} tensors did not come: {listed}; "
                "the rollout engine's weights are incomplete and must not be sampled from"
            )
