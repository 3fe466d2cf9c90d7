"""The tokenizer of a Hugging Face directory, and the training of a small one for models made from scratch."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from pctrain.common.errors import UserError

# Ids of the trained tokenizer's special pieces; Llama's numbers.
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
# One piece: the model learns to open a box as one decision, and no merge can tie the brace to what stands inside.
BOX = "\\boxed{"


class Tokenizer:
    """Text to ids and back by `tokenizer.json`, the file that vLLM and transformers read too, so the ids are the same everywhere.

    No BOS and no EOS is added: a sequence is prompt_ids + response_ids + [eos_id].
    """

    def __init__(self, hf_dir: Path | str):
        """Raises UserError where tokenizer.json is missing or broken, or no file of the directory names an EOS token."""
        path = Path(hf_dir) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; pctrain, vLLM and transformers share this file. Where a directory has only tokenizer.model, "
                "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it"
            )
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} cannot be read: {error}") from None
        # A file may carry the settings of its last use; a training sample must be neither cut nor padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = _eos_id(Path(hf_dir), self._backend)
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.special_ids = frozenset(
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        _refuse_ids_without_embedding(Path(hf_dir), self._backend)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text without special tokens (EOS), or with them."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model (`tokenizer.model`) trained from the texts; the same texts give the same bytes.

    Byte fallback: every text can be encoded, whatever it was trained on. Digits are split: a number is its digits. No normalisation, no
    space put in front: decode(encode(text)) == text.

    Args:
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
            # Longer lines would be left out without a word; 4192 is the library's default.
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


def _refuse_ids_without_embedding(hf_dir: Path, backend: tokenizers.Tokenizer) -> None:
    rows = read_json(hf_dir / "config.json").get("vocab_size")
    token, largest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1))
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"{hf_dir / 'tokenizer.json'}: token {token!r} has id {largest}, but the embedding has {rows} rows (vocab_size of "
            "config.json): tokenizer and model do not belong together, or the embedding has to be resized first"
        )


def _eos_id(hf_dir: Path, backend: tokenizers.Tokenizer) -> int:
    """The tokenizer's own EOS token; the model's config decides only where the tokenizer names none."""
    token = read_json(hf_dir / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        eos_id = backend.token_to_id(token)
        if eos_id is None:
            raise UserError(
                f"{hf_dir / 'tokenizer_config.json'}: eos_token {token!r} is not in the vocabulary of tokenizer.json"
            )
        return eos_id
    number = read_json(hf_dir / "config.json").get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if type(number) is int and 0 <= number < 2**31:
        return number
    raise UserError(
        f"{hf_dir}: no EOS token: expected eos_token in tokenizer_config.json or eos_token_id in config.json"
    )


def read_json(path: Path) -> dict:
    """A JSON object of a Hugging Face directory; {} where the file is not there."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data
