"""Reading JSONL: good files as they come, bad ones refused by file and line."""

import json

import pytest

from pctrain.config import FieldsConfig
from pctrain.data.records import Record
from pctrain.data.sources import read_records
from pctrain.errors import UserError

GOOD = '{"prompt": "1+1=", "response": "two", "answer": "2"}'


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def test_records_have_the_files_line_as_id_unless_they_have_their_own(write):
    path = write(f'{GOOD}\n\n{{"prompt": "p", "answer": 7, "id": "own"}}\n{{"prompt": "q", "answer": 0.5, "id": 12, "more": [1]}}')
    assert read_records(path, FieldsConfig(), need=("answer",)) == [
        Record("train.jsonl:1", "1+1=", "two", "2"), Record("own", "p", None, "7"), Record("12", "q", None, "0.5")]


def test_names_of_the_fields_come_from_the_config(write):
    path = write('{"question": "p", "solution": "s"}')
    fields = FieldsConfig(prompt="question", response="solution")
    assert read_records(path, fields, need=("response",)) == [Record("train.jsonl:1", "p", "s", None)]


def test_line_ends_byte_order_mark_and_separators_inside_text(write):
    text = json.dumps({"prompt": "a\u2028b\x85", "response": "r"}, ensure_ascii=False)  # characters that str.splitlines would cut at
    path = write(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    assert [r.prompt for r in read_records(path, FieldsConfig(), need=())] == ["a\u2028b\x85"] * 2


def test_a_field_that_is_not_needed_may_be_anything(write):
    path = write('{"prompt": "p", "response": null, "answer": [1]}')
    assert read_records(path, FieldsConfig(), need=()) == [Record("train.jsonl:1", "p")]


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "p", ', "malformed JSON at column"),
    ("[1]", "expected a JSON object, got a list"),
    ('"x"', "expected a JSON object, got a string"),
    ('{"response": "r", "answer": "1"}', "the record has no field 'prompt' (it has: answer, response)"),
    ('{"prompt": "p", "answer": "1"}', "the record has no field 'response'"),
    ('{"prompt": "p", "response": "r"}', "the record has no field 'answer'"),
    ('{"prompt": 3, "response": "r", "answer": "1"}', "field 'prompt': expected a string, got a number"),
    ('{"prompt": "p", "response": null, "answer": "1"}', "field 'response': expected a string, got null"),
    ('{"prompt": "p", "response": "r", "answer": true}', "field 'answer': expected a string or a number, got true or false"),
    ('{"prompt": " ", "response": "r", "answer": "1"}', "field 'prompt' is empty"),
    ('{"prompt": "p", "response": "", "answer": "1"}', "field 'response' is empty"),
    ('{"prompt": "\\ud800", "response": "r", "answer": "1"}', "field 'prompt' holds half of a surrogate pair"),
    ("[" * 100_000, "malformed JSON"),
    ('{"prompt": "p", "response": "r", "answer": ' + "1" * 5000 + "}", "malformed JSON"),
])
def test_a_bad_line_is_named(write, line, message):
    path = write(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        read_records(path, FieldsConfig(), need=("response", "answer"))
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


@pytest.mark.parametrize("content, message", [
    ("", "the data set is empty"), ("\n \n", "the data set is empty"),
    (f"{GOOD}\n".encode() + b'{"prompt": "\xff"}', ":2: not UTF-8 at byte 13"),
    (GOOD.encode("utf-16"), ":1: not UTF-8"),
])
def test_a_bad_file_is_named(write, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_records(path, FieldsConfig(), need=("response",))
    assert str(path) in str(error.value) and message in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path, message in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_records(path, FieldsConfig(), need=())
