r"""Texts made comparable, and their n-grams as 64-bit hashes.

Two forms of a text:

* `normal_text`: Unicode NFKC, case folded, white space collapsed. Two texts with the same form are the same text.
* `words`: NFKC and case folded; LaTeX that sets but does not mean (`$`, `\(`, `\left`, `\,`, `\mathrm{...}`, `\text{...}`) goes, `\dfrac`
  is `\frac`, `\cdot` and `\times` are `*`; what is left is cut into words (letters), numbers (`1,000` is `1000`, `3.14` stays whole)
  and the signs + - * / = < > ^ %. All other punctuation separates and is gone: what was copied with other spacing, case or punctuation has
  the same words, and 3+4 is not 3-4.
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
    # Case folding can undo NFKC and the other way round (long s with accents): the second NFKC makes the form its own normal form.
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def words(text: str) -> list[str]:
    """The words, numbers and signs of a text; see above."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    return _WORD.findall(_THOUSANDS.sub("", _LATEX.sub(_meaning, text.casefold())))


def _meaning(command: re.Match[str]) -> str:
    name = command.group(1)
    return " " if name is None or name in _TYPESETTING else _COMMANDS.get(name, command.group())


def in_formula(word: str) -> bool:
    """Whether a formula goes on with this word: a sign or a number."""
    return word in SIGNS or _NUMBER.match(word) is not None


def text_key(*texts: str) -> bytes:
    """16 bytes that name the normal form of one or several texts: equal where all of them are the same text."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = normal_text(text).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def word_hashes(tokens: Sequence[str]) -> np.ndarray:
    """uint64 [n], a hash of each word."""
    return np.fromiter((_word_hash(token) for token in tokens), np.uint64, len(tokens))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len - n + 1], a hash of every n neighbours, in order; empty where there are fewer than n."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            total = total * _MULTIPLIER + hashes[offset : offset + count]
    return mixed(total)


def shingles(text: str, kind: str, n: int) -> np.ndarray:
    """uint64 [k], sorted and each once: the n-grams of a text's words (`kind` word) or of the characters of its normal form (char).

    A text of fewer than n words or characters has one shingle, the whole of it, so that it is near to its equals alone.
    """
    if kind == "word":
        units = word_hashes(words(text))
    else:
        units = mixed(np.frombuffer(normal_text(text).encode("utf-32-le"), np.uint32).astype(np.uint64))
    found = ngram_hashes(units, n)
    if not len(found):
        found = np.array([_word_hash("\0" + normal_text(text))], np.uint64)
    return np.unique(found)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared shingles by all shingles of two sets from `shingles`, 0 to 1."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 [...], every bit of the result depending on every bit of the value: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
