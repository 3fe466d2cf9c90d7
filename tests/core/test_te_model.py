"""The model of spec te: its fused RoPE and activation, with stand-ins for Transformer Engine's kernels and modules."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import families, small


def _fused_rope(calls):
    """Return TE's unfused definition under the signature of megatron-core's wrapper of the fused kernel."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    def fused_apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_size=1, cp_rank=0):
        assert freqs.dtype == torch.float32 and freqs.shape[1:3] == (1, 1) and cu_seqlens.dtype == torch.int32
        calls.append((cp_size, cp_rank))
        starts, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
        angles = torch.cat([freqs[: end - start] for start, end in zip(starts, ends, strict=True)])
        assert len(angles) == len(t), "the bounds cover the padding too"
        return _apply_rotary_pos_emb_bshd(t[:, None], angles)[:, 0]

    return fused_apply_rotary_pos_emb_thd


class _ThdAttention(torch.nn.Module):
    """Attention [T, heads, dim] of each sequence by itself, as TE's of packed sequences; it rotates nothing."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params, **kwargs):
        assert packed_seq_params.qkv_format == "thd"
        sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in part), is_causal=True, enable_gqa=True
                ).transpose(0, 1)
                for part in parts
            ]
        )


def _te_stand_in(calls):
    """Yield the patches that make a learner of spec te from the modules of spec torch."""
    from megatron.core.models.common.embeddings import rope_utils

    from pctrain.core import weights
    from pctrain.core.layers import spec as layers

    layer_spec, load_hf = layers.layer_spec, weights.load_hf

    def of_torch(spec, config, qk_layernorm=False, vp_stage=None):
        block = layer_spec("torch", config, qk_layernorm, vp_stage)
        config.use_te_activation_func = False  # the layers of te take the activation of the config
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = _ThdAttention
        return block

    yield mock.patch.object(layers, "choose_spec", return_value="te")
    yield mock.patch.object(layers, "layer_spec", of_torch)
    yield mock.patch.object(weights, "load_hf", lambda modules, hf, path, te: load_hf(modules, hf, path, False))
    yield mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", _fused_rope(calls))


def _run(directory, te):
    """Return log-probs, two losses, the calls of the fused RoPE, and the switches of the config."""
    calls = []
    with ExitStack() as stack:
        for patch in _te_stand_in(calls) if te else ():
            stack.enter_context(patch)
        model = small.learner(directory, {})
        config = model.modules[0].config
        before = model.logprobs(small.rows(6), small.BUDGET)
        losses = [small.step(model, i).loss for i in range(2)]
    return before, losses, calls, (config.apply_rope_fusion, config.bias_activation_fusion)


@pytest.mark.parametrize("family", ["llama3", "qwen3-moe"])
def test_fused_rope_and_activation_give_the_same_model(ranks, tmp_path, family):
    """Llama 3 scales its frequencies; experts weigh the fused activation."""
    folder = families.make(family, tmp_path / "hf")
    [(expected, losses, none, off)] = ranks.run(_run, folder, False, world=1)
    [(before, te_losses, calls, on)] = ranks.run(_run, folder, True, world=1)
    assert off == (False, False) and none == [] and on == (True, True)
    assert len(calls) >= 8 and set(calls) == {(1, 0)}
    for ours, theirs in zip(before, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(te_losses, losses, rtol=1e-5)


def test_a_gpu_keeps_less_of_the_activation():
    """On a device that is not the CPU, the gate's activation is computed again for the backward pass."""
    from pctrain.core.layers.swiglu import swiglu

    kept = {}
    for device in ("cpu", "meta"):
        saved = []
        x = torch.randn(8, 20, requires_grad=True, device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            out = swiglu(x)
            kept[device] = sum(t.numel() for t in saved)
            out.sum().backward()
    assert kept == {"cpu": 240, "meta": 160}


def test_the_activation_computed_again_has_the_same_gradient(monkeypatch):
    from pctrain.core.layers import swiglu as module

    x, upstream = torch.randn(8, 20), torch.randn(8, 10)
    gradients = []
    for again in (False, True):
        leaf = x.clone().requires_grad_()
        if again:
            monkeypatch.setattr(module, "_keeps_activated", lambda gate_up: False)
        gradients.append(torch.autograd.grad(module.swiglu(leaf), leaf, upstream)[0])
    assert torch.equal(*gradients)
