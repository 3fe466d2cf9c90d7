"""Reading NumPy's .npz files: no pickles, and one kind of error for everything that can be wrong with the bytes."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# What zipfile, zlib and NumPy raise for bytes that none of them wrote. MemoryError: a header promises more than there
# is.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return the named arrays. Raises FileNotFoundError, and ValueError with a readable message for a damaged file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def check(name: str, array: np.ndarray, kinds: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless an array has one of NumPy's `kinds` of dtype and this shape (None: any length)."""
    fits = len(shape) == array.ndim
    fits = fits and all(wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True))
    if array.dtype.kind not in kinds or not fits:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
