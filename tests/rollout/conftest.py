import pytest

from tests.helpers import tiny_llama


@pytest.fixture(scope="session")
def tiny():
    """The module of tiny Llama models: tiny.build, tiny.oracle, tiny.stream."""
    return tiny_llama
