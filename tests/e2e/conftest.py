import pytest

from tests.helpers import tiny


def _sft(folder):
    return tiny.cli("sft", *tiny.OPTIONS, f"--run.dir={folder}", "--sft.eval_every=0")


@pytest.fixture(scope="session")
def sft_run(ranks, tmp_path_factory):
    """A finished SFT run with its data and model."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    [(status, errors)] = ranks.run(_sft, folder, world=1, deadline=240)
    assert status == 0, errors
    return folder
