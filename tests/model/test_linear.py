"""bf16 products in fp32: how exact, which inputs, and that a model of them is the same model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model import linear
from nvlm_runtime.model.linear import (
    InferenceLinear,
    computes_in_fp32,
    fp32_is_faster,
    with_inference_linears,
    with_plain_linears,
)
from nvlm_runtime.model.weight_only import Int4Linear, Int8Linear
from tests.small import micro_tokenizer, small_model


@pytest.fixture
def fast_fp32(monkeypatch):
    monkeypatch.setattr(linear, "fp32_is_faster", lambda: True)


def layers(bias: bool) -> tuple[nn.Linear, InferenceLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(192, 5000, bias=bias).bfloat16()  # three blocks, the last one short
    ours = with_inference_linears(nn.Sequential(plain))[0]
    assert ours.weight is plain.weight
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_is_as_exact_as_torch(fast_fp32, bias):
    plain, ours = layers(bias)
    x = torch.randn(2, 128, 192).bfloat16()
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    error, allowed = ((y.double() - exact).abs().max() for y in (ours(x), plain(x)))
    assert ours(x).dtype == torch.bfloat16 and error <= allowed
    nearest = exact.bfloat16()
    # rounded once: all but what stood on a boundary between two bf16 numbers
    assert (ours(x) != nearest).double().mean() < 0.005


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@torch.no_grad()
def test_quantised_weights_are_not_rounded_to_bf16(fast_fp32, kind):
    plain, _ = layers(True)
    layer = kind.of(plain)
    x = torch.randn(1, 130, 192).bfloat16()
    exact = F.linear(x.double(), layer.dense(torch.float32).double(), plain.bias.double())
    assert (layer(x) != exact.bfloat16()).double().mean() < 0.005


@torch.no_grad()
def test_only_long_bf16_inputs_without_gradients(fast_fp32, monkeypatch):
    x = torch.zeros(1, 128, 8, dtype=torch.bfloat16)
    assert computes_in_fp32(x)
    assert not computes_in_fp32(x.float()) and not computes_in_fp32(x[:, :127])
    assert not computes_in_fp32(x.to("meta"))
    with torch.enable_grad():
        assert not computes_in_fp32(x)
    monkeypatch.setattr(linear, "fp32_is_faster", lambda: False)
    assert not computes_in_fp32(x)


@torch.no_grad()
def test_a_tile_has_its_bits_in_any_batch(fast_fp32):
    _, ours = layers(True)
    x = torch.randn(300, 16, 192).bfloat16()
    assert not computes_in_fp32(x), "300 short tiles are as short as one"
    x = torch.randn(3, 128, 192).bfloat16()
    assert torch.equal(ours(x)[1:2], ours(x[1:2]))


def test_trains_as_torch_does(fast_fp32):
    plain, ours = layers(True)
    x = torch.randn(1, 128, 192).bfloat16()
    want = torch.autograd.grad(plain(x).float().square().sum(), list(plain.parameters()))
    got = torch.autograd.grad(ours(x).float().square().sum(), list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("bf16", "fp32", "faster"), [(2.0, 1.0, True), (1.0, 2.7, False), (1.1, 1.0, False)])
def test_the_faster_product_is_measured(monkeypatch, bf16, fp32, faster):
    """On a clock that runs as a machine of each kind would make it; noise in one of five turns changes nothing."""
    now, turns = [0.0], []

    def product(x, w):
        turns.append(x.dtype)
        now[0] += {torch.bfloat16: bf16, torch.float32: fp32}[x.dtype] * (9 if len(turns) in (3, 6) else 1)
        return x

    monkeypatch.setattr(linear.F, "linear", product)
    monkeypatch.setattr(linear.time, "perf_counter", lambda: now[0])
    assert fp32_is_faster.__wrapped__() is faster
    assert turns.count(torch.bfloat16) == turns.count(torch.float32) == 5


def test_the_measurement_is_made_once():
    fp32_is_faster()
    before = fp32_is_faster.cache_info().misses
    fp32_is_faster()
    assert fp32_is_faster.cache_info().misses == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_engines_replace_them_in_bf16_on_a_cpu(dtype):
    model = small_model("x").to(dtype)
    names = set(dict(model.named_parameters()))
    view = NVLM(model, micro_tokenizer(), native=False).model
    types = {type(module) for module in view.modules() if isinstance(module, nn.Linear)}
    assert types == {InferenceLinear if dtype == torch.bfloat16 else nn.Linear}
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert set(dict(view.named_parameters())) == names


def test_plain_linears_share_the_weights():
    model = with_inference_linears(small_model("x"))
    twin = with_plain_linears(model)
    assert not any(isinstance(module, InferenceLinear) for module in twin.modules())
    assert any(isinstance(module, InferenceLinear) for module in model.modules())
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
