"""What all tests share: an environment set before torch is imported, and ranks that stay alive (`ranks`)."""

import os
import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before anything imports torch. CUDA_VISIBLE_DEVICES="" hides GPUs: set it yourself to run the tests with one.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from ranks import Ranks  # noqa: E402

# The same examples every time, and no deadline a busy machine could miss: a red test means a changed program.
settings.register_profile("pctrain", deadline=None, derandomize=True)
settings.load_profile("pctrain")


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(fn, *args, world=2, deadline=120)`: a module-level function on 1, 2 or 4 gloo ranks; the results by rank."""
    pools = Ranks()
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    """{tied: Hugging Face directory} of the small model of core/small.py."""
    from core import small

    folder = tmp_path_factory.mktemp("models")
    return {tied: small.hf_dir(folder / f"tied-{tied}", tied=tied) for tied in (True, False)}
