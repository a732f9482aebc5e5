"""Gated cross-attention: who sees what, and that a row that sees nothing is changed by nothing."""

from dataclasses import replace

import pytest
import torch

from nvlm_kernels import tile_attention
from nvlm_runtime.config import CrossConfig
from nvlm_runtime.model.cross import GatedCrossAttention
from tests.small import CROSS, TEXT, randomise

SWITCHES = [(placement, ffn) for placement in ("inside", "before") for ffn in ("none", "swiglu", "gelu4x")]


def dense_attention(q, k, v, intervals):
    """A loop over rows and heads, in the input's dtype."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            start, end = intervals[b, t].tolist()
            for h in range(q.shape[2] if end > start else 0):
                scores = k[b, start:end, h // group] @ q[b, t, h] * q.shape[3] ** -0.5
                out[b, t, h] = scores.softmax(0) @ v[b, start:end, h // group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tile_attention_is_the_loop(kv_heads):
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 7, kv_heads, 8, dtype=torch.float64)
    intervals = torch.tensor([[[0, 7], [0, 0], [2, 5], [6, 7], [3, 3]], [[1, 2], [0, 3], [5, 2], [0, 7], [7, 7]]])
    torch.testing.assert_close(tile_attention(q, k, v, intervals), dense_attention(q, k, v, intervals))


def test_tile_attention_rows_that_see_nothing():
    q = torch.randn(1, 3, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 6, 2, 8).unbind()
    k, v = k.requires_grad_(), v.requires_grad_()
    intervals = torch.tensor([[[0, 0], [0, 4], [5, 5]]])
    out = tile_attention(q, k, v, intervals)
    assert torch.equal(out[0, [0, 2]], torch.zeros(2, 4, 8))
    out.sum().backward()
    assert torch.equal(q.grad[0, [0, 2]], torch.zeros(2, 4, 8))
    assert q.grad[0, 1].abs().min() > 0
    for grad in (k.grad, v.grad):
        assert torch.isfinite(grad).all()
        assert torch.equal(grad[0, 4:], torch.zeros(2, 2, 8)), "keys nobody sees get no gradient"


def test_tile_attention_without_images():
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    empty = torch.zeros(2, 0, 2, 8)
    out = tile_attention(q, empty, empty, torch.zeros(2, 3, 2, dtype=torch.int64))
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize(
    ("q", "k", "intervals"),
    [
        ((1, 3, 4, 8), (1, 6, 3, 8), (1, 3, 2)),
        ((1, 3, 4, 8), (2, 6, 2, 8), (1, 3, 2)),
        ((1, 3, 4, 8), (1, 6, 2, 4), (1, 3, 2)),
        ((1, 3, 4, 8), (1, 6, 2, 8), (1, 2, 2)),
        ((3, 4, 8), (1, 6, 2, 8), (1, 3, 2)),
    ],
    ids=["heads", "batch", "head_dim", "intervals", "rank"],
)
def test_tile_attention_rejects(q, k, intervals):
    with pytest.raises(ValueError, match="tile_attention"):
        tile_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), torch.zeros(intervals, dtype=torch.int64))


def test_tile_attention_rejects_float_intervals():
    with pytest.raises(ValueError, match="int32 or int64"):
        tile_attention(torch.zeros(1, 1, 1, 8), *torch.zeros(2, 1, 1, 1, 8), torch.zeros(1, 1, 2))


@pytest.mark.parametrize(("placement", "ffn"), SWITCHES)
def test_a_row_that_sees_nothing_is_unchanged(placement, ffn):
    layer = randomise(GatedCrossAttention(TEXT, CrossConfig((0,), placement, ffn)))
    x = torch.randn(1, 4, TEXT.hidden_size, requires_grad=True)
    k, v = layer.keys_values(torch.randn(1, 6, TEXT.hidden_size), torch.arange(6))
    out = layer(x, None, k, v, torch.tensor([[[0, 0], [0, 6], [3, 3], [2, 4]]]))
    assert torch.equal(out[0, [0, 2]], x[0, [0, 2]])
    assert (out[0, [1, 3]] != x[0, [1, 3]]).any(-1).all()
    (grad,) = torch.autograd.grad(out[0, [0, 2]].sum(), x)
    assert torch.equal(grad[0, [0, 2]], torch.ones(2, TEXT.hidden_size)), "the residual alone"


def test_the_layer_is_its_formula():
    layer = randomise(GatedCrossAttention(TEXT, CrossConfig((0,), ffn="swiglu"))).double()
    x, image = torch.randn(1, 3, 48, dtype=torch.float64), torch.randn(1, 5, 48, dtype=torch.float64)
    k, v = layer.keys_values(image, torch.arange(image.shape[1]))
    rms = lambda t, w: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    q = (rms(x, layer.norm.weight) @ layer.q_proj.weight.T).unflatten(-1, (6, 8))
    want_k = (image @ layer.k_proj.weight.T).unflatten(-1, (2, 8))
    want_v = (image @ layer.v_proj.weight.T).unflatten(-1, (2, 8))
    torch.testing.assert_close(k, want_k)
    everything = torch.tensor([[[0, 5]] * 3])
    y = x + layer.gate.tanh() * (dense_attention(q, want_k, want_v, everything).flatten(2) @ layer.o_proj.weight.T)
    z = rms(y, layer.ffn_norm.weight)
    gate, up = z @ layer.gate_proj.weight.T, z @ layer.up_proj.weight.T
    want = y + layer.ffn_gate.tanh() * ((gate * gate.sigmoid() * up) @ layer.down_proj.weight.T)
    torch.testing.assert_close(layer(x, None, k, v, everything), want)


def test_positions_tell_equal_keys_apart():
    """Without positions attention cannot see the order of its keys; with them it can."""
    image = torch.randn(1, 6, 48)
    x, everything = torch.randn(1, 2, 48), torch.tensor([[[0, 6]] * 2])
    for positions, same in (("none", True), ("sinusoidal", False)):
        layer = randomise(GatedCrossAttention(TEXT, CrossConfig((0,), positions=positions)))
        out = layer(x, None, *layer.keys_values(image, torch.arange(image.shape[1])), everything)
        turned = layer(x, None, *layer.keys_values(image.flip(1), torch.arange(6)), everything)
        assert torch.allclose(out, turned, atol=1e-6) == same


@pytest.mark.parametrize("ffn", ["none", "swiglu", "gelu4x"])
def test_gates_begin_closed(ffn):
    layer = GatedCrossAttention(TEXT, replace(CROSS, ffn=ffn))
    gates = {name: gate.item() for name, gate in layer.named_parameters() if name.endswith("gate")}
    assert gates == ({"gate": 0} if ffn == "none" else {"gate": 0, "ffn_gate": 0})
