"""Every format gives back what was written; broken files are named; memory does not grow with the size of a file."""

import gzip
import io
import json
import math
import subprocess
import sys
from datetime import date

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.records import Fault, Message, Record
from pctrain.data.sources import (
    iter_raw,
    iter_records,
    list_disk_files,
    list_files,
    read_chunk,
    read_records,
    split_file,
)
from pctrain.data.tables import GroupPart, RowGroups
from pctrain.data.writing import write_records

datasets.disable_progress_bars()
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ROWS = [
    {
        "prompt": f"q{i}\u2028é",
        "response": "r" * i,
        "answer": i,
        "more": {"list": [{"a": i, "b": None}, {"a": None, "b": "x"}], "n": i / 4},
    }
    for i in range(2500)
]


def objects(path):
    return [value for _, value in iter_raw(path)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_round_trip_is_equal(tmp_path, suffix):
    path = tmp_path / f"new/data{suffix}"
    assert write_records(path, iter(ROWS)) == len(ROWS)
    assert objects(path) == ROWS
    first = path.read_bytes()
    write_records(path, ROWS)
    assert path.read_bytes() == first, "the same records give the same bytes"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_archives_are_read_by_other_tools(tmp_path):
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        write_records(tmp_path / f"data{suffix}", ROWS)
    plain = (tmp_path / "data.jsonl").read_bytes()
    assert gzip.decompress((tmp_path / "data.jsonl.gz").read_bytes()) == plain
    packed = io.BytesIO((tmp_path / "data.jsonl.zst").read_bytes())
    assert zstandard.ZstdDecompressor().stream_reader(packed).read() == plain


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_record_makes_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    assert write_records(path, []) == 0 and objects(path) == []
    with pytest.raises(UserError, match="the data set is empty"):
        read_records(path, FieldsConfig(), need=())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_on_the_way_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    write_records(path, ROWS[:1])

    def broken():
        yield from ROWS
        raise UserError("the source ends here")

    with pytest.raises(UserError, match="the source ends here"):
        write_records(path, broken())
    assert objects(path) == ROWS[:1] and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_json_has_no_word_for(tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, [{"nan": math.nan, "inf": [math.inf], "day": date(2026, 1, 2), "half": "\ud800"}])
    assert objects(path) == [{"nan": None, "inf": [None], "day": "2026-01-02", "half": "\ud800"}]
    with pytest.raises(UserError, match=r"data.jsonl: record 2 cannot be written as JSON \(a value of type bytes\)"):
        write_records(path, [{}, {"x": b"bytes"}])
    with pytest.raises(
        UserError, match=r"data.csv: expected a name that ends with .jsonl, .jsonl.gz, .jsonl.zst, .parquet"
    ):
        write_records(tmp_path / "data.csv", ROWS)


def test_parquet_columns_that_come_late_or_hold_null_at_first(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [{"prompt": "p", "info": {"a": None}, "list": []}] * 1500
    rows += [{"prompt": "p", "info": {"a": 7, "b": "x"}, "list": [1], "late": True}]
    for order in (rows, rows[::-1]):
        write_records(path, order)
        by_list = {len(row["list"]): row for row in objects(path)}
        assert by_list[0] == {"prompt": "p", "info": {"a": None, "b": None}, "list": [], "late": None}
        assert by_list[1] == rows[-1] and len(objects(path)) == 1501


@pytest.mark.parametrize(
    "late, message",
    [
        ("seven", r"column 'info.answer' is int64 in some records and string in others"),
        (2.5, r"column 'info.answer' is int64 in some records and double in others"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_a_parquet_column_of_two_types_is_refused(tmp_path, late, message):
    rows = [{"info": {"answer": 7}}] * 1000 + [{"info": {"answer": late}}]
    with pytest.raises(UserError, match=message):
        write_records(tmp_path / "data.parquet", rows)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- reading tables


def retu(i):
    return {
        "data_source": "retu",
        "prompt": [{"role": "user", "content": "templated"}],
        "reward_model": {"ground_truth": str(i)},
        "extra_info": {"question": f"q{i}", "answer": f"way {i}", "index": i},
    }


@pytest.mark.parametrize("row_group", [7, 1000])
def test_retus_parquet_with_nested_columns(tmp_path, row_group):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([retu(i) for i in range(50)]), path, row_group_size=row_group)
    assert read_records(path, FieldsConfig(), need=("response", "answer")) == [
        Record(f"train.parquet:{i}", f"q{i}", f"way {i}", str(i)) for i in range(50)
    ]


def test_chats_from_parquet_and_from_a_data_set(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    table = datasets.Dataset.from_list([{"messages": messages, "id": "own"}, {"messages": messages, "id": ""}])
    table.save_to_disk(tmp_path / "set")
    table.to_parquet(tmp_path / "set.parquet")
    for name in ("set", "set.parquet"):
        records = read_records(tmp_path / name, FieldsConfig(), need=("response",))
        assert [record.id for record in records] == ["own", f"{name}:1"]
        assert records[0].messages == (Message("user", "q"), Message("assistant", "r"))


TABLE = [{"prompt": f"q{i}", "response": "r" * (i * 37 % 400) or None, "unused": [i]} for i in range(300)]


def in_parts(path, size):
    for chunk in split_file(path, size):
        for record in read_chunk(chunk, FieldsConfig(), ("response",)):
            if isinstance(record, Fault):
                yield int(record.where.rpartition(":")[2]), record.cause
            else:
                yield int(record.id.rpartition(":")[2]), record.response


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 100_000), row_group=st.integers(1, 400), shards=st.integers(1, 4))
def test_tables_in_parts_of_any_size(tmp_path, size, row_group, shards):
    expected = [(i, row["response"] or "wrong_type") for i, row in enumerate(TABLE)]
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "t.parquet", row_group_size=row_group)
    assert list(in_parts(tmp_path / "t.parquet", size)) == expected
    # Batches of any length: what a data set has depends on how it was made.
    folder = tmp_path / "set"
    folder.mkdir(exist_ok=True)
    names = [f"data-{shard}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        table = pa.Table.from_pylist(TABLE[len(TABLE) * shard // shards : len(TABLE) * (shard + 1) // shards])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=row_group)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert list(in_parts(folder, size)) == expected


def test_a_data_set_reads_as_datasets_itself_reads_it(tmp_path):
    folder = tmp_path / "set"
    datasets.Dataset.from_list(TABLE).shuffle(seed=0).filter(lambda row: row["response"]).save_to_disk(
        folder, num_shards=3
    )
    assert objects(folder) == datasets.load_from_disk(folder).to_list()


def test_a_large_row_group_is_cut_and_a_small_one_is_read_where_it_is_needed(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(TABLE), path)
    assert [type(chunk.piece) for chunk in split_file(path)] == [RowGroups]
    cut = list(split_file(path, 1000))
    assert {type(chunk.piece) for chunk in cut} == {GroupPart} and max(chunk.piece.rows for chunk in cut) < 20
    assert cut[-1].done == path.stat().st_size


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.gz", "t.jsonl.zst"])
def test_parts_can_be_read_in_any_order_and_while_others_are(tmp_path, name):
    path = tmp_path / name
    write_records(path, [{"prompt": f"q{i} {'x' * 200}"} for i in range(400)])
    if name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(objects(path)), path)

    def prompts(chunk):
        return [record.prompt for record in read_chunk(chunk, FieldsConfig(), ())]

    parts = list(split_file(path, 2000))
    expected = [prompts(part) for part in parts]
    assert len(parts) > 10 and [prompt for part in expected for prompt in part] == [
        row["prompt"] for row in objects(path)
    ]
    assert [prompts(part) for part in parts[::-1]] == expected[::-1]
    assert [prompts(part) for part in parts[::3]] == expected[::3]
    other = tmp_path / f"other{path.name}"
    write_records(other, [{"prompt": "other"}] * 10)
    for part, there in zip(parts[:4], expected, strict=True):
        assert prompts(part) == there and len(read_records(other, FieldsConfig(), ())) == 10


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.gz"])
def test_a_file_that_was_replaced_is_not_read_on_in(tmp_path, name):
    """A worker process may have the old one open when it is given a part of the new one."""
    path, saved = tmp_path / name, tmp_path / "saved"
    parts = {}
    for which in ("old", "new"):
        rows = [{"prompt": f"{which} {i} {'x' * 200}"} for i in range(400)]
        pq.write_table(pa.Table.from_pylist(rows), path) if name == "t.parquet" else write_records(path, rows)
        parts[which] = list(split_file(path, 2000))
        if which == "old":
            path.rename(saved)
    new = path.rename(tmp_path / "new")
    saved.rename(path)
    assert all(record.prompt.startswith("old") for record in read_chunk(parts["old"][0], FieldsConfig(), ()))
    new.replace(path)
    assert all(record.prompt.startswith("new") for record in read_chunk(parts["new"][1], FieldsConfig(), ()))


def test_records_read_the_columns_they_need_and_errors_name_all(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(TABLE), path)
    (chunk,) = split_file(path)
    _, row = next(chunk.piece.values(["prompt"]))
    assert row == {"prompt": "q0", "response": None, "unused": None}
    with pytest.raises(
        UserError, match=r"t.parquet:0: the record has no field 'answer' \(it has: prompt, response, unused\)"
    ):
        read_records(path, FieldsConfig(), need=("answer",))


def test_bytes_that_are_no_text_in_a_table(tmp_path):
    path = tmp_path / "t.parquet"
    texts = pa.array([b"good", b"bad \xff", b"good too"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), path)
    found = [r.cause if isinstance(r, Fault) else r.prompt for r in iter_records(path, FieldsConfig(), ())]
    assert found == ["good", "not_utf8", "good too"]


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("spoil", ["cut in half", "last byte gone", "bytes overwritten", "not packed at all"])
def test_a_damaged_archive_is_named_and_so_is_how_far_it_goes(tmp_path, suffix, spoil):
    path = tmp_path / f"data{suffix}"
    write_records(path, [{"prompt": f"{i * 7919}"} for i in range(100_000)])
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {
            "cut in half": data[:half],
            "last byte gone": data[:-1],
            "bytes overwritten": data[:half] + bytes(300) + data[half + 300 :],
            "not packed at all": b'{"prompt": "p"}\n',
        }[spoil]
    )
    with pytest.raises(UserError, match="archive is cut off or damaged after line") as error:
        read_records(path, FieldsConfig(), need=())
    line = int(str(error.value).split("after line ")[1].split()[0])
    assert str(path) in str(error.value)
    assert line == 0 if spoil == "not packed at all" else 10_000 < line < 100_000


@pytest.mark.parametrize("members", [1, 3])
def test_archives_of_several_members_are_read_to_the_end(tmp_path, members):
    lines = [b'{"prompt": "%d"}\n' % i for i in range(9)]
    parts = [b"".join(lines[i::members]) for i in range(members)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert len(read_records(tmp_path / name, FieldsConfig(), need=())) == 9


def test_a_broken_table_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    write_records(path, TABLE)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole.replace(b"prompt", b"pr\xe4mpt")):  # a column's name that is no UTF-8
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"parquet file {path} cannot be read"):
            read_records(path, FieldsConfig(), need=())
    folder = tmp_path / "set"
    datasets.Dataset.from_list(TABLE).save_to_disk(folder)
    (file,) = list_disk_files(folder)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"Arrow file {file} cannot be read"):
        read_records(folder, FieldsConfig(), need=())
    file.unlink()
    with pytest.raises(UserError, match=r"state.json' names it|does not exist, but"):
        read_records(folder, FieldsConfig(), need=())


def test_a_folder_of_splits_names_them(tmp_path):
    part = datasets.Dataset.from_list([{"prompt": "p"}])
    datasets.DatasetDict(train=part, held_out=part).save_to_disk(tmp_path / "sets")
    with pytest.raises(UserError, match=r"holds several splits; name one of them: .*sets/train, .*sets/held_out"):
        read_records(tmp_path / "sets", FieldsConfig(), need=())
    assert len(read_records(tmp_path / "sets" / "train", FieldsConfig(), need=())) == 1


# ---------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
from pctrain.config.tree import FieldsConfig
from pctrain.data.sources import iter_records
# Not getrusage: its peak is that of the parent where the parent's is higher.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
next(iter_records(Path(sys.argv[1]), FieldsConfig(), ()))
before = peak()
count = sum(1 for _ in iter_records(Path(sys.argv[2]), FieldsConfig(), ()))
print(count, peak() - before)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_follow_the_size_of_a_file(tmp_path, suffix):
    """70 MB of text, in parquet one row group: the peak stays within 90 MB of a small file's."""
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    text = "\n".join(str(i * i) for i in range(600))  # 3.5 KB
    rows = ({"prompt": f"{i}", "response": text[i % 100 :] + str(i)} for i in range(20_000))
    write_records(small, [{"prompt": "p", "response": "r"}] * 10)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), large, use_dictionary=False, compression="none")
    else:
        write_records(large, rows)
    done = subprocess.run([sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, check=True)
    count, grown = done.stdout.split()
    assert int(count) == 20_000 and float(grown) < 90


# ---------------------------------------------------------------- found by fuzzing


def test_a_date_that_python_cannot_hold(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "day": pa.array([0, 10**8], pa.date32())}), path)
    assert [record.prompt for record in read_records(path, FieldsConfig(), need=())] == [
        "a",
        "b",
    ]  # the column is not read
    with pytest.raises(
        UserError, match=r"t.parquet:1: a column holds a value that cannot be read \(date value out of range\)"
    ):
        list(iter_raw(path))


def test_a_table_with_a_name_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for path in (tmp_path / "t.parquet", tmp_path / "set"):
        with pytest.raises(UserError, match="two of its columns have the name 'prompt'"):
            read_records(path, FieldsConfig(), need=())


@pytest.mark.parametrize(
    "names",
    [
        3,
        ["a"],
        [{"filename": 3}],
        [{"filename": "../a.arrow"}],
        [{"filename": "/etc/passwd"}],
        [{"filename": "a\0b"}],
        [{}],
    ],
)
def test_a_data_set_names_files_of_its_own_folder(tmp_path, names):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": names}))
    with pytest.raises(UserError, match="expected under '_data_files' the names of files"):
        read_records(tmp_path, FieldsConfig(), need=())


def test_a_name_that_is_too_long_for_a_file():
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        list_files("x" * 5000)
