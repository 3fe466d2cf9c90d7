"""Memory of building and of reading tokenised data does not grow with the data."""

import importlib.util
from pathlib import Path

import pytest

from tests.helpers import chat_models

MB = 1 << 20
_spec = importlib.util.spec_from_file_location("tokenise", Path(__file__).parents[2] / "benchmarks" / "tokenise.py")
tokenise = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tokenise)


def peaks(tmp_path, hf_dir, count, *, words, workers, chunk_bytes):
    """Bytes of memory of a process that builds and of one that reads, and bytes of text and of tokens."""
    file = tokenise.write_trajectories(tmp_path / f"{count}.jsonl", count, words=words)
    built = tokenise.measure("build", tmp_path / "cache", hf_dir, file, workers, chunk_bytes)
    read = tokenise.measure("read", built["folder"], 64)
    assert built["records"] == count and read["tokens"] > 0.9 * built["tokens"] * (count // 64 * 64) / count
    return built["peak"], read["peak"], file.stat().st_size, 2 * built["tokens"]


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_follow_the_data(tmp_path, workers):
    hf_dir = chat_models.make(tmp_path / "model", "chatml")
    small, large = (
        peaks(tmp_path, hf_dir, count, words=56, workers=workers, chunk_bytes=100_000) for count in (2000, 10_000)
    )
    growth_built, growth_read, more_text, more_tokens = (b - a for a, b in zip(small, large, strict=True))
    print(
        f"workers {workers}: {growth_built / MB:.2f} MB more to build from {more_text / MB:.1f} MB more of text, "
        f"{growth_read / MB:.2f} MB more to read {more_tokens / MB:.1f} MB more of tokens"
    )
    # The index takes 28 bytes a record when it is read, and lists of numbers a few hundred while it is joined.
    assert growth_built < more_text / 2 and growth_read < more_tokens / 4
    assert large[0] < 1.1 * small[0] and large[1] < 1.1 * small[1]


@pytest.mark.full
def test_memory_is_the_same_at_10_and_at_100_thousand_trajectories_of_1000_tokens(tmp_path):
    hf_dir = chat_models.make(tmp_path / "model", "chatml")
    small, large = (
        peaks(tmp_path, hf_dir, count, words=120, workers=2, chunk_bytes=8 * MB) for count in (10_000, 100_000)
    )
    for name, a, b in zip(("build", "read"), small, large, strict=True):
        print(f"{name}: {a / MB:.0f} MB at 10,000, {b / MB:.0f} MB at 100,000")
        index = 28 * 90_000 if name == "read" else 0  # bytes a record: it is held whole, and its process is of 33 MB
        assert b - index < 1.1 * a and b < 2 << 30
    assert large[3] > 190e6  # 100 million tokens of 2 bytes
