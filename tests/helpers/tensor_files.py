"""Read and compare the tensors of Hugging Face directories."""

import numpy as np
from safetensors.numpy import load_file


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
