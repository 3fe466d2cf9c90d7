"""Make a Python process behave as on an x86 CPU with AVX2 and without AVX-512: put this folder first in PYTHONPATH.

`launch/test.sh --avx2` runs the tests this way on a larger CPU. The environment variables limit torch, oneDNN and MKL,
and child processes inherit them. vLLM chooses its library (`_C_AVX2`, which has no shared-memory communicator) by two
functions of torch.cpu that read the CPU itself, so these are replaced as soon as torch.cpu is imported.
"""

import os
import sys
from importlib.machinery import PathFinder

os.environ.update(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")


class _TorchCpuFinder:
    """Finder that handles only torch.cpu and replaces two of its functions after loading it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(_TorchCpuFinder)
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._is_avx512_supported = module._is_avx512_bf16_supported = lambda: False

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _TorchCpuFinder)
