"""From a record to the tokens that are trained on, and to the prompt that RL samples after: one place, so that the two agree.

Without a chat template a sequence is prompt + response + EOS, prompt and response tokenised apart.

With one it is the chat as the template writes it. What is trained on begins where the template, asked for a generation prompt, stops: the
very place that a sample begins at. It ends with the special token that closes the turn; the newline that most templates write after it
is context of a later turn, and of no use behind the last one. A model stops at its tokenizer's EOS: where the closing token is another
one, or none is written, EOS follows the last turn and is trained on as well.

The mask is proved for each record, not taken from the text: the chat must begin with its prompt, and the tokens of the chat with those of
the prompt; the answer's are the rest. (The answer is not tokenised by itself: SentencePiece would put a space before it that is not in the
chat, and nobody samples it so.) Where a template writes earlier turns otherwise than it wrote them as answers (Qwen3 leaves their reasoning
out), no span of them is what was sampled, and the record is `Unusable`.

Special tokens are read wherever they stand, also in a user's own text ("<|im_end|>" there ends the turn): so does transformers, and the
ids are the same.
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
from pctrain.hf.tokenizer import Tokenizer

ENCODING_VERSION = 1  # raise it when the same inputs give other tokens: caches of older versions are not read again


@dataclass(frozen=True)
class Sample:
    """A tokenised record. Tokens of the spans [start, end) are trained on; none begins at 0, for nothing predicts the first token."""

    tokens: np.ndarray  # int32 [L]
    spans: np.ndarray  # int32 [m, 2], ascending, apart from each other, m >= 1
    cut: bool  # it was longer than the limit, and its end (EOS among it) was cut off


class Unusable(ValueError):
    """A record that cannot be trained on.

    `cause` is one of no_template, template_error, template_prefix, template_rewrites, token_boundary, no_prompt, overlong, no_labels.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class Encoder:
    """Tokenizer, template and policies of one run. Made from plain arguments, so that every worker process makes its own."""

    def __init__(self, hf_dir: Path, data: DataConfig, limit: int):
        """
        Args:
            hf_dir: Hugging Face directory with tokenizer.json.
            data: `template`, `loss_on`, `overlong` and `unusable` are read.
            limit: most tokens of a sample.
        Raises:
            UserError: the tokenizer or the template cannot be read.
        """
        self.tokenizer = Tokenizer(hf_dir)
        self.template = chat_template.load(hf_dir, data.template)
        self._data, self._limit = data, limit
        self._tokenizer_file = Path(hf_dir) / "tokenizer.json"

    @property
    def digest(self) -> str:
        """sha256, in hex, of everything but the record that its tokens depend on."""
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
        """Whether a record that is unusable for this cause (of `Unusable`, or of a `Fault`) stops the work; else it is dropped, counted."""
        return (self._data.overlong if cause == "overlong" else self._data.unusable) == "error"

    def prompt_ids(self, record: Record) -> list[int]:
        """Tokens to sample after: the prompt, or the turns before the assistant's last one with its generation prompt.

        Raises:
            Unusable: a chat without a template; a template that refuses the messages; a prompt of no tokens.
        """
        if self.template is None:
            ids = self.tokenizer.encode(_plain_prompt(record))
        else:
            ids = self.tokenizer.encode(self._render(_asked(record), add_generation_prompt=True))
        if not ids:
            raise Unusable("no_prompt", "the prompt has no tokens, so nothing predicts the first one of the answer")
        return ids

    def encode(self, record: Record) -> Sample:
        """Tokens and spans of a record with a response (`need=("response",)`). `tokens` begins with `prompt_ids(record)`.

        Raises:
            Unusable: see there; whether that is an error is said by `stops`.
        """
        tokens, spans = self._encode_plain(record) if self.template is None else self._encode_chat(record)
        if not spans:
            raise Unusable(
                "no_labels",
                "the chat template writes nothing after the prompt, so there is nothing to train on; give another "
                "template by data.template",
            )
        if spans[0][0] == 0:
            raise Unusable("no_prompt", "the prompt has no tokens, so nothing predicts the first one of the answer")
        length = len(tokens)
        if length > self._limit:
            if self._data.overlong != "right":
                trained = sum(end - start for start, end in spans)
                raise Unusable(
                    "overlong",
                    f"the sample has {length} tokens ({length - trained} prompt, {trained} response with EOS), more "
                    f"than {self._limit}, the smaller of the model's context and sft.token_budget; shorten or "
                    "remove it, raise the limit, or set data.overlong to drop or right",
                )
            spans = [(start, min(end, self._limit)) for start, end in spans if start < self._limit]
            if not spans:
                raise Unusable(
                    "no_labels",
                    f"cut to {self._limit} tokens, nothing of its response is left; shorten the prompt, raise the "
                    "limit, or set data.unusable to drop",
                )
            tokens = tokens[: spans[-1][1]]  # what stands between the last span and the cut is of no use either
        return Sample(np.asarray(tokens, np.int32), np.asarray(spans, np.int32), length > self._limit)

    # ---- without a template ----------------------------------------------------------------------------------------

    def _encode_plain(self, record: Record) -> tuple[list[int], list[tuple[int, int]]]:
        prompt, response = self.tokenizer.encode_all([_plain_prompt(record), record.response])
        tokens = [*prompt, *response, self.tokenizer.eos_id]
        return tokens, [(len(prompt), len(tokens))]

    # ---- with a template -------------------------------------------------------------------------------------------

    def _encode_chat(self, record: Record) -> tuple[list[int], list[tuple[int, int]]]:
        messages = [*_asked(record), Message("assistant", record.trajectory)]
        text = self._render(messages)
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = turns if self._data.loss_on == "all" else turns[-1:]
        prompts = [self._prompt(messages, turn, text) for turn in turns]
        whole, *prompt_ids = self.tokenizer.encode_all([text, *prompts])
        spans = []
        for turn, ids in zip(turns, prompt_ids, strict=True):
            if whole[: len(ids)] != ids:
                raise Unusable("token_boundary", self._boundary_message(whole, ids))
            last = turn == turns[-1]
            spans.append(
                (
                    len(ids),
                    self._end(whole, len(ids))
                    if last
                    else self._earlier_end(messages[: turn + 1], text, whole, len(ids)),
                )
            )
        tokens = whole[: spans[-1][1]]
        if tokens[-1:] != [self.tokenizer.eos_id]:
            tokens.append(self.tokenizer.eos_id)
            spans[-1] = (spans[-1][0], len(tokens))
        return tokens, [(start, end) for start, end in spans if start < end]  # an earlier turn may be empty

    def _prompt(self, messages: Sequence[Message], turn: int, text: str) -> str:
        """What the answer of `turn` is sampled after; `text`, the whole chat, begins with it."""
        prompt = self._render(messages[:turn], add_generation_prompt=True)
        if not text.startswith(prompt):
            last = turn == len(messages) - 1
            raise Unusable(
                "template_prefix" if last else "template_rewrites",
                f"the chat template does not write turn {turn + 1} after the prompt that it is sampled from: {_difference(prompt, text)}; "
                + ("give a template whose answers follow its generation prompt by data.template" if last else _ADVICE),
            )
        return prompt

    def _end(self, ids: list[int], begin: int) -> int:
        """Where the answer that ends `ids` ends: behind the special token that closes it, or at the end where the template writes none."""
        closing = next((i for i in range(len(ids) - 1, begin - 1, -1) if ids[i] in self.tokenizer.special_ids), None)
        if (
            closing is None or self.tokenizer.decode(ids[closing + 1 :]).strip()
        ):  # a special token within the answer's own text
            return len(ids)
        return closing + 1

    def _earlier_end(self, messages: Sequence[Message], text: str, whole: list[int], begin: int) -> int:
        """The end of a turn that others follow: where it ends while it is the last one. Unusable where the template changes it later."""
        alone = self._render(messages)
        if not text.startswith(alone):
            raise Unusable(
                "template_rewrites",
                f"the chat template writes turn {len(messages)} otherwise once more turns follow: "
                f"{_difference(alone, text)}; {_ADVICE}",
            )
        ids = self.tokenizer.encode(alone)
        end = self._end(ids, begin)
        if whole[:end] != ids[:end]:
            raise Unusable(
                "token_boundary",
                f"the end of turn {len(messages)} is tokenised otherwise once more turns follow; {_ADVICE}",
            )
        # Some templates leave the last turn open, and close it by EOS when another one follows.
        left_open = not self.tokenizer.special_ids.intersection(ids[begin:end][-1:])
        return end + (left_open and whole[end : end + 1] == [self.tokenizer.eos_id])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.template.render(
                [{"role": m.role, "content": m.content} for m in messages], add_generation_prompt
            )
        except chat_template.RenderError as error:
            raise Unusable("template_error", str(error)) from None

    def _boundary_message(self, whole: list[int], prompt: list[int]) -> str:
        at = next((i for i, (a, b) in enumerate(zip(whole, prompt)) if a != b), len(whole))
        place = slice(max(0, at - 3), at + 3)
        chat, alone = (
            f"ids {ids[place]} ({self.tokenizer.decode(ids[place], special=True)!r})" for ids in (whole, prompt)
        )
        return (
            f"the tokens of the chat do not begin with those of its prompt: token {at + 1}, {chat} in the chat, {alone} in the prompt; "
            "a token joins the end of the prompt and the answer, so no mask fits what is sampled: change how the answer begins (such "
            "as a newline), or the template"
        )


_ADVICE = (
    "train on the last turn alone (data.loss_on=last), or give a template that keeps earlier turns by data.template"
)


def _plain_prompt(record: Record) -> str:
    if record.messages:
        raise Unusable(
            "no_template",
            "a chat needs a chat template, and the model's directory has none (or data.template=none); name a "
            "Jinja file by data.template, or give records with a prompt and a response",
        )
    return record.prompt


def _asked(record: Record) -> Sequence[Message]:
    """The turns before the answer."""
    if not record.messages:
        return (Message("user", record.prompt),)
    return record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages


def _difference(expected: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, text)) if a != b), min(len(expected), len(text)))
    return f"at character {at + 1} expected {expected[max(0, at - 20) : at + 20]!r}, found {text[max(0, at - 20) : at + 20]!r}"
