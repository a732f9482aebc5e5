"""int8 linears of the vision encoder: the formula in fp64, how far it may lie from the float layer, and what is
refused.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_kernels import native
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model.quantize import Int8DynamicLinear, quantize, quantize_rows
from nvlm_runtime.model.vision import InternViT
from tests.small import VISION, randomise

SHAPES = [(1025, 64, 96), (1, 1, 1), (17, 33, 5), (3, 4096, 40)]


def linear(size: int, num_features: int, bias: bool = True) -> nn.Linear:
    layer = randomise(nn.Linear(size, num_features, bias=bias))
    layer.weight.data *= torch.logspace(-2, 1, num_features)[:, None]  # a scale a row is needed
    return layer


def rows(num: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(num, size, generator=torch.Generator().manual_seed(num))
    return (x * torch.logspace(-3, 3, num)[:, None]).to(dtype)


def formula(x: Tensor, layer: Int8DynamicLinear) -> Tensor:
    """The product of the quantised operands in fp64."""
    xq, scale = quantize_rows(x)
    y = xq.double() @ layer.weight.double().T * scale.double() * layer.scale.double()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(library, shape, dtype, bias, is_native):
    num, size, num_features = shape
    layer, x = Int8DynamicLinear.of(linear(size, num_features, bias)), rows(num, size, dtype)
    layer.native = library if is_native else None
    want = formula(x, layer)
    half_ulp = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]
    product = (want if layer.bias is None else want - layer.bias.double()).abs()
    bound = 1.001 * half_ulp * want.abs() + 3 * 2**-24 * (
        product + want.abs()
    )  # the store's rounding, fp32's before it
    assert ((layer(x).double() - want).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_near_the_float_layer(shape):
    """At most half a step an activation and half a step a weight."""
    num, size, num_features = shape
    plain, x = linear(size, num_features), rows(num, size, torch.float32)
    layer = Int8DynamicLinear.of(plain)
    w, x64 = plain.weight.detach().double(), x.double()
    step_x, step_w = x64.abs().amax(-1, keepdim=True) / 127, w.abs().amax(-1) / 127
    moved = x64.abs() + step_x / 2
    bound = step_x / 2 * w.abs().sum(-1) + moved.sum(-1, keepdim=True) * step_w / 2
    want = F.linear(x64, w, plain.bias.detach().double())
    with torch.no_grad():
        assert ((layer(x).double() - want).abs() <= 1.0001 * bound + 1e-5 * want.abs()).all()


def test_rows_are_symmetric_and_alone():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [-3e4, 2e4, 1.0], [1e-30, 0.0, 0.0]])
    quantized, scale = quantize_rows(x)
    assert quantized.tolist() == [[64, -127, 32], [0, 0, 0], [-127, 85, 0], [127, 0, 0]]
    assert (scale > 0).all(), "0 / 0 in int8 is whatever the machine makes of it"
    torch.testing.assert_close(scale[[0, 2], 0], torch.tensor([2.0, 3e4]) / 127)
    layer = Int8DynamicLinear.of(linear(3, 4))
    assert torch.equal(layer(x)[1], layer.bias), "a row of zeros"
    for row in range(len(x)):
        assert torch.equal(layer(x[row]), layer(x)[row]), "bit for bit"


@pytest.mark.parametrize("shape", [(2, 3, 8), (8,), (0, 8), (2, 0, 8)], ids=str)
def test_any_leading_shape(shape):
    layer, x = Int8DynamicLinear.of(linear(8, 5)), torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 5)
    strided = torch.randn(*shape[:-1], 16)[..., ::2]
    assert torch.equal(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("flavour", ["6b", "300m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vision_encoder_stays_near(flavour, dtype):
    config = replace(VISION, image_size=128)
    if flavour == "300m":
        config = replace(config, norm_type="layer_norm", qk_normalization=False, qkv_bias=True, num_dummy_heads=0)
    vision_encoder = randomise(InternViT(config)).to(dtype)
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        want = vision_encoder(pixels).flatten(1).double()
        quantize(vision_encoder, {"vision": "int8_dynamic"})
        out = vision_encoder(pixels)
    layers = [module for module in vision_encoder.modules() if isinstance(module, Int8DynamicLinear)]
    assert len(layers) == 4 * config.num_hidden_layers
    assert not any(isinstance(module, nn.Linear) for module in vision_encoder.modules())
    assert out.dtype == dtype
    cosine = F.cosine_similarity(out.flatten(1).double(), want)
    assert (cosine > 0.999).all() and (cosine < 1 - 1e-9).all()


def test_micro_model_answers_the_same():
    model = NVLM.load("micro-d")
    ask = {"images": ["examples/receipt.png"], "max_new_tokens": 16}
    want = model.generate("What is the total?", **ask).text
    quantize(model.model, {"vision": "int8_dynamic"})
    assert model.generate("What is the total?", **ask).text == want


def test_rejects():
    layer = Int8DynamicLinear.of(linear(8, 5))
    with pytest.raises(ValueError, match=r"expected bf16 or fp32 \[\*, 8\]"):
        layer(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="float16"):
        layer(torch.zeros(2, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="no gradient"):
        layer(torch.zeros(2, 8, requires_grad=True))
    broken = linear(8, 5)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Int8DynamicLinear.of(broken)
    with pytest.raises(ValueError, match="on the CPU"):
        Int8DynamicLinear.of(nn.Linear(8, 5, device="meta"))


def test_a_vision_encoder_is_quantised_whole_once_or_not_at_all():
    vision_encoder = randomise(InternViT(VISION))
    with pytest.raises(ValueError, match="vision can be int8_dynamic, got 'int4'"):
        quantize(vision_encoder, {"vision": "int4"})
    vision_encoder.encoder.layers[1].mlp.fc2.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        quantize(vision_encoder, {"vision": "int8_dynamic"})
    assert not any(isinstance(module, Int8DynamicLinear) for module in vision_encoder.modules()), "all or none"
    vision_encoder.encoder.layers[1].mlp.fc2.weight.data[0, 0] = 0
    quantize(vision_encoder, {"vision": "int8_dynamic"})
    with pytest.raises(ValueError, match="no floating linears in vision"):
        quantize(vision_encoder, {"vision": "int8_dynamic"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 64), (5, 1000), (0, 8)], ids=str)
def test_native_rows_are_torchs(library, shape, dtype):
    """Bit for bit, halves and zeros and the smallest numbers among them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2:3] = 0
    x[3:4] *= 1e-38
    x[1:2] = (torch.arange(shape[1]) % 255 - 127).to(dtype) / 2
    want, scale = quantize_rows(x)
    got, got_scale = native.quantize_rows(library, x)
    assert got.equal(want) and got_scale.equal(scale[:, 0])


@torch.no_grad()
def test_a_native_layer_gives_the_same(library):
    """On more rows than a block, and nan where a row is not finite."""
    linear = nn.Linear(96, 40).bfloat16()
    layer, x = Int8DynamicLinear.of(linear), torch.randn(2, 700, 96).bfloat16()
    want = layer(x)
    layer.native = library
    torch.testing.assert_close(layer(x), want, rtol=2**-7, atol=0)
    strided = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    assert torch.equal(layer(strided), layer(x))
    x[0, 3, 5], x[1, 4, 0] = float("inf"), float("nan")
    got = layer(x)
    assert got[0, 3].isnan().all() and got[1, 4].isnan().all() and got.isnan().any(-1).sum() == 2


def test_native_passes_refuse(library):
    x, products, ones = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(3)
    for call, said in (
        (lambda: native.quantize_rows(library, x[0]), r"expected x \[M, K\], got \[3\]"),
        (lambda: native.quantize_rows(library, x.half()), r"expected x bfloat16 or float32 \[2, 3\]"),
        (lambda: native.quantize_rows(library, x.t()), "contiguous on the CPU"),
        (lambda: native.scale_products(library, products, ones, ones, None, x), r"expected scale_x float32 \[2\]"),
        (lambda: native.scale_products(library, x, ones[:2], ones, None, x), "expected products int32"),
        (lambda: native.scale_products(library, products, ones[:2], ones, ones[:2], x), r"expected bias float32 \[3\]"),
        (lambda: native.scale_products(library, products, ones[:2], ones, None, x.t()), "expected out bfloat16 or"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
