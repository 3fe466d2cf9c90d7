"""Records of JSON lines: good ones are read, bad ones are refused with file and line; chats, other column names."""

import json

import pytest

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.columns import choose_columns
from pctrain.data.records import Fault, Message, Record
from pctrain.data.sources import iter_records, read_records

GOOD = '{"prompt": "1+1=", "response": "two", "answer": "2"}'


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_records_have_the_files_line_as_id_unless_they_have_their_own(write):
    path = write(
        f'{GOOD}\n\n{{"prompt": "p", "answer": 7, "id": "own"}}\n'
        '{"prompt": "q", "answer": 0.5, "id": 12, "more": [1]}'
    )
    assert read_records(path, FieldsConfig(), need=("answer",)) == [
        Record("train.jsonl:1", "1+1=", "two", "2"),
        Record("own", "p", None, "7"),
        Record("12", "q", None, "0.5"),
    ]


def test_names_of_the_fields_come_from_the_config(write):
    path = write('{"question": "p", "solution": "s"}')
    fields = FieldsConfig(prompt="question", response="solution")
    assert read_records(path, fields, need=("response",)) == [Record("train.jsonl:1", "p", "s", None)]


def test_line_ends_byte_order_mark_and_separators_inside_text(write):
    text = json.dumps(
        {"prompt": "a\u2028b\x85", "response": "r"}, ensure_ascii=False
    )  # characters that str.splitlines would cut at
    path = write(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    assert [r.prompt for r in read_records(path, FieldsConfig(), need=())] == ["a\u2028b\x85"] * 2


def test_a_field_that_is_not_needed_may_be_anything(write):
    path = write('{"prompt": "p", "response": null, "answer": [1]}')
    assert read_records(path, FieldsConfig(), need=()) == [Record("train.jsonl:1", "p")]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "p", ', "malformed JSON at column"),
        ("[1]", "expected a JSON object, got a list"),
        ('"x"', "expected a JSON object, got a string"),
        ('{"response": "r", "answer": "1"}', "the record has no field 'prompt' (it has: answer, response)"),
        ('{"prompt": "p", "answer": "1"}', "the record has no field 'response'"),
        ('{"prompt": "p", "response": "r"}', "the record has no field 'answer'"),
        ('{"prompt": 3, "response": "r", "answer": "1"}', "field 'prompt': expected a string, got a number"),
        ('{"prompt": "p", "response": null, "answer": "1"}', "field 'response': expected a string, got null"),
        (
            '{"prompt": "p", "response": "r", "answer": true}',
            "field 'answer': expected a string or a number, got true or false",
        ),
        ('{"prompt": " ", "response": "r", "answer": "1"}', "field 'prompt' is empty"),
        ('{"prompt": "p", "response": "", "answer": "1"}', "field 'response' is empty"),
        ('{"prompt": "\\ud800", "response": "r", "answer": "1"}', "field 'prompt' holds half of a surrogate pair"),
        ("[" * 100_000, "malformed JSON"),
        ('{"prompt": "p", "response": "r", "answer": ' + "1" * 5000 + "}", "malformed JSON"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = write(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        read_records(path, FieldsConfig(), need=("response", "answer"))
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the data set is empty"),
        ("\n \n", "the data set is empty"),
        (f"{GOOD}\n".encode() + b'{"prompt": "\xff"}', ":2: not UTF-8 at byte 13"),
        (GOOD.encode("utf-16"), ":1: not UTF-8"),
    ],
)
def test_a_bad_file_is_named(write, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_records(path, FieldsConfig(), need=("response",))
    assert str(path) in str(error.value) and message in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path, message in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path, "is a folder, but not a data set")):
        with pytest.raises(UserError, match=message):
            read_records(path, FieldsConfig(), need=())


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]


def test_a_chat_is_found_by_its_column(write):
    path = write(json.dumps({"messages": CHAT, "answer": 2}))
    (record,) = read_records(path, FieldsConfig(), need=("response", "answer"))
    assert record.messages == (Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"))
    assert (record.prompt, record.response, record.answer) == (None, None, "2")
    assert (record.question, record.trajectory) == ("Be brief.\n\n1+1?", "2")


def test_a_chat_may_end_with_a_question_where_no_response_is_needed(write):
    path = write(json.dumps({"messages": CHAT[:2], "answer": "2"}))
    (record,) = read_records(path, FieldsConfig(), need=("answer",))
    assert (record.question, record.trajectory) == ("Be brief.\n\n1+1?", None)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "messages, cause, message",
    [
        (CHAT[:2], "bad_chat", "the chat ends with a turn of role 'user'; expected 'assistant'"),
        ("hello", "wrong_type", "expected a list of messages, got a string"),
        (["hello"], "bad_chat", "message 1: expected an object with role and content, got a string"),
        (
            turns(("user", "q"), ("human", "r")),
            "bad_chat",
            "message 2: expected a role of system, developer, user, assistant, tool, got 'h",
        ),
        (turns(("user", ["q"]), ("assistant", "r")), "bad_chat", "message 1: expected a string as content, got a list"),
        (turns(("user", "q"), ("assistant", None)), "bad_chat", "message 2: expected a string as content, got null"),
        (turns(("user", "q"), ("assistant", " ")), "empty_response", "the assistant's last turn is empty"),
        (turns(("assistant", "r")), "empty_prompt", "expected text before the assistant's last turn"),
        (turns(("user", ""), ("assistant", "r")), "empty_prompt", "expected text before the assistant's last turn"),
        ([], "empty_prompt", "expected text before the assistant's last turn"),
        (turns(("user", "\ud800"), ("assistant", "r")), "surrogate", "message 1 holds half of a surrogate pair"),
    ],
)
def test_a_bad_chat_is_a_fault(write, messages, cause, message):
    path = write(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": messages}))
    good, fault = iter_records(path, FieldsConfig(), need=("response",))
    assert isinstance(good, Record)
    assert (fault.where, fault.cause) == (f"{path}:2", cause) and message in fault.message


RETU = {
    "data_source": "retu",
    "prompt": [{"role": "user", "content": "templated"}],
    "extra_info": {"question": "q", "answer": "the way"},
    "reward_model": {"ground_truth": "7", "style": "rule"},
}


def test_the_columns_of_retu_are_found(write):
    path = write(json.dumps(RETU))
    assert read_records(path, FieldsConfig(), need=("response", "answer")) == [
        Record("train.jsonl:1", "q", "the way", "7")
    ]


def test_what_the_config_names_goes_over_what_is_found(write):
    path = write(json.dumps({**RETU, "messages": CHAT, "solution": "s"}))
    (found,) = read_records(path, FieldsConfig(), need=())
    assert found.trajectory == "2", "messages come first"
    fields = FieldsConfig(prompt="prompt.0.content", response="solution", answer="reward_model.ground_truth")
    (named,) = read_records(path, fields, need=("answer",))
    assert named == Record("train.jsonl:1", "templated", "s", "7")
    (chat,) = read_records(path, FieldsConfig(messages="prompt"), need=())
    assert chat.messages == (Message("user", "templated"),)


def test_a_chat_and_a_prompt_cannot_both_be_named(write):
    with pytest.raises(
        UserError, match=r"data.fields.messages = chat and data.fields.prompt = q: a record is a chat or a prompt"
    ):
        read_records(write(GOOD), FieldsConfig(messages="chat", prompt="q"), need=())


def test_the_choice_of_columns_can_be_read():
    assert choose_columns(FieldsConfig(answer="label"), "RETU").describe() == (
        "RETU: prompt from extra_info.question, response from extra_info.answer, answer from label"
    )
    assert choose_columns(FieldsConfig(), "chat").describe() == "chat: messages from messages, answer from answer"


@pytest.mark.parametrize(
    "path, message",
    [
        ("extra_info.solution", "no field 'extra_info.solution' ('extra_info' has: answer, question)"),
        ("prompt.3.content", "no field 'prompt.3.content' ('prompt' is a list of 1)"),
        ("data_source.x", "no field 'data_source.x' ('data_source' is a string)"),
        ("nothing.x", "no field 'nothing.x' (it has: data_source, extra_info, prompt, reward_model)"),
    ],
)
def test_a_path_into_nothing_says_where_it_ends(write, path, message):
    with pytest.raises(UserError) as error:
        read_records(write(json.dumps(RETU)), FieldsConfig(response=path), need=("response",))
    assert message in str(error.value)


def test_a_column_whose_name_has_dots_comes_before_the_path(write):
    path = write('{"a.b": "column", "a": {"b": "path"}}')
    assert read_records(path, FieldsConfig(prompt="a.b"), need=())[0].prompt == "column"


def test_faults_stand_where_the_records_would(write):
    path = write(f'{GOOD}\n{{"prompt": "p"\n{GOOD}\n[]\n'.encode() + b'{"prompt": "\xff"}\n' + GOOD.encode())
    found = [
        (r.cause if isinstance(r, Fault) else r.id) for r in iter_records(path, FieldsConfig(), need=("response",))
    ]
    assert found == ["train.jsonl:1", "malformed_json", "train.jsonl:3", "not_an_object", "not_utf8", "train.jsonl:6"]


def test_not_a_number_is_no_answer(write):
    path = write('{"prompt": "p", "answer": NaN}')
    with pytest.raises(UserError, match="field 'answer': expected a string or a number, got NaN or an infinity"):
        read_records(path, FieldsConfig(), need=("answer",))


def test_halves_of_surrogate_pairs_in_names(write):
    """No file and no terminal would take them: an id is refused, a message has them as escapes."""
    with pytest.raises(UserError, match="field 'id' holds half of a surrogate pair"):
        read_records(write('{"id": "\\ud800", "prompt": "p"}'), FieldsConfig(), need=())
    with pytest.raises(UserError) as error:
        read_records(write('{"\\ud800": "p"}'), FieldsConfig(), need=())
    assert "it has: \\ud800" in str(error.value)


def test_a_place_in_a_list_of_thousands_of_digits(write):
    with pytest.raises(UserError, match="has no field"):
        read_records(write('{"a": ["p"]}'), FieldsConfig(prompt="a." + "9" * 5000), need=())
