"""The torch spec's own autograd nodes, against plain autograd, and how it cuts packs."""

import itertools
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pctrain.core.layers.packed_attention import PackedSDPA, cut
from pctrain.core.layers.rms_norm import RMSNorm
from pctrain.core.layers.rotary import Rotate
from pctrain.core.layers.swiglu import swiglu
from tests.helpers.attention import attend_alone, layout_of


def test_swiglu_is_that_of_autograd():
    torch.manual_seed(0)
    gate_up, upstream = (
        torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 1, 6, dtype=torch.float64),
    )
    gate, up = gate_up.chunk(2, -1)
    expected = F.silu(gate) * up
    ours = swiglu(gate_up)
    torch.testing.assert_close(ours, expected)
    (got,), (want,) = (torch.autograd.grad(out, gate_up, upstream) for out in (ours, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_is_that_of_autograd(scale):
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 48, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x, upstream = (torch.randn(5, 1, 48) * scale).requires_grad_(), torch.randn(5, 1, 48)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    ours, expected = norm(x), F.rms_norm(wide, (48,), weight, 1e-6)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)  # fp32 against float64
    got = torch.autograd.grad(ours, (x, norm.weight), upstream)
    for a, b in zip(got, torch.autograd.grad(expected, (wide, weight), upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_rotation_is_that_of_megatron_core():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    torch.manual_seed(0)
    layout, _ = layout_of([7, 7, 7], 21)
    x = torch.randn(3, 7, 2, 8, dtype=torch.float64, requires_grad=True)
    ours = Rotate.apply(x.reshape(21, 2, 8), *layout.cos_sin(2, torch.float64)).view_as(x)
    expected = _apply_rotary_pos_emb_bshd(x.transpose(0, 1), layout.angles).transpose(0, 1)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(x)
    (got,), (want,) = (torch.autograd.grad(out, x, upstream) for out in (ours, expected))
    torch.testing.assert_close(got, want)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8), st.floats(1.0, 1e7))
def test_buckets_are_the_cheapest_cut_of_the_sorted_lengths(lengths, call):
    """Lengths within 6% of each other are cut together: the cost is at most 1.06 squared above the best of all cuts."""
    lengths = np.array(lengths)
    found = cut(lengths, call)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(lengths)))

    def cost(buckets):
        return sum(call + len(bucket) * float(lengths[bucket].max()) ** 2 for bucket in buckets)

    order = np.argsort(-lengths, kind="stable")
    places = range(1, len(lengths))
    cuts = [np.split(order, at) for n in range(len(lengths)) for at in itertools.combinations(places, n)]
    assert cost(found) <= 1.06**2 * min(cost(buckets) for buckets in cuts)


@pytest.mark.parametrize("lengths, tokens, gathers", [
    ([9, 9, 9, 9], 36, False),        # equal, full: views of the pack
    ([9, 9, 9], 40, False),           # equal, with padding
    ([300, 9, 9], 320, False),        # longest first, equal within buckets: views, put together in order
    ([9, 300, 70, 100, 5], 500, True),
    ([9, 7], 16, True),
    ([9, 9, 300], 320, True),         # views, but another order of buckets than of sequences
], ids=str)  # fmt: skip
def test_attention_of_a_pack_is_that_of_each_sequence(lengths, tokens, gathers):
    torch.manual_seed(0)
    layout, bounds = layout_of(lengths, tokens)
    assert (layout.inverse is not None) == gathers
    q, k, v = (torch.randn(tokens, 1, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    attention = PackedSDPA.__new__(PackedSDPA)
    torch.nn.Module.__init__(attention)
    attention.softmax_scale = 8**-0.5
    ours = attention(q, k, v, None, packed_seq_params=layout)
    assert ours.shape == (tokens, 1, 32) and ours.isfinite().all()
    real = ours[: bounds[-1], 0]
    expected = torch.cat([attend_alone(q[a:b, 0], k[a:b, 0], v[a:b, 0], layout.angles) for a, b in pairwise(bounds)])
    torch.testing.assert_close(real, expected)
    upstream = torch.randn_like(real)
    got, want = (torch.autograd.grad(out, (q, k, v), upstream) for out in (real, expected))
    torch.testing.assert_close(got, want)
