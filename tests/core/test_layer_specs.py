"""Which layer spec is chosen where, and what of the GPU specs can be seen without a GPU."""

from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pctrain.common.errors import UserError
from pctrain.config.tree import ModelConfig, ParallelConfig
from pctrain.core.layers import router_loss, varlen_attention
from pctrain.core.layers import spec as layers
from pctrain.core.layers.varlen_attention import VarlenAttention, VarlenLayout
from pctrain.core.megatron_version import mlp_submodules
from tests.helpers.attention import attend_alone, layout_of


def _choose(model, parallel=None, *, gpu, te=False, varlen=True):
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(layers, "on_gpu", return_value=gpu))
        stack.enter_context(mock.patch.object(layers.importlib.util, "find_spec", return_value=te or None))
        stack.enter_context(mock.patch.object(varlen_attention, "available", return_value=varlen))
        return layers.choose_spec(ModelConfig(**model), ParallelConfig(**parallel or {}))


@pytest.mark.parametrize(
    "machine, model, expected",
    [
        ({"gpu": False}, {}, "torch"),
        ({"gpu": False, "te": True}, {}, "torch"),  # installed, but nothing to run it on
        ({"gpu": True, "te": True}, {"dtype": "bfloat16"}, "te"),
        ({"gpu": True}, {"dtype": "bfloat16"}, "torch-varlen"),
        ({"gpu": True, "varlen": False}, {"dtype": "bfloat16"}, "torch"),
        ({"gpu": True}, {"dtype": "float32"}, "torch"),  # flash attention has no float32
        ({"gpu": True, "te": True}, {"dtype": "float32"}, "torch"),  # Transformer Engine takes TF32 for it
        ({"gpu": True, "te": True}, {"dtype": "float32", "spec": "te"}, "te"),
        ({"gpu": True, "te": True}, {"dtype": "bfloat16", "spec": "torch"}, "torch"),
        ({"gpu": True, "te": True}, {"dtype": "bfloat16", "spec": "torch-varlen"}, "torch-varlen"),
        ({"gpu": True, "te": True}, {"dtype": "bfloat16", "fp8": "blockwise"}, "te"),
    ],
)
def test_the_choice(machine, model, expected):
    assert _choose(model, **machine) == expected


@pytest.mark.parametrize(
    "machine, model, parallel, message",
    [
        ({"gpu": False}, {"spec": "te"}, {}, "model.spec = te needs a CUDA device and Transformer Engine"),
        ({"gpu": True}, {"spec": "te"}, {}, "model.spec = te needs a CUDA device and Transformer Engine"),
        ({"gpu": False}, {"spec": "torch-varlen", "dtype": "bfloat16"}, {}, "torch-varlen needs a CUDA device"),
        ({"gpu": True}, {"spec": "torch-varlen"}, {}, "model.dtype = bfloat16"),
        ({"gpu": True}, {"dtype": "bfloat16"}, {"context": 2}, "parallel.context needs the layer spec te"),
        ({"gpu": True, "te": True}, {}, {"context": 2}, "auto takes it for model.dtype = bfloat16 only"),
        ({"gpu": False}, {"dtype": "bfloat16", "fp8": "blockwise"}, {}, "model.fp8 needs the layer spec te"),
    ],
)
def test_what_cannot_run_is_refused(machine, model, parallel, message):
    with pytest.raises(UserError, match=message):
        _choose(model, parallel, **machine)


@pytest.mark.parametrize("experts", [None, 4])
def test_the_te_spec_is_built_of_transformer_engines_modules(experts):
    """megatron-core's wrappers can be imported without Transformer Engine; their contents are not tested."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs
    from packaging.version import Version

    with ExitStack() as stack:
        for name, value in {"TESpecProvider": provider.TESpecProvider, "TENorm": te.TENorm}.items():
            stack.enter_context(mock.patch.object(gpt_layer_specs, name, value, create=True))
        stack.enter_context(mock.patch("megatron.core.utils.get_te_version", return_value=Version("2.10")))
        spec = layers.layer_spec("te", SimpleNamespace(num_moe_experts=experts), qk_layernorm=True)
    attention = spec.submodules.self_attention.submodules
    assert attention.core_attention is te.TEDotProductAttention
    assert attention.linear_qkv is te.TELayerNormColumnParallelLinear and attention.q_layernorm is te.TENorm
    if experts:
        router_loss.use_in(spec)
        assert mlp_submodules(spec.submodules.mlp).router is router_loss.BalancedRouter


def test_recipes_of_8_bits_reach_the_model():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from pctrain.core import model

    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, bf16=True, **model._FP8[recipe])
        assert config.fp8 == ("hybrid" if recipe == "tensorwise" else "e4m3") and config.fp8_recipe == recipe


# ---- torch's variable-length flash attention


def _of_torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    return _by_definition(query, key, value, cu_seq_q, max_q, scale)


def _of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0) and query.shape[1] == 2 * key.shape[1]
    return _by_definition(query, key, value, cu_seq_q, max_q, scale)


def _of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape[1] == 2 * key.shape[1]
    return _by_definition(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5)


def _by_definition(query, key, value, cu_seqlens, longest, scale):
    bounds = cu_seqlens.tolist()
    assert (
        cu_seqlens.dtype == torch.int32
        and longest == max(b - a for a, b in pairwise(bounds))
        and bounds[-1] == len(query)
    )
    no_turn = torch.zeros(longest, 1, 1, query.shape[-1], dtype=query.dtype)
    query = query * scale * query.shape[-1] ** 0.5  # `attend_alone` scales by 1 / sqrt(dim)
    return torch.cat(
        [
            attend_alone(query[a:b], key[a:b], value[a:b], no_turn).view(b - a, *query.shape[1:])
            for a, b in pairwise(bounds)
        ]
    )


def _attention(scale=8**-0.5):
    attention = VarlenAttention.__new__(VarlenAttention)
    torch.nn.Module.__init__(attention)
    attention.softmax_scale = scale
    return attention


@pytest.fixture
def fresh_options():
    varlen_attention._has_option.cache_clear()
    yield
    varlen_attention._has_option.cache_clear()


@pytest.mark.parametrize("varlen_attn", [_of_torch_2_13, _of_torch_2_11, _of_torch_2_10])
@pytest.mark.parametrize("lengths, tokens", [([9, 9, 9, 9], 36), ([300, 9, 70], 400), ([], 16)], ids=str)
def test_varlen_attention_of_a_pack_is_that_of_each_sequence(fresh_options, varlen_attn, lengths, tokens):
    torch.manual_seed(0)
    bounds = [0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()]
    layout = VarlenLayout.build(torch.tensor(bounds, dtype=torch.int32), tokens)
    # The angles of the bucketed layout's test, as far as the longest piece, padding included.
    layout.angles = layout_of([layout.max_seqlen_q], layout.max_seqlen_q)[0].angles
    q, k, v = (torch.randn(tokens, 1, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    with mock.patch.object(varlen_attention, "_varlen", return_value=SimpleNamespace(varlen_attn=varlen_attn)):
        ours = _attention()(q, k, v, None, packed_seq_params=layout)
    assert ours.shape == (tokens, 1, 32) and ours.isfinite().all()
    if not lengths:
        return
    real = ours[: bounds[-1], 0]
    expected = torch.cat([attend_alone(q[a:b, 0], k[a:b, 0], v[a:b, 0], layout.angles) for a, b in pairwise(bounds)])
    torch.testing.assert_close(real, expected)
    upstream = torch.randn_like(real)
    got, want = (torch.autograd.grad(out, (q, k, v), upstream) for out in (real, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not varlen_attention.available(), reason="needs torch 2.10 or later")
def test_torch_takes_the_call(fresh_options):
    """The real function accepts the arguments, forward and backward, on tensors without data; shapes are right."""
    layout = VarlenLayout.build(torch.tensor([0, 100, 250], dtype=torch.int32), 256)
    layout.angles = torch.empty(150, 1, 1, 64, device="meta")
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "positions"):
        setattr(layout, name, getattr(layout, name).to("meta"))
    q, k, v = (
        torch.empty(256, 1, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2)
    )
    out = _attention(64**-0.5)(q, k, v, None, packed_seq_params=layout)
    assert out.shape == (256, 1, 512) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def _begin(folder):
    from pctrain.config.tree import Config, RunConfig
    from pctrain.core.session import begin

    with begin(Config(run=RunConfig(dir=folder), model=ModelConfig(spec="te"))):
        pass


def test_a_run_that_cannot_start_writes_nothing(ranks, tmp_path):
    from tests.helpers.ranks import RanksFailed

    with pytest.raises(RanksFailed, match=r"model\.spec = te needs"):
        ranks.run(_begin, tmp_path / "run", world=1)
    assert not (tmp_path / "run").exists()
