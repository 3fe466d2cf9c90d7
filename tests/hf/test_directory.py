"""Hugging Face directories: one EOS token for all, and headers without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from pctrain.common.errors import UserError
from pctrain.hf.config import read_raw, set_dtype
from pctrain.hf.tokenizer import Tokenizer


@pytest.fixture
def directory(tmp_path):
    vocabulary = {"a": 0, "</s>": 1, "<|eot|>": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eot|>"}}))
    return tmp_path


@pytest.mark.parametrize("config_ids, known", [([1, 2], [1, 2]), (1, [1]), (None, []), ([True, -1, 2], [2])])
def test_the_tokenizer_decides_the_eos_token_and_the_models_ones_are_known(directory, config_ids, known):
    (directory / "config.json").write_text(json.dumps({"eos_token_id": config_ids}))
    tokenizer = Tokenizer(directory)
    assert tokenizer.eos_id == 2 and tokenizer.model_eos_ids == known


def test_headers_are_read_without_torch(tmp_path):
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    program = (
        "import sys; from pathlib import Path; from pctrain.hf.weight_files import HFReader\n"
        f"assert list(HFReader(Path({str(tmp_path)!r})).files) == ['w']"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_set_dtype_keeps_everything_else(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32", "vocab_size": 3}')
    set_dtype(tmp_path, "bfloat16")
    assert read_raw(tmp_path) == {"torch_dtype": "bfloat16", "vocab_size": 3}
    with pytest.raises(UserError, match=r"config.json: not found. model.path must be a Hugging Face directory"):
        read_raw(tmp_path / "nowhere")
