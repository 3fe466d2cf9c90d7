"""Fixtures of all tests: long-lived ranks (`ranks`), small models (`hf_dirs`) and a finished SFT run (`sft_run`)."""

import pytest
from hypothesis import settings

from tests.helpers import environment  # noqa: F401  sets the environment before anything imports torch
from tests.helpers.ranks import Ranks

# Use the same examples every time and no deadline that a busy machine could miss: a red test means a changed program.
settings.register_profile("pctrain", deadline=None, derandomize=True)
settings.load_profile("pctrain")


@pytest.fixture(scope="session")
def ranks():
    """Provide `ranks.run(fn, *args, world=2, deadline=120)`.

    It runs a module-level function on 1, 2 or 4 gloo ranks and returns the results by rank.
    """
    pools = Ranks()
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    """Return {tied: Hugging Face directory} of the small model in tests/helpers/small.py."""
    from tests.helpers import small

    folder = tmp_path_factory.mktemp("models")
    return {tied: small.hf_dir(folder / f"tied-{tied}", tied=tied) for tied in (True, False)}


@pytest.fixture(scope="session")
def sft_run(ranks, tmp_path_factory):
    """Return a finished SFT run with its data and model."""
    from tests.helpers import tiny

    folder = tmp_path_factory.mktemp("sft") / "run"
    [(status, errors)] = ranks.run(tiny.sft, folder, world=1, deadline=240)
    assert status == 0, errors
    return folder
