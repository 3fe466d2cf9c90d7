"""Encoding of records: the tokens that SFT trains on and the prompt that RL samples from.

One module does both, so they agree.

Without a chat template a sequence is prompt + response + EOS. Prompt and response are tokenized separately.

With a chat template a sequence is the chat as the template writes it. The trained span of a turn begins where the
template's generation prompt ends, which is where sampling begins. It ends with the special token that closes the turn.
The newline that most templates write after that token belongs to the next turn and is useless after the last one. A
model stops at its tokenizer's EOS. If the closing token is another one, or the template writes none, EOS is appended to
the last turn and is trained on too.

The mask is verified for each record rather than derived from the text: the chat must begin with its prompt, and the
tokens of the chat with the tokens of the prompt. The remaining tokens are the answer. (The answer is not tokenized by
itself: SentencePiece would put a space before it that is not in the chat and that is never sampled.) Some templates
write earlier turns differently from how they wrote them as answers (Qwen3 omits their reasoning). No span of such a
turn is what was sampled, so the record is `Unusable`.

Special tokens are recognized everywhere, also in a user's own text ("<|im_end|>" there ends the turn). transformers
does the same and gives the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pctrain.config.tree import DataConfig
from pctrain.data.records import Message, Record
from pctrain.files.durable import fingerprint
from pctrain.hf import chat_template
from pctrain.hf.chat_template import ChatTemplate
from pctrain.hf.tokenizer import Tokenizer

# Increment it when the same inputs give different tokens. Caches of older versions are then not read.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """A tokenized record.

    The tokens of the spans [start, end) are trained on. No span begins at 0, because nothing predicts the first token.
    """

    tokens: np.ndarray  # int32 [L]
    spans: np.ndarray  # int32 [m, 2], ascending and disjoint, m >= 1
    cut: bool  # the sample exceeded the limit, so its end (including EOS) was cut off


class Unusable(ValueError):
    """A record that cannot be trained on.

    `cause` is one of no_template, template_error, template_prefix, template_rewrites, token_boundary, no_prompt,
    overlong and no_labels.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class Encoder:
    """The tokenizer, the chat template and the policies of one run.

    Every worker process makes its own from plain arguments.

    Args:
        hf_dir: Hugging Face directory with tokenizer.json.
        data: the section whose `template`, `loss_on`, `overlong` and `unusable` are used.
        limit: the maximum number of tokens of a sample.

    Raises:
        UserError: the tokenizer or the template cannot be read.
    """

    def __init__(self, hf_dir: Path, data: DataConfig, limit: int):
        self.tokenizer = Tokenizer(hf_dir)
        self.template = chat_template.load(hf_dir, data.template)
        self._data, self._limit = data, limit
        self._tokenizer_file = Path(hf_dir) / "tokenizer.json"

    @property
    def digest(self) -> str:
        """The sha256, in hex, of everything that the tokens of a record depend on besides the record itself."""
        parts = {
            "version": ENCODING_VERSION,
            "tokenizer": fingerprint(self._tokenizer_file),
            "eos": self.tokenizer.eos_id,
            "template": self.template and self.template.digest,
            "limit": self._limit,
            **{name: getattr(self._data, name) for name in ("loss_on", "overlong", "unusable")},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def stops(self, cause: str) -> bool:
        """Return whether a record that is unusable for this cause is an error. Otherwise it is dropped and counted.

        `cause` is a cause of `Unusable` or of `Fault`.
        """
        return (self._data.overlong if cause == "overlong" else self._data.unusable) == "error"

    def prompt_ids(self, record: Record) -> list[int]:
        """Return the tokens to sample from: the prompt, or the turns before the answer and a generation prompt.

        Raises:
            Unusable: the record is a chat and there is no template, the template refuses the messages, or the prompt
                has no tokens.
        """
        if self.template is None:
            ids = self.tokenizer.encode(_plain_prompt(record))
        else:
            ids = self.tokenizer.encode(self._render(self.template, _asked(record), add_generation_prompt=True))
        if not ids:
            raise _no_prompt()
        return ids

    def encode(self, record: Record) -> Sample:
        """Return the tokens and spans of a record that was read with `need=("response",)`.

        The tokens begin with `prompt_ids(record)`.

        Raises:
            Unusable: the record cannot be trained on. `stops` says whether that is an error.
        """
        if self.template is None:
            tokens, spans = self._encode_plain(record)
        else:
            tokens, spans = self._encode_chat(record, self.template)
        if not spans:
            raise Unusable(
                "no_labels",
                "the chat template writes nothing after the prompt, so there is nothing to train on. "
                "Set data.template to another template.",
            )
        if spans[0][0] == 0:
            raise _no_prompt()
        length = len(tokens)
        if length > self._limit:
            if self._data.overlong != "right":
                trained = sum(end - start for start, end in spans)
                raise Unusable(
                    "overlong",
                    f"the sample has {length} tokens ({length - trained} prompt, {trained} response with EOS), more "
                    f"than {self._limit}, the smaller of the model's context and sft.token_budget. "
                    "Shorten or remove the record, raise the limit, or set data.overlong to drop or right.",
                )
            spans = [(start, min(end, self._limit)) for start, end in spans if start < self._limit]
            if not spans:
                raise Unusable(
                    "no_labels",
                    f"nothing of the response is left when the sample is cut to {self._limit} tokens. "
                    "Shorten the prompt, raise the limit, or set data.unusable to drop.",
                )
            tokens = tokens[: spans[-1][1]]  # tokens between the last span and the cut are not needed either
        return Sample(np.asarray(tokens, np.int32), np.asarray(spans, np.int32), length > self._limit)

    # ---- without a template ----------------------------------------------------------------------------------------

    def _encode_plain(self, record: Record) -> tuple[list[int], list[tuple[int, int]]]:
        prompt, response = self.tokenizer.encode_all([_plain_prompt(record), record.required("response")])
        tokens = [*prompt, *response, self.tokenizer.eos_id]
        return tokens, [(len(prompt), len(tokens))]

    # ---- with a template -------------------------------------------------------------------------------------------

    def _encode_chat(self, record: Record, template: ChatTemplate) -> tuple[list[int], list[tuple[int, int]]]:
        messages = [*_asked(record), Message("assistant", record.required("trajectory"))]
        text = self._render(template, messages)
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = turns if self._data.loss_on == "all" else turns[-1:]
        prompts = [self._prompt_text(template, messages, turn, text) for turn in turns]
        whole, *prompt_ids = self.tokenizer.encode_all([text, *prompts])
        spans = []
        for turn, ids in zip(turns, prompt_ids, strict=True):
            if whole[: len(ids)] != ids:
                raise Unusable("token_boundary", self._boundary_message(whole, ids))
            if turn == turns[-1]:
                end = self._find_end(whole, len(ids))
            else:
                end = self._find_earlier_end(template, messages[: turn + 1], text, whole, len(ids))
            spans.append((len(ids), end))
        tokens = whole[: spans[-1][1]]
        if tokens[-1:] != [self.tokenizer.eos_id]:
            tokens.append(self.tokenizer.eos_id)
            spans[-1] = (spans[-1][0], len(tokens))
        return tokens, [(start, end) for start, end in spans if start < end]  # an earlier turn may be empty

    def _prompt_text(self, template: ChatTemplate, messages: Sequence[Message], turn: int, text: str) -> str:
        """Return the text from which the answer of `turn` is sampled. `text`, the whole chat, must begin with it."""
        prompt = self._render(template, messages[:turn], add_generation_prompt=True)
        if not text.startswith(prompt):
            last = turn == len(messages) - 1
            advice = "Set data.template to a template whose answers follow its generation prompt." if last else _ADVICE
            raise Unusable(
                "template_prefix" if last else "template_rewrites",
                f"the chat template does not write turn {turn + 1} after the prompt that it is sampled from: "
                f"{_describe_difference(prompt, text)}. {advice}",
            )
        return prompt

    def _find_end(self, ids: list[int], begin: int) -> int:
        """Return the end of the last answer in `ids`: after its closing special token, or len(ids) if there is none."""
        closing = next((i for i in range(len(ids) - 1, begin - 1, -1) if ids[i] in self.tokenizer.special_ids), None)
        if closing is None:
            return len(ids)
        if self.tokenizer.decode(ids[closing + 1 :]).strip():  # the special token is part of the answer's own text
            return len(ids)
        return closing + 1

    def _find_earlier_end(
        self, template: ChatTemplate, messages: Sequence[Message], text: str, whole: list[int], begin: int
    ) -> int:
        """Return the end of a turn that others follow, which is its end while it is the last turn.

        Raises:
            Unusable: the template or the tokenizer writes the turn differently once others follow.
        """
        alone = self._render(template, messages)
        if not text.startswith(alone):
            raise Unusable(
                "template_rewrites",
                f"the chat template writes turn {len(messages)} differently once more turns follow: "
                f"{_describe_difference(alone, text)}. {_ADVICE}",
            )
        ids = self.tokenizer.encode(alone)
        end = self._find_end(ids, begin)
        if whole[:end] != ids[:end]:
            raise Unusable(
                "token_boundary",
                f"the end of turn {len(messages)} is tokenized differently once more turns follow. {_ADVICE}",
            )
        # Some templates leave the last turn open, and close it with EOS when another turn follows.
        left_open = not self.tokenizer.special_ids.intersection(ids[begin:end][-1:])
        return end + (left_open and whole[end : end + 1] == [self.tokenizer.eos_id])

    def _render(self, template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return template.render([{"role": m.role, "content": m.content} for m in messages], add_generation_prompt)
        except chat_template.RenderError as error:
            raise Unusable("template_error", str(error)) from None

    def _boundary_message(self, whole: list[int], prompt: list[int]) -> str:
        differing = _first_difference(whole, prompt)
        at = len(whole) if differing is None else differing
        around = slice(max(0, at - 3), at + 3)
        in_chat, in_prompt = (
            f"ids {ids[around]} ({self.tokenizer.decode(ids[around], special=True)!r})" for ids in (whole, prompt)
        )
        return (
            f"the tokens of the chat do not begin with those of its prompt: "
            f"around token {at + 1} the chat has {in_chat}, but the prompt has {in_prompt}. "
            "One token joins the end of the prompt and the answer, so no mask matches what is sampled. "
            "Change how the answer begins (such as with a newline), or change the template."
        )


_ADVICE = (
    "Train on the last turn only (data.loss_on=last), or set data.template to a template that keeps earlier turns."
)


def _no_prompt() -> Unusable:
    return Unusable(
        "no_prompt",
        "the prompt has no tokens, so nothing predicts the first token of the answer. "
        "Fill in the prompt, or remove the record.",
    )


def _plain_prompt(record: Record) -> str:
    if record.messages:
        raise Unusable(
            "no_template",
            "a chat needs a chat template, and the model's directory has none (or data.template=none). "
            "Set data.template to a Jinja file, or give records with a prompt and a response.",
        )
    return record.required("prompt")


def _asked(record: Record) -> Sequence[Message]:
    """Return the turns before the answer."""
    if not record.messages:
        return (Message("user", record.required("prompt")),)
    return record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int | None:
    pairs = enumerate(zip(first, second, strict=False))  # one may be longer
    return next((i for i, (a, b) in pairs if a != b), None)


def _describe_difference(expected: str, text: str) -> str:
    differing = _first_difference(expected, text)
    at = min(len(expected), len(text)) if differing is None else differing
    around = slice(max(0, at - 20), at + 20)
    return f"at character {at + 1} expected {expected[around]!r}, found {text[around]!r}"
