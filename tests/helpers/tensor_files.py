"""Read and compare the tensors of Hugging Face directories."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and np.array_equal(actual[name], tensor), name
