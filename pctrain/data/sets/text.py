r"""Comparable forms of texts, and hashes of their n-grams.

A text has two forms:

* `normal_text`: Unicode NFKC, case folded, white space collapsed. Two texts with the same form are the same text.
* `words`: NFKC and case folded. LaTeX that only sets type (`$`, `\(`, `\left`, `\,`, `\mathrm{...}`, `\text{...}`) is
removed, `\dfrac`
  becomes `\frac`, and `\cdot` and `\times` become `*`. The rest is cut into words (letters), numbers (`1,000` becomes
  `1000`, `3.14` stays whole) and the signs + - * / = < > ^ %. All other punctuation only separates. So a copy with
  other spacing, case or punctuation has the same words, but 3+4 differs from 3-4.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SIGNS = frozenset("+-*/=<>^%")
_NUMBER = re.compile(r"\d")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LATEX = re.compile(r"\\([a-z]+|[,;:!> ()\[\]])|\$")
_COMMANDS = {
    "dfrac": " frac ",
    "tfrac": " frac ",
    "cdot": " * ",
    "times": " * ",
    "ast": " * ",
    "div": " / ",
    "le": " < = ",
    "leq": " < = ",
    "ge": " > = ",
    "geq": " > = ",
}
_TYPESETTING = frozenset(
    (
        "left",
        "right",
        "big",
        "bigg",
        "displaystyle",
        "textstyle",
        "quad",
        "qquad",
        "text",
        "textbf",
        "textit",
        "mathrm",
        "mathbf",
        "mathit",
        "mathsf",
        "operatorname",
        "mbox",
        *",;:!> ()[]",
    )
)
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/=<>^%]")
_SIGNS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u2014": "-",
        "\u00d7": "*",
        "\u00b7": "*",
        "\u22c5": "*",
        "\u00f7": "/",
        "\u2264": "<=",
        "\u2265": ">=",
    }
)

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normal_text(text: str) -> str:
    """Return the normal form of a text."""
    # Case folding can undo NFKC (long s with accents). After the second NFKC, the form is its own normal form.
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def words(text: str) -> list[str]:
    """Return the words, numbers and signs of a text, as described above."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    return _WORD.findall(_THOUSANDS.sub("", _LATEX.sub(_meaning, text.casefold())))


def _meaning(command: re.Match[str]) -> str:
    name = command.group(1)
    return " " if name is None or name in _TYPESETTING else _COMMANDS.get(name, command.group())


def in_formula(word: str) -> bool:
    """Return whether a word can continue a formula: it is a sign or a number."""
    return word in SIGNS or _NUMBER.match(word) is not None


def text_key(*texts: str) -> bytes:
    """Return 16 bytes that identify the normal forms of one or several texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = normal_text(text).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def word_hashes(tokens: Sequence[str]) -> np.ndarray:
    """Return a hash of each word, uint64 [n]."""
    return np.fromiter((_word_hash(token) for token in tokens), np.uint64, len(tokens))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every n neighboring words, uint64 [len - n + 1], in order.

    It is empty for fewer than n words.
    """
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            total = total * _MULTIPLIER + hashes[offset : offset + count]
    return mix(total)


def shingles(text: str, kind: str, n: int) -> np.ndarray:
    """Return the sorted, unique hashes of a text's n-grams, uint64 [k].

    The n-grams are of its words (`kind` word), or of the characters of its normal form (char). A text of fewer than n
    words or characters has one shingle, the whole text, so only an equal text is near to it.
    """
    if kind == "word":
        units = word_hashes(words(text))
    else:
        units = mix(np.frombuffer(normal_text(text).encode("utf-32-le"), np.uint32).astype(np.uint64))
    hashes = ngram_hashes(units, n)
    if not len(hashes):
        hashes = np.array([_word_hash("\0" + normal_text(text))], np.uint64)
    return np.unique(hashes)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two results of `shingles`: shared shingles divided by all shingles."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def mix(values: np.ndarray) -> np.ndarray:
    """Return uint64 [...] in which every bit depends on every bit of the value.

    This is the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
