"""Fixtures of the config tests: one rank, and a config file to write."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
