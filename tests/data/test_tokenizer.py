"""One Hugging Face directory, one set of ids: trainer (tokenizers), SentencePiece and transformers."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import ArchitectureConfig, Config, ProblemsConfig, SourceConfig
from pctrain.data import arithmetic
from pctrain.data import scratch_model as hf_dir
from pctrain.data.rows import make_row
from pctrain.hf.tokenizer import BOX, Tokenizer, train_sentencepiece

PROBLEMS = ProblemsConfig(train=300, validation=20, test=20, rl=20)
SETS = arithmetic.generate(PROBLEMS, 0)
TEXTS = [text for r in SETS["train"] for text in (r.prompt, r.response)]
TINY = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64}
# Text in which nobody could mean a special token: tokenizers reads "</s>" as EOS wherever it stands, SentencePiece as
# four characters.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<\0"), max_size=60)
FRAGMENTS = [*"0123456789+-=;}{,", BOX, " so ", " then ", "th", "en", "giv", "ing", " ", "\\", "box"]
LIKE_TRAINING = st.lists(st.sampled_from(FRAGMENTS), max_size=40)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return hf_dir.make_hf_dir(
        tmp_path_factory.mktemp("hf") / "model", ArchitectureConfig(**TINY), TEXTS, vocab_size=320, seed=3
    )


@pytest.fixture(scope="module")
def encoders(directory):
    from transformers import AutoTokenizer

    piece = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return Tokenizer(directory), piece, AutoTokenizer.from_pretrained(directory)


@given(st.one_of(PLAIN, LIKE_TRAINING.map("".join), st.sampled_from(TEXTS)))
def test_ids_agree_and_decode_gives_the_text_back(encoders, text):
    ours, piece, transformers = encoders
    ids = ours.encode(text)
    assert ids == piece.encode(text) == transformers.encode(text)  # so transformers adds no BOS
    assert ours.decode(ids) == piece.decode(ids) == transformers.decode(ids) == text
    assert ours.encode_all([text, text]) == [ids, ids]


def test_special_tokens(encoders):
    ours, piece, transformers = encoders
    assert ours.eos_id == piece.eos_id() == transformers.eos_token_id == 2
    assert ours.vocab_size == piece.vocab_size() == len(transformers)
    ids = ours.encode("so \\boxed{12}")
    assert ids.count(ours.encode(BOX)[0]) == 1 and len(ours.encode("12")) == 2  # a box is one piece, a digit too
    assert set(transformers.all_special_tokens) == {"<unk>", "<s>", "</s>"}
    # An answer must survive a decode that leaves out EOS.
    for decode in (ours.decode, lambda i: transformers.decode(i, skip_special_tokens=True)):
        assert decode([*ids, ours.eos_id]) == "so \\boxed{12}"


def test_transformers_loads_the_model(directory):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.dtype == torch.float32 and model.config.vocab_size == Tokenizer(directory).vocab_size
    assert (
        model.config.max_position_embeddings == 64
        and model.config.tie_word_embeddings
        and model.config.num_key_value_heads == 2
    )
    assert model.config.eos_token_id == 2
    with torch.no_grad():
        logits = model(torch.tensor([Tokenizer(directory).encode(TEXTS[1])])).logits
    # Not trained: the mean loss is that of a uniform guess over the vocabulary, to the few percent of its initial
    # logits.
    guesses = torch.randint(0, 300, (logits.shape[1],), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(logits[0], guesses)
    assert float(loss) == pytest.approx(np.log(model.config.vocab_size), rel=0.05)


def test_initial_weights_are_seeded_and_scaled():
    architecture = ArchitectureConfig(layers=8, hidden=64, heads=4, kv_heads=2, ffn=96, tied=False)
    a, b, c = (hf_dir.initial_weights(architecture, 300, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a[name], b[name]) for name in a) and not np.array_equal(
        a["lm_head.weight"], c["lm_head.weight"]
    )
    assert all(w.dtype == np.float32 for w in a.values())
    # The estimate of a standard deviation from n >= 2048 values is good to 1 / sqrt(2 n) = 1.6 %; five of those.
    assert a["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.08)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert a[f"model.layers.0.{name}.weight"].std() == pytest.approx(0.02 / 4, rel=0.08)
    assert "lm_head.weight" not in hf_dir.initial_weights(ArchitectureConfig(**TINY), 300, 0)


def test_the_same_config_gives_the_same_bytes(tmp_path):
    config = Config()
    config.data.train = [SourceConfig(path=arithmetic.write_sets(PROBLEMS, 0, tmp_path / "data")["train"])]
    a, b = (
        hf_dir.make(tmp_path / name, config.model.architecture, config.data, config.run.seed) for name in ("a", "b")
    )
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(p.name for p in a.iterdir()) == names
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "data"]  # nothing else is left


def test_a_directory_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        hf_dir.make_hf_dir(tmp_path, ArchitectureConfig(**TINY), TEXTS, vocab_size=320, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_dir, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_dir.make_hf_dir(tmp_path / "model", ArchitectureConfig(**TINY), TEXTS, vocab_size=320, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_training_a_tokenizer(capfd):
    assert train_sentencepiece(TEXTS, 320) == train_sentencepiece(TEXTS, 320)
    small = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(["ab"], 5000))
    assert small.vocab_size() < 300  # the bound is soft
    long = "x" * 9000 + "é"  # beyond SentencePiece's default limit of 4192 bytes a line
    model = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece([long], 400))
    assert "é" in [model.id_to_piece(i) for i in range(model.vocab_size())]
    with pytest.raises(UserError, match=r"data.problems.vocab_size = 280 is too small .*; 360 is enough"):
        train_sentencepiece([chr(0x4E00 + i) for i in range(100)], 280)
    train_sentencepiece([chr(0x4E00 + i) for i in range(100)], 360)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], 300)
    assert capfd.readouterr().err == ""


def test_eos_of_other_directories(directory, tmp_path):
    def variant(tokenizer_config, config):
        target = tmp_path / "variant"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
        (target / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (target / "config.json").write_text(json.dumps(config))
        return Tokenizer(target)

    assert (
        variant({"eos_token": {"content": "</s>", "special": True}}, {"eos_token_id": 5}).eos_id == 2
    )  # the tokenizer's own goes first
    assert variant({}, {"eos_token_id": 7}).eos_id == 7
    assert variant({"eos_token": None}, {"eos_token_id": [8, 9]}).eos_id == 8
    with pytest.raises(UserError, match="not in the vocabulary"):
        variant({"eos_token": "<|im_end|>"}, {})
    with pytest.raises(UserError, match="no EOS token"):
        variant({}, {})


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json does not exist"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        Tokenizer(tmp_path)


# ---- rows


def test_streams_are_spread_over_the_row():
    row = make_row([1, 2], [3], {"advantage": -0.5})
    assert row.streams["advantage"].tolist() == [-0.5] * 3 and row.streams["advantage"].dtype == np.float32
    with pytest.raises(ValueError, match="at least one prompt token"):
        make_row([], [3])


def test_a_tokenizer_larger_than_the_embedding_is_refused(directory, tmp_path):
    import json
    import shutil

    shutil.copytree(directory, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    rows = Tokenizer(directory).vocab_size - 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}))
    with pytest.raises(UserError, match=f"has id {rows}, but the embedding has {rows} rows"):
        Tokenizer(tmp_path / "model")
