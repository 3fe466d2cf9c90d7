"""The files that a path names, and their chunks: wherever a file is cut, its chunks give what one pass gives."""

import gzip
import json
import pickle

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.records import Fault, Record
from pctrain.data.sources import content_hash, iter_raw, iter_records, list_files, read_chunk, read_records, split_file
from pctrain.files.durable import fingerprint

datasets.disable_progress_bars()

# What could be cut wrongly: blank lines, line ends of two kinds, characters that str.splitlines cuts at, several bytes
# a character.
LINES = st.one_of(
    st.just(b""),
    st.just(b"  "),
    st.just(b"{"),
    st.just(b"\xff\xfe"),
    st.just(b'{"prompt":\r"p"}'),
    st.text(alphabet='aé\u2028\x85\U0001f600 \\"', max_size=12).map(
        lambda text: json.dumps({"prompt": text, "response": "r"}, ensure_ascii=False).encode()
    ),
)
CONTENTS = st.tuples(
    st.booleans(), st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=12), LINES
).map(lambda parts: (b"\xef\xbb\xbf" if parts[0] else b"") + b"".join(line + end for line, end in parts[1]) + parts[2])


def naive(path, content):
    """The same by one loop over all lines."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            prompt = json.loads(line.decode())["prompt"] if line.strip() else None
        except ValueError:
            yield number, "fault"
            continue
        if prompt is not None:
            yield number, prompt if prompt.strip() else "fault"


def in_parts(path, size):
    for chunk in split_file(path, size):
        for record in read_chunk(pickle.loads(pickle.dumps(chunk)), FieldsConfig(), ()):
            place = record.where if isinstance(record, Fault) else record.id
            yield int(place.rpartition(":")[2]), "fault" if isinstance(record, Fault) else record.prompt


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS, size=st.integers(1, 200))
def test_parts_of_any_size_give_what_one_loop_gives(tmp_path, suffix, content, size):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content if suffix == ".jsonl" else gzip.compress(content))
    assert list(in_parts(path, size)) == list(naive(path, content))


def test_parts_are_bounded_and_the_same_each_time(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * (i % 90)}) + "\n" for i in range(2000)))
    parts = list(split_file(path, 1000))
    assert parts == list(split_file(path, 1000)) and len(parts) > 50
    assert all(part.piece.stop - part.piece.start <= 1000 + 110 for part in parts)
    assert [part.done for part in parts] == sorted({part.done for part in parts}) and parts[
        -1
    ].done == path.stat().st_size


def test_the_form_follows_from_the_first_record_that_can_be_read(tmp_path):
    path = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    path.write_text("{\n\n" + f"{json.dumps(chat)}\n" * 3)
    assert {chunk.form for chunk in split_file(path)} == {"chat"}


# ---------------------------------------------------------------- what a path names


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "deep/deeper/d.jsonl.gz", "set[1].jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"prompt": name}).encode() + b"\n"
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    datasets.Dataset.from_list([{"prompt": "of a set"}]).save_to_disk(tmp_path / "deep" / "set")
    return tmp_path


def prompts(path):
    return [record.prompt for record in iter_records(path, FieldsConfig(), ())]


def test_globs_are_sorted_and_formats_may_be_mixed(folder):
    assert prompts(folder / "[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert prompts(folder / "*.jsonl") == ["a.jsonl", "b.jsonl", "set[1].jsonl"]
    assert prompts(folder / "deep" / "*") == ["deep/c.jsonl", "of a set"]
    assert prompts(folder / "**") == [
        "a.jsonl",
        "b.jsonl",
        "deep/c.jsonl",
        "deep/deeper/d.jsonl.gz",
        "of a set",
        "set[1].jsonl",
    ]


def test_a_name_with_brackets_that_exists_is_no_pattern(folder):
    assert prompts(folder / "set[1].jsonl") == ["set[1].jsonl"]


def test_a_pattern_without_a_match_is_an_error(folder):
    with pytest.raises(UserError, match="no file matches this pattern"):
        list_files(folder / "*.parquet")
    with pytest.raises(UserError, match="matches one character"):
        list_files(folder / "set[2].jsonl")


def test_other_formats_are_refused_by_name(folder):
    (folder / "notes.txt").write_text("x")
    for path in (folder / "notes.txt", folder / "*"):
        with pytest.raises(UserError, match=r"notes.txt: expected .jsonl \(also .gz, .zst\), .parquet, or a folder"):
            list_files(path)


def test_several_files_are_one_set(folder):
    assert read_records(folder / "[ab].jsonl", FieldsConfig(), ()) == [
        Record("a.jsonl:1", "a.jsonl"),
        Record("b.jsonl:1", "b.jsonl"),
    ]


def test_raw_objects_keep_every_column_and_refuse_what_is_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "more": [1, {"x": null}]}\n\n{"other": 1}\n')
    assert list(iter_raw(path)) == [
        (f"{path}:1", {"prompt": "p", "more": [1, {"x": None}]}),
        (f"{path}:3", {"other": 1}),
    ]
    path.write_text("{}\n[]\n")
    with pytest.raises(UserError, match=r"data.jsonl:2: expected a JSON object, got a list"):
        list(iter_raw(path))


def test_what_is_needed_has_to_be_a_known_word(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p"}')
    with pytest.raises(ValueError, match="need"):
        read_records(path, FieldsConfig(), need=("solution",))


def test_the_hash_of_a_path_follows_what_it_names(folder):
    a = folder / "a.jsonl"
    assert content_hash(a) == fingerprint(a)
    for path in (folder / "*.jsonl", folder / "deep" / "set", folder / "deep" / "*"):
        before = content_hash(path)
        assert content_hash(path) == before
        for file in (folder / "new.jsonl", folder / "deep" / "new.jsonl"):
            file.write_text('{"prompt": "new"}')
        (arrow,) = (folder / "deep" / "set").glob("*.arrow")
        arrow.write_bytes(arrow.read_bytes() + b"x")
        assert content_hash(path) != before
        for file in (folder / "new.jsonl", folder / "deep" / "new.jsonl"):
            file.unlink()
    with pytest.raises(UserError, match=r"none.jsonl"):
        content_hash(folder / "none.jsonl")
