"""The files of a Hugging Face directory, by what they decide."""

from __future__ import annotations

from pathlib import Path

from pctrain.files.durable import fingerprint

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"


def is_hf_directory(path: Path) -> bool:
    """Return whether a path is a Hugging Face directory: a folder with config.json."""
    return (path / CONFIG).is_file()


def model_files(hf_dir: Path) -> list[Path]:
    """Return the files that decide the model and its tokenization, without the weights."""
    return [hf_dir / CONFIG, hf_dir / TOKENIZER]


def content_digests(hf_dir: Path) -> dict[str, str]:
    """Return {file name: sha256} of everything that decides the model's answers, except its chat template."""
    files = [*model_files(hf_dir), *sorted(hf_dir.glob("*.safetensors"))]
    return {file.name: fingerprint(file) for file in files}
