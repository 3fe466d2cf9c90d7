import pytest

from core import small


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    """{tied: Hugging Face directory}."""
    folder = tmp_path_factory.mktemp("models")
    return {tied: small.hf_dir(folder / f"tied-{tied}", tied=tied) for tied in (True, False)}
