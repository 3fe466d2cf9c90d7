"""The JSON reader: whatever is wrong with a file is one UserError that names it and says what to do."""

import pytest

from pctrain.common.errors import UserError
from pctrain.files import json_file

MALFORMED = {
    "not JSON": (b"{oops", "line 1, column 2"),
    "nested too deeply": (b"[" * 100_000, "nested too deeply"),
    "a number of thousands of digits": (b"1" * 5000, "digits"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 8"),
    "half of a surrogate pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("content, words", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_one_error_with_its_name_and_the_advice(tmp_path, content, words):
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        json_file.read_object(file, "Copy it again")
    message = str(error.value)
    assert message.startswith(f"{file}: not valid JSON (") and words in message and message.endswith("). Copy it again")


@pytest.mark.parametrize(
    "content, kind", [(b"[]", "an array"), (b"3", "a number"), (b"null", "null"), (b'"x"', "a string")]
)
def test_a_value_that_is_not_an_object_is_named(tmp_path, content, kind):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: expected a JSON object, found {kind}$"):
        json_file.read_object(tmp_path / "a.json")


def test_a_missing_file_and_one_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none.json: not found. Copy it again"):
        json_file.read_object(tmp_path / "none.json", "Copy it again")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        json_file.read_object(tmp_path)
    with pytest.raises(UserError, match=r"none.jsonl: not found. Copy it again"):
        list(json_file.read_lines(tmp_path / "none.jsonl", "Copy it again"))


def test_both_halves_of_a_surrogate_pair_make_a_character():
    assert json_file.parse(r'"\ud83d\ude00"') == "\U0001f600"


def test_lines_come_with_their_place_and_blank_ones_are_skipped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": "x\u2028y"}\n\n{"a": 2}\n')
    assert list(json_file.read_lines(file, "")) == [({"a": "x\u2028y"}, f"{file}:1"), ({"a": 2}, f"{file}:3")]


def test_only_a_last_line_without_its_newline_may_be_torn(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": 1}\n{"a":')
    assert [row for row, _ in json_file.read_lines(file, "", torn_end=True)] == [{"a": 1}]
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not valid JSON"):
        list(json_file.read_lines(file, ""))
    file.write_text('{"a":\n{"a": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not valid JSON"):
        list(json_file.read_lines(file, "", torn_end=True))
