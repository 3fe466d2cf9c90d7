"""Sampling seeds that depend on what is sampled and on nothing else."""

from __future__ import annotations

import hashlib
import json


def sampling_seed(run_seed: int, purpose: str, step: int, prompt: str | int, sample: int) -> int:
    """Return the seed of one sample, 0 <= seed < 2**62: the same on every rank, in every process, after every resume.

    Args:
        run_seed: `run.seed`.
        purpose: keeps training, evaluation and checks apart.
        step: of the run.
        prompt: id or index of the record.
        sample: counts within a prompt.
    """
    key = json.dumps([run_seed, purpose, step, prompt, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2
