"""Mixture-of-experts settings that are refused before anything is imported, and the messages."""

import json

import pytest

from pctrain.common.errors import UserError
from pctrain.config.load import load

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    def check(world, *options, experts=True, sections=("model", "parallel", "sft")):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **(EXPERTS if experts else {})}))
        load(None, [f"--model.path={tmp_path}", *options], sections=sections)

    return check


def test_accepted(check):
    check(2, "--parallel.expert=2", "--model.router_aux_loss=0.001")
    check(8, "--parallel.expert=2", "--parallel.tensor=2", "--parallel.sequence_parallel=true", "--parallel.pipeline=2")
    check(2, "--parallel.tensor=2", sections=("model", "parallel"))  # conversion trains nothing
    check(2, "--parallel.tensor=2", experts=False)


@pytest.mark.parametrize(
    "world, options, experts, message",
    [
        (1, ["--model.router_aux_loss=0.001"], False, "model.router_aux_loss = 0.001, but the model has no experts"),
        (1, ["--model.router_aux_loss=-1"], True, "model.router_aux_loss (command line)"),
        (2, ["--parallel.tensor=2"], True, "set parallel.sequence_parallel to true"),
        (4, ["--parallel.tensor=2", "--parallel.expert=2"], True, "parallel.tensor = 2 for a mixture of experts"),
        (2, ["--parallel.expert=2"], False, "parallel.expert = 2, but the model has no experts"),
        (4, ["--parallel.expert=4"], True, "parallel.expert = 4 does not divide the experts: 6"),
        (2, ["--parallel.expert=3"], True, "parallel.expert = 3 does not divide the data parallel size"),
    ],
)
def test_refused(check, world, options, experts, message):
    with pytest.raises(UserError) as error:
        check(world, *options, experts=experts)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_rl_is_training_too(check):
    with pytest.raises(UserError, match=r"parallel\.sequence_parallel to true"):
        check(2, "--parallel.tensor=2", sections=("model", "parallel", "rl"))
