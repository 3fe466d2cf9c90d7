"""How valid inputs become hostile: trees of plain values, edited by their structure; and bytes, edited blindly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Written in place of these texts (with their quotes) by `json_text`: what json.dumps does not write.
HUGE, DEEP, LONG = "@HUGE@", "@DEEP@", "@LONG@"
_WRITTEN = {f'"{HUGE}"': "9" * 5000, f'"{DEEP}"': "[" * 3000 + "]" * 3000, f'"{LONG}"': '"' + "x" * 100_000 + '"'}
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff x",
    "\x1b[31m",
    "[bold]x[/",
    "[/]",
    "\u2028",
    "\u0085",
    "é" * 3,
    "💥",
    "٣",
    "²",
    "../../etc",
    "/",
    "~",
    "NaN",
    "1e5",
    "-1",
    "null",
    "true",
    "{",
    "}",
    "%s",
    "\\boxed{",
    "\\boxed{1}",
    "x" * 3000,
    "a,b",
    "=1",
]
ODD_NUMBERS = [
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    HUGE,
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    *ODD_NUMBERS,
    *ODD_TEXTS,
    LONG,
    DEEP,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, "a", {}],
    {"a": {"b": 1}},
    [{}],
    "2020-01-01",
]


def json_text(tree: Any) -> bytes:
    text = json.dumps(tree)
    for mark, written in _WRITTEN.items():
        text = text.replace(mark, written)
    return text.encode()


@st.composite
def edited_trees(draw: st.DrawFn, tree: Any, most: int = 3, values: list[Any] = ODD_VALUES) -> Any:
    """Return a copy of `tree` (dicts, lists, scalars) with up to `most` changes.

    A change replaces a value, removes, renames or adds a key, or repeats an item.
    """
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(0, most))):
        places = list(_places(root))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        edit = draw(st.sampled_from(["odd", "odd", "odd", "drop", "twice", "rename", "wrap", "swap"]))
        if edit == "drop" and holder is not root:
            del holder[key]
        elif edit == "twice" and isinstance(holder, list) and holder is not root:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif edit == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*ODD_TEXTS, key.upper(), key + "s", "id", "messages", "step"]))] = holder.pop(
                key
            )
        elif edit == "wrap":
            holder[key] = draw(st.sampled_from([lambda x: [x], lambda x: {"a": x}, lambda x: [x, x], str]))(holder[key])
        elif edit == "swap":
            other, name = places[draw(st.integers(0, len(places) - 1))]
            if (
                other is not root and holder is not root and name in range(len(other))
                if isinstance(other, list)
                else name in other
            ):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(values)))
    return root[0]


def _places(node: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """(container, key) of everything below `node`; of a long list its ends alone."""
    found: list[tuple[Any, Any]] = []
    todo = [node]
    while todo and len(found) < most:
        holder = todo.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                todo.append(holder[key])
    return found


_PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\n",
    b"\r\n",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"-",
    b"\\",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"A" * 64,
    b"\0" * 64,
    b"\x80",
    b"&a ",
    b"*a ",
    b"!!",
    b"<<: ",
]


@st.composite
def edited_bytes(draw: st.DrawFn, data: bytes, least: int = 0, most: int = 3) -> bytes:
    """`data` with `least` to `most` blind changes: cut off, bits turned, pieces put in, taken out, doubled."""
    for _ in range(draw(st.integers(least, most))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 1, 2, 4, 16, 200]))
        edit = draw(st.sampled_from(["turn", "turn", "put", "over", "take", "double", "cut", "random"]))
        if edit == "turn" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif edit == "put":
            data = data[:at] + draw(st.sampled_from(_PIECES)) + data[at:]
        elif edit == "over":
            piece = draw(st.sampled_from(_PIECES))
            data = data[:at] + piece + data[at + len(piece) :]
        elif edit == "take":
            data = data[:at] + data[at + length :]
        elif edit == "double":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif edit == "random":
            piece = draw(st.binary(min_size=1, max_size=8))
            data = data[:at] + piece + data[at + len(piece) :]
        else:
            data = data[:at]
    return data


@st.composite
def json_files(
    draw: st.DrawFn, tree: Any, write: Callable[[Any], bytes] = json_text, values: list[Any] = ODD_VALUES
) -> bytes:
    """The bytes of a JSON file: mostly with its structure edited, sometimes its bytes, sometimes both."""
    data = write(draw(edited_trees(tree, values=values)))
    return draw(edited_bytes(data)) if draw(st.integers(0, 3)) == 0 else data
