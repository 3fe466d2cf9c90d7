"""Fixtures that the tests of templates and of masks share."""

import pytest

from tests.helpers import chat_models


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """{name: directory with the chat template of a published model}"""
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_models.make(folder / name, name) for name in chat_models.MODELS}


@pytest.fixture(scope="session")
def transformers_tokenizers(directories):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(directory) for name, directory in directories.items()}
