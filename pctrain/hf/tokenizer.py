"""The tokenizer of a Hugging Face directory with its EOS token, and a trained one for models made from scratch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from pctrain.common.errors import UserError
from pctrain.files import json_file
from pctrain.hf.config import read_raw
from pctrain.hf.directory import CONFIG, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, is_hf_directory

# Ids of the trained tokenizer's special pieces; Llama's numbers.
UNKNOWN_ID = 0
BOS_ID = 1
EOS_ID = 2
# One piece: the model learns to open a box as one decision, and no merge can tie the brace to the answer inside.
BOX = "\\boxed{"


class Tokenizer:
    """A tokenizer: text to ids and back by `tokenizer.json`, the file that vLLM and transformers read too.

    No BOS and no EOS is added: a sequence is prompt_ids + response_ids + [eos_id].

    eos_id: the token that ends a response, in SFT, RL and evaluation alike.
    model_eos_ids: the tokens that end a text according to config.json; evaluation compares them with `eos_id`.
    """

    def __init__(self, hf_dir: Path | str) -> None:
        """Read the tokenizer of a directory.

        Raises:
            UserError: tokenizer.json is missing or broken, or no file of the directory names an EOS token.
        """
        hf_dir = Path(hf_dir)
        path = hf_dir / TOKENIZER
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; pctrain, vLLM and transformers share this file. If a directory has only "
                "tokenizer.model, transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it"
            )
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} cannot be read: {error}") from None
        # A file may carry the settings of its last use; a training sample must be neither cut nor padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        config = read_raw(hf_dir) if is_hf_directory(hf_dir) else {}
        self.model_eos_ids = _eos_ids(config)
        self.eos_id = _eos_id(hf_dir, self._backend, self.model_eos_ids)
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.special_ids = frozenset(
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        _refuse_ids_without_embedding(path, self._backend, config.get("vocab_size"))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids, without special tokens (EOS) or with them."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)


def special_tokens(hf_dir: Path) -> dict[str, str]:
    """Return the special tokens of a directory by name, such as {"bos_token": "<s>"}.

    tokenizer_config.json names them. The older special_tokens_map.json takes precedence if the config does not list the
    added tokens: this is transformers' rule.
    """
    config = read_tokenizer_config(hf_dir)
    entries = config
    if "added_tokens_decoder" not in config:
        entries = config | _read_optional(hf_dir / SPECIAL_TOKENS)
    texts = {key: _token_text(value) for key, value in sorted(entries.items()) if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text is not None}


def read_tokenizer_config(hf_dir: Path) -> dict[str, Any]:
    """Return tokenizer_config.json as it is, or {} if there is none."""
    return _read_optional(hf_dir / TOKENIZER_CONFIG)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model (`tokenizer.model`) from texts; the same texts give the same bytes.

    Byte fallback: every text can be encoded, whatever the model was trained on. Digits are split: a number is its
    digits. There is no normalization and no space put in front: decode(encode(text)) == text.

    Args:
        texts: the training corpus.
        vocab_size: upper bound; a small corpus may not have as many pieces.
    Raises:
        UserError: the bound is below 256 bytes + 4 special pieces + the characters of the texts.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("there is no text to train a tokenizer from")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            user_defined_symbols=[BOX],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=UNKNOWN_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            # Longer lines would be left out silently; 4192 is the library's default.
            max_sentence_length=max(4192, *(1 + len(line.encode()) for line in lines)),
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = 256 + 4 + len({character for line in lines for character in line})
        if vocab_size < needed:
            raise UserError(
                f"data.problems.vocab_size = {vocab_size} is too small for the characters of the training text; "
                f"{needed} is enough for single characters, more for words"
            ) from None
        raise UserError(f"SentencePiece could not train a tokenizer: {error}") from None
    return model.getvalue()


def _refuse_ids_without_embedding(path: Path, backend: tokenizers.Tokenizer, rows: object) -> None:
    """Raise UserError if a token's id is beyond the embedding. `rows`: vocab_size of config.json."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"{path}: token {token!r} has id {largest}, but the embedding has {rows} rows (vocab_size of {CONFIG}): "
            "tokenizer and model do not belong together, or the embedding has to be resized first"
        )


def _eos_id(hf_dir: Path, backend: tokenizers.Tokenizer, model_eos_ids: Sequence[int]) -> int:
    """Return the tokenizer's own EOS token; config.json decides only if the tokenizer names none."""
    token = _token_text(read_tokenizer_config(hf_dir).get("eos_token"))
    if token is not None:
        eos_id = backend.token_to_id(token)
        if eos_id is None:
            raise UserError(f"{hf_dir / TOKENIZER_CONFIG}: eos_token {token!r} is not in the vocabulary of {TOKENIZER}")
        return eos_id
    if model_eos_ids:
        return model_eos_ids[0]
    raise UserError(f"{hf_dir}: no EOS token: expected eos_token in {TOKENIZER_CONFIG} or eos_token_id in {CONFIG}")


def _eos_ids(config: dict[str, Any]) -> list[int]:
    """Return the ids under eos_token_id of config.json, which has one or a list. Other values are left out."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return [number for number in ids if type(number) is int and 0 <= number < 2**31]


def _token_text(entry: object) -> str | None:
    """Return the text of a special token, which a file gives as text or as an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, or {} if the file does not exist."""
    return json_file.read_object(path, "Download it again") if path.is_file() else {}
