"""`pctrain data dedup`: recall and precision against exact Jaccard; the first record stays; a second run finds none."""

import random
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.data.sets.near import Sketcher, Sketches
from pctrain.data.sets.options import DedupOptions
from tests.helpers import sets_cli as cli

WORDS = ["".join(letters) for letters in product("bcdfgh", "aeiou", "lmnrst", "aeiou")]


def jaccard(one: str, other: str, n: int = 5) -> float:
    """By the definition, over word n-grams; nothing of the program in it."""
    sets = [{tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(draw: random.Random, text: str, edits: int) -> str:
    tokens = text.split()
    for _ in range(edits):
        tokens[draw.randrange(len(tokens))] = draw.choice(WORDS)
    return " ".join(tokens)


def constructed(pairs: int, edits: range) -> list[tuple[str, str]]:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=200)) for _ in range(pairs)]
    return [(text, edited(draw, text, draw.choice(edits))) for text in texts]


def test_near_duplicates_are_found_as_exact_jaccard_has_them(tmp_path):
    pairs = constructed(300, range(0, 12))
    path = cli.write(
        tmp_path / "all.jsonl",
        [
            {"id": f"{i}{side}", "prompt": text, "response": "same answer"}
            for i, pair in enumerate(pairs)
            for side, text in zip("ab", pair, strict=True)
        ],
    )
    out = tmp_path / "out.jsonl"
    cli.run("dedup", path, f"--out={out}", "--by=question")
    found = {entry["id"][:-1]: entry for entry in cli.dropped(out)}
    true = {str(i) for i, pair in enumerate(pairs) if jaccard(*pair) >= 0.8}
    assert 60 < len(true) < 240, "the constructed pairs are on both sides of the threshold"
    assert found.keys() <= true  # precision 1: every one is confirmed
    recall = len(found.keys() & true) / len(true)
    print(f"recall {recall:.4f} of {len(true)} pairs, precision 1")
    assert recall >= 0.97
    for key, entry in found.items():
        assert entry["of"]["id"] == f"{key}a" and entry["id"] == f"{key}b"  # the first stays
        if entry["reason"] == "near-duplicate":
            assert entry["similarity"] == pytest.approx(jaccard(*pairs[int(key)]), abs=1e-4)
    kept = [record["id"] for record in cli.read(out)]
    assert kept == [f"{i}{side}" for i in range(300) for side in "ab" if not (side == "b" and str(i) in found)]


def test_a_hash_accident_drops_nothing(tmp_path, monkeypatch):
    """Every text in the same bucket: what is dropped is still what exact Jaccard says."""
    monkeypatch.setattr(Sketches, "groups", lambda self: np.zeros((len(self.places()), 1), np.int32))
    pairs = constructed(20, range(0, 12))
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": text, "response": "r"} for pair in pairs for text in pair])
    cli.run("dedup", path, f"--out={tmp_path / 'out.jsonl'}", "--by=question")
    assert len(cli.dropped(tmp_path / "out.jsonl")) == sum(jaccard(*pair) >= 0.8 for pair in pairs)


@settings(max_examples=30)
@given(st.data())
def test_dedup_is_idempotent_keeps_the_order_and_names_what_stays(data):
    draw = random.Random(data.draw(st.integers(0, 10**6)))
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(4)]
    records = [
        {
            "id": str(i),
            "prompt": edited(draw, draw.choice(texts), draw.randrange(4)),
            "response": draw.choice(["yes", "Yes ", "no"]),
        }
        for i in range(data.draw(st.integers(2, 14)))
    ]
    by = data.draw(st.sampled_from(["record", "question", "trajectory"]))
    options = [
        f"--by={by}",
        f"--threshold={data.draw(st.sampled_from([0.3, 0.5, 0.8, 1.0]))}",
        f"--shingle={data.draw(st.sampled_from(['word', 'char']))}",
        f"--near={data.draw(st.sampled_from(['true', 'false']))}",
    ]
    with TemporaryDirectory() as folder:
        once, twice = Path(folder) / "once.jsonl", Path(folder) / "twice.jsonl"
        cli.run("dedup", cli.write(Path(folder) / "all.jsonl", records), f"--out={once}", *options)
        cli.run("dedup", once, f"--out={twice}", *options)
        kept, dropped = cli.read(once), cli.dropped(once)
        assert cli.read(twice) == kept and cli.dropped(twice) == []
    assert kept[0] == records[0] and kept == [record for record in records if record in kept]
    assert sorted([r["id"] for r in kept] + [d["id"] for d in dropped], key=int) == [r["id"] for r in records]
    assert {d["of"]["id"] for d in dropped} <= {r["id"] for r in kept}


def test_equal_texts_are_found_whatever_their_spacing_case_and_unicode_form(tmp_path):
    records = [
        {"prompt": "Prove\tthat  x² ≥ 0", "response": "Café"},
        {"prompt": "prove that x2 ≥ 0", "response": "cafe\u0301 "},
        {"prompt": "prove that x2 ≥ 0", "response": "other"},
    ]
    path, out = cli.write(tmp_path / "all.jsonl", records), tmp_path / "out.jsonl"
    cli.run("dedup", path, f"--out={out}", "--near=false")
    assert cli.read(out) == [records[0], records[2]]
    [entry] = cli.dropped(out)
    assert (
        entry["reason"] == "duplicate"
        and entry["where"] == f"{path}:2"
        and entry["of"] == {"where": f"{path}:1", "id": "all.jsonl:1"}
    )
    assert cli.manifest(out)["records"] == {"read": 3, "kept": 2, "dropped": {"duplicate": 1}}
    cli.run("dedup", path, f"--out={tmp_path / 'questions.jsonl'}", "--near=false", "--by=question")
    assert len(cli.read(tmp_path / "questions.jsonl")) == 1


def test_what_is_near_to_a_dropped_record_alone_stays(tmp_path):
    first = WORDS[:100]
    second, third = [*WORDS[200:205], *first[5:]], [*WORDS[200:205], *first[5:93], *WORDS[300:307]]
    texts = [" ".join(text) for text in (first, second, third)]
    assert jaccard(*texts[:2]) >= 0.8 and jaccard(*texts[1:]) >= 0.8 and jaccard(texts[0], texts[2]) < 0.8
    path = cli.write(
        tmp_path / "all.jsonl", [{"id": str(i), "prompt": text, "response": "r"} for i, text in enumerate(texts)]
    )
    cli.run("dedup", path, f"--out={tmp_path / 'out.jsonl'}", "--by=question", "--num_perm=512")
    assert [(d["id"], d["of"]["id"]) for d in cli.dropped(tmp_path / "out.jsonl")] == [("1", "0")]


def test_a_duplicate_of_what_was_dropped_as_near_names_what_stays(tmp_path):
    first = " ".join(WORDS[:100])
    near = first.replace(f" {WORDS[50]} ", " other ")
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": p, "response": "r"} for p in (first, near, near.upper())])
    cli.run("dedup", path, f"--out={tmp_path / 'out.jsonl'}")
    assert [(d["reason"], d["of"]["id"]) for d in cli.dropped(tmp_path / "out.jsonl")] == [
        ("near-duplicate", "all.jsonl:1"),
        ("duplicate", "all.jsonl:1"),
    ]


def test_inputs_and_outputs_are_safe(tmp_path):
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": "p", "response": "r"}])
    before = path.read_bytes()
    assert "would overwrite the input" in cli.refused("dedup", path, f"--out={path}")
    assert "would overwrite the input" in cli.refused("dedup", f"{tmp_path}/*.jsonl", f"--out={path}")
    assert "expected a file that ends with .jsonl" in cli.refused("dedup", path, f"--out={tmp_path / 'out.csv'}")
    assert "does not exist" in cli.refused("dedup", tmp_path / "none.jsonl", f"--out={tmp_path / 'out.jsonl'}")
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]
    cli.run("dedup", path, f"--out={tmp_path / 'out.jsonl'}")
    assert "exists already" in cli.refused("dedup", path, f"--out={tmp_path / 'out.jsonl'}")


def test_texts_are_not_kept_in_memory():
    """A sketched text leaves only its band keys and its place behind."""
    sketcher, sketches = Sketcher(DedupOptions(out="x.jsonl")), Sketches()
    for place in range(50):
        sketches.add(place, sketcher.sketch(" ".join(WORDS[place : place + 300])))
    held = sum(values.itemsize * len(values) for values in (sketches._keys, sketches._places))
    assert held == 50 * 8 * (sketcher.bands + 1)
