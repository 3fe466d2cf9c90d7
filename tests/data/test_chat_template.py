"""Chat templates are rendered as transformers renders them, and found where it finds them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.hf.chat_template import RenderError, load
from tests.helpers import chat_models

CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": " What is 12 + 30? "},
    {"role": "assistant", "content": "<think>\n12 + 30\n</think>\n\n\\boxed{42}"},
    {"role": "user", "content": "And\n\n1?"},
    {"role": "assistant", "content": "1 你好"},
]


def as_transformers(tokenizer, messages, **arguments):
    # transformers gives templates the date of today; pctrain lets them fall back to the date that they carry.
    return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **arguments)


@pytest.mark.parametrize("name", chat_models.MODELS)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_the_text_is_that_of_transformers(directories, transformers_tokenizers, name, generation_prompt):
    template = load(directories[name], "auto")
    for length in range(1, len(CHAT) + 1):
        for messages in (CHAT[:length], CHAT[1 : length + 1]):
            expected = as_transformers(transformers_tokenizers[name], messages, add_generation_prompt=generation_prompt)
            assert template.render(messages, generation_prompt) == expected


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=20)}), min_size=1, max_size=5)


@pytest.mark.parametrize("name", chat_models.MODELS)
@given(messages=MESSAGES, generation_prompt=st.booleans())
def test_any_messages_give_the_text_of_transformers(
    directories, transformers_tokenizers, name, messages, generation_prompt
):
    template = load(directories[name], "auto")
    expected = as_transformers(transformers_tokenizers[name], messages, add_generation_prompt=generation_prompt)
    assert template.render(messages, generation_prompt) == expected


WRITTEN = """
{%- for message in messages %}
    {%- if message.role == 'skip' %}{%- continue %}{%- endif %}
    {%- if message.role == 'stop' %}{%- break %}{%- endif %}
    {%- generation %}
    {{- bos_token + message.content + ({'b': '<é>', 'a': 1} | tojson) + ([1, 2] | tojson(indent=1)) }}
    {%- endgeneration %}
    {% set last = message.content %}

{%- endfor %}
{{- eos_token }} {{ unknown }}{{ tools is none }}{{ documents is none }}
"""


def test_extensions_filters_and_variables_are_those_of_transformers(directories, transformers_tokenizers, tmp_path):
    (tmp_path / "own.jinja").write_text(WRITTEN)
    messages = [{"role": role, "content": role[::-1]} for role in ("user", "skip", "assistant", "stop", "user")]
    expected = transformers_tokenizers["llama3"].apply_chat_template(messages, tokenize=False, chat_template=WRITTEN)
    assert load(directories["llama3"], str(tmp_path / "own.jinja")).render(messages) == expected
    assert (
        expected.count("<|begin_of_text|>") == 2 and "<é>" in expected
    )  # the loop continued and stopped, HTML was left alone


def test_where_a_template_is_found(directories, tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert load(tmp_path, "auto") is None and load(directories["qwen3"], "none") is None
    config.write_text(json.dumps({"chat_template": "one", "eos_token": {"content": "<e>"}}))
    assert load(tmp_path, "auto").render([]) == "one"
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert load(tmp_path, "auto").render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load(tmp_path, "auto").render([]) == "from the file"  # it goes before the config
    (tmp_path / "own.jinja").write_text("own")
    assert load(tmp_path, str(tmp_path / "own.jinja")).render([]) == "own"
    assert load(tmp_path, "none") is None


def test_special_tokens_of_the_older_file_go_before_the_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<a>", "eos_token": {"content": "<b>"}, "pad_token": None})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    assert load(tmp_path, "auto").render([]) == "<a><b>"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<c>"}}))
    assert load(tmp_path, "auto").render([]) == "<c><b>"


def test_the_digest_follows_the_template_and_its_special_tokens(tmp_path):
    def digest(template, bos):
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
        return load(tmp_path, "auto").digest

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("a", "c"), digest("b", "b")}) == 3


def test_templates_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"data.template: the file none.jinja does not exist; expected auto, none, or"):
        load(tmp_path, "none.jinja")
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfi %}")
    with pytest.raises(UserError, match=rf"{own}: the chat template is broken at line 3: .*endfi"):
        load(tmp_path, str(own))
    own.write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"{own}: the chat template cannot be read"):
        load(tmp_path, str(own))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "r"}]}))
    with pytest.raises(UserError, match="chat_template lists rag, but none is named 'default'"):
        load(tmp_path, "auto")
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match="chat_template: expected text"):
        load(tmp_path, "auto")


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ messages[7].content }}", "uses a variable that it does not get"),
        ("{{ 'x' + none }}", "fails: TypeError"),
        (
            "{{ strftime_now('%d %b %Y') }}",
            "'strftime_now' is undefined; today's date would make the data depend on the day",
        ),
        ("{{ messages.append(1) }}", "refuses the messages: .*unsafe"),  # a template cannot change what it is given
        ("{{ ''.__class__.__mro__ }}", "refuses the messages|uses a variable that it does not get"),
    ],
)
def test_a_template_that_refuses_says_so(tmp_path, source, message):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(RenderError, match=message):
        load(tmp_path, "auto").render([{"role": "user", "content": "q"}])


def test_a_date_is_never_that_of_today(directories):
    assert "Today Date: 26 Jul 2024\n" in load(directories["llama3_2"], "auto").render(CHAT)


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "{% for i in [1] %}" * 25 + "{% endfor %}" * 25]
)
def test_a_template_that_is_nested_too_deeply(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match=r"chat_template.jinja: the chat template cannot be compiled"):
        load(tmp_path, "auto")
