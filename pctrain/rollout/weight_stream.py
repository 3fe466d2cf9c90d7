"""Checks on the weights that go from the learner to vLLM. vLLM itself only warns, and then samples from half-old weights."""

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
    """Name and shape of every tensor a swap has to bring, from the safetensors headers of `hf_dir`.

    With tied embeddings `lm_head.weight` is among them, though the files leave it out: vLLM's head keeps its old weights without it.
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
    """Passes (hf_name, tensor) on to vLLM and refuses what would end in wrong weights without an error.

    * a name or shape that the model does not have, a name twice, and (in `finish`) a name that did not come;
    * a tensor in the storage of an earlier one: vLLM keeps tensors until their layer is complete, so a reused buffer changes under it.
    """

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]], expected: dict[str, tuple[int, ...]]):
        self._stream = stream
        self._expected = expected
        self._seen: set[str] = set()
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        alive: dict[
            int, tuple[str, weakref.ref]
        ] = {}  # address -> who lives there, while vLLM or the learner still holds it
        for name, tensor in self._stream:
            if name not in self._expected:
                raise UserError(
                    f"weight swap: the learner sent {name!r}, which the rollout engine's model does not have; "
                    "the engine must be made from the learner's own Hugging Face directory"
                )
            if name in self._seen:
                raise UserError(f"weight swap: the learner sent {name!r} twice")
            if tuple(tensor.shape) != self._expected[name]:
                raise UserError(
                    f"weight swap: {name!r} has shape {tuple(tensor.shape)}, "
                    f"the rollout engine's model expects {self._expected[name]}"
                )
            owner, reference = alive.get(tensor.data_ptr(), ("", None))
            if reference is not None and reference() is not None:
                raise ValueError(
                    f"weight swap: {name!r} lies in the storage of {owner!r}; each tensor of the stream needs its own"
                )
            alive[tensor.data_ptr()] = (name, weakref.ref(tensor))
            self._seen.add(name)
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    def finish(self) -> None:
        """After the last tensor: UserError naming what did not come."""
        missing = [name for name in self._expected if name not in self._seen]
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"weight swap: {len(missing)} of {len(self._expected)} tensors did not come: {listed}; "
                "the rollout engine's weights are incomplete and must not be sampled from"
            )
