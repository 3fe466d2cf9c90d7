"""Hugging Face directories with published chat templates and special tokens, and small byte-level BPE tokenizers.

The tokenizers are trained from a few lines, with the pattern that Llama 3 and Qwen use to split text. Their merges
differ from the models' own; the places where tokens may be cut do not.
"""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# {template: (special tokens, added tokens that are not special, bos, eos)}, from the models' tokenizer_config.json.
MODELS = {
    "llama3": (LLAMA, [], "<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": (LLAMA, [], "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2_5": (CHATML, ["<tool_call>", "</tool_call>"], None, "<|im_end|>"),
    "qwen3": (CHATML, ["<think>", "</think>"], None, "<|im_end|>"),
    "chatml": (CHATML, [], None, "<|im_end|>"),
    "chatml_vllm": (CHATML, [], None, "<|im_end|>"),
}
TEXT = [
    "What is 12 + 30? The answer is \\boxed{42}.\n\nassistant user",
    "Let me think: 12 + 30 = 42.\n",
    "naïve 你好 😀",
    "don't\n\n\n  x",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make(folder: Path, name: str, *, eos: str | None = None) -> Path:
    """Write the directory of model `name`: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    special, added, bos, own_eos = MODELS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 8, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos or own_eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": tokenizer.get_vocab_size()}))
    shutil.copy(TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
    return folder
