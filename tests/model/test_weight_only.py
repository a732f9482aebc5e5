"""8- and 4-bit weights: what they hold, the native products, and whole models on them."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvlm_kernels import native
from nvlm_runtime.engine.native import NativeDecoder
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model.quantize import quantize
from nvlm_runtime.model.weight_only import Int4Linear, Int8Linear, dense_weight
from tests.engine.test_batch import LARGE, fresh, vars_of
from tests.small import small_engine, small_model

KINDS = {"int8": Int8Linear, "int4": Int4Linear}
SIZES = [(1, 1), (3, 16), (5, 31), (7, 32), (33, 100), (20, 128), (9, 129), (64, 448), (17, 896), (5, 1200), (9, 2100)]


def linear(rows, cols, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(cols, rows, bias=bias)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_within_half_a_step_a_row(size):
    dense = linear(*size)
    quantized = Int8Linear.of(dense)
    step = dense.weight.abs().amax(-1, keepdim=True) / 127
    assert ((quantized.dense(torch.float32) - dense.weight).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int4_is_within_half_a_step_a_group(size):
    """But for a value at the far end of the other sign, which has no code: at most a whole step off."""
    dense = linear(*size)
    quantized = Int4Linear.of(dense)
    got = quantized.dense(torch.float32)
    for group in range(-(-size[1] // 32)):
        part = slice(32 * group, 32 * group + 32)
        want = dense.weight[:, part]
        step = want.abs().amax(-1, keepdim=True) / 8
        error = (got[:, part] - want).abs()
        assert (error <= 1.02 * step).all()
        inner = want.abs() <= 7 * step
        assert (error[inner] <= (0.52 * step.expand_as(want))[inner]).all()


def test_int4_keeps_what_it_can_hold():
    """Every code in every place of a block: a wrong nibble or lane would show."""
    codes = torch.randint(-8, 8, (16, 256), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = -8
    dense = nn.Linear(256, 16, bias=False)
    dense.weight.data = codes * torch.tensor([0.5, 1.0, 2.0, 0.25]).repeat_interleave(64)
    assert torch.equal(Int4Linear.of(dense).dense(torch.float32), dense.weight)


def test_rows_of_zeros():
    dense = nn.Linear(40, 3)
    dense.weight.data.zero_()
    for kind in KINDS.values():
        assert torch.equal(kind.of(dense).dense(torch.float32), dense.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_dense_product(kind):
    layer = KINDS[kind].of(linear(5000, 48))  # more rows than are made dense at a time
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dense(torch.float32), layer.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def native_matrix(layer, parts=2):
    """A layer's matrix and what keeps its memory. parts: integers for an activation, where weights are integers."""
    decoder = NativeDecoder.__new__(NativeDecoder)
    decoder._kept, decoder._parts = [], parts
    return decoder._linear("layer", layer), decoder


def native_product(library, matrix, x, threads=2):
    """x [B, K], whatever lies behind its rows, times a matrix [L, K]."""
    assert x.stride(1) == 1
    y = torch.full((len(x), matrix.rows), float("nan"))
    library.dll.nvlm_linear(ctypes.byref(matrix), len(x), x.data_ptr(), x.stride(0), y.data_ptr(), threads)
    return y


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "float32", "bfloat16"])
def test_native_products(library, kind, size, batch):
    """Against fp64 of the very weights, at most twice the error of torch's fp32 product; a row's bits its own, in any
    batch and with any number of threads.
    """
    rows, cols = size
    layer = linear(rows, cols)
    if kind in KINDS:
        layer = KINDS[kind].of(layer)
    else:
        layer.weight.data = layer.weight.data.to(getattr(torch, kind))
    weight, bias = dense_weight(layer, torch.float32).detach(), layer.bias.detach()
    torch.manual_seed(1)
    x = torch.randn(batch, cols)
    padded = F.pad(x, (0, -cols % native.BLOCK), value=float("nan"))[:, :cols]
    matrix, _kept = native_matrix(layer)
    got = native_product(library, matrix, padded)
    exact = F.linear(x.double(), weight.double(), bias.double())
    eager = (F.linear(x, weight.float(), bias.float()) - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * eager + 2**-22 * exact.abs().max()
    assert all(torch.equal(native_product(library, matrix, padded[i : i + 1])[0], got[i]) for i in range(batch))
    assert all(torch.equal(native_product(library, matrix, padded, threads), got) for threads in (1, 3, 5))


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_native_products_of_a_bf16_model(library, kind, size, batch):
    """One integer an activation, off by up to 1 / 65534 of the largest of 512, outliers or not: the errors of a row add
    up as random ones do. A row's bits are its own.
    """
    rows, cols = size
    layer = KINDS[kind].of(linear(rows, cols))
    weight = layer.dense(torch.float32).double()
    torch.manual_seed(1)
    x = torch.randn(batch, cols)
    x[-1, :: max(1, cols // 3)] *= 1000
    matrix, _kept = native_matrix(layer, parts=1)
    got = native_product(library, matrix, x)
    exact = F.linear(x.double(), weight, layer.bias.double())
    step = torch.stack([span.abs().amax(1) for span in x.double().split(512, 1)], 1) / 65534  # [B, spans]
    norms = torch.stack([span.square().sum() for span in weight.split(512, 1)])
    allowed = (step.square() * norms).sum(1).sqrt()
    assert ((got - exact).norm(dim=1) <= 1.5 * allowed + 2**-22 * exact.norm(dim=1)).all()
    assert all(torch.equal(native_product(library, matrix, x[i : i + 1])[0], got[i]) for i in range(batch))
    assert all(torch.equal(native_product(library, matrix, x, threads), got) for threads in (1, 3, 5))


@pytest.mark.parametrize("kind", [*KINDS, "float32", "bfloat16"])
def test_threads_take_each_others_rows(library, kind):
    """A matrix of many pieces, more threads than cores: every row is somebody's, once, and its bits are its own."""
    layer = linear(4003, 700)
    if kind in KINDS:
        layer = KINDS[kind].of(layer)
    else:
        layer.weight.data = layer.weight.data.to(getattr(torch, kind))
    matrix, _kept = native_matrix(layer, parts=1)
    x = torch.randn(2, 700)
    want = native_product(library, matrix, x, 1)
    assert want.isfinite().all()
    for threads in (2, 3, 5, 2, 7):
        for rows in (x, x[:1]):
            assert torch.equal(native_product(library, matrix, rows, threads), want[: len(rows)])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_keep_what_is_not_finite(library, kind, parts):
    """In its row, and nowhere else; zeros give zeros, tiny and huge numbers what they should."""
    layer = KINDS[kind].of(linear(20, 700, bias=False))
    x = torch.randn(7, 700)
    x[1, 650], x[2, 3], x[3, 0], x[4] = float("nan"), float("inf"), float("-inf"), 0
    x[5] *= 1e-25
    x[6] *= 1e30
    matrix, _kept = native_matrix(layer, parts)
    got = native_product(library, matrix, x)
    assert not got[1:4].isfinite().any()
    assert not got[4].any()
    exact = F.linear(x.double(), layer.dense(torch.float64))
    for row in (0, 5, 6):
        assert (got[row] - exact[row]).abs().max() <= 1e-3 * exact[row].abs().max(), row


@pytest.mark.parametrize("variant", ["d", "x", "h"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_its_dense_twin(kind, variant):
    """Native on the quantised weights, plain on the same weights made dense: the same tokens."""
    scheme = {"decoder": kind, "head": kind} | ({"cross": kind} if variant != "d" else {})
    model = fresh(variant, native=True, quantize=scheme)
    twin = fresh(variant, native=False)
    originals = dict(model.model.named_modules())
    for name, module in twin.model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(originals[name], Int8Linear | Int4Linear):
            module.weight.data = originals[name].dense(torch.float32)
    plain = NVLM(model.model, model.tokenizer, native=False)
    want = twin.generate("What is it?", [LARGE], **vars_of(10)).token_ids
    assert model.generate("What is it?", [LARGE], **vars_of(10)).token_ids == want
    assert plain.generate("What is it?", [LARGE], **vars_of(10)).token_ids == want
    kinds = {type(module) for module in model.model.language_model.modules()}
    assert KINDS[kind] in kinds
    left = [n for n, m in model.model.language_model.named_modules() if type(m) is nn.Linear]
    assert all(name.endswith(("k_proj", "v_proj")) for name in left), left


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_micro_models_still_read(kind):
    model = NVLM.load("micro-x", quantize={"decoder": kind, "cross": kind, "head": kind})
    assert model.generate("What is the total?", ["examples/receipt.png"]).text == "17.40"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"encoder": "int8"}, "part must be one of vision, decoder, cross, head, got 'encoder'"),
        ({"decoder": "int3"}, "decoder can be int8, int4, got 'int3'"),
        ({"vision": "int4"}, "vision can be int8_dynamic, got 'int4'"),
        ({"cross": "int8"}, "the model has no floating linears in cross"),
    ],
)
def test_refuses(scheme, message):
    model = small_model("d")
    with pytest.raises(ValueError, match=message):
        quantize(model, {"head": "int8"} | scheme)
    assert type(model.language_model.lm_head) is nn.Linear, "nothing is changed"


def test_refuses_what_is_not_finite_or_quantised_already():
    model = small_model("d")
    quantize(model, {"decoder": "int8"})
    with pytest.raises(ValueError, match="no floating linears in decoder"):
        quantize(model, {"decoder": "int4"})
    model.language_model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="int4: expected finite weights"):
        quantize(model, {"head": "int4"})


def test_a_tied_head_is_parted():
    engine = small_engine("d")
    engine.model.language_model.tie()
    quantize(engine.model, {"head": "int8"})
    assert isinstance(engine.model.language_model.lm_head, Int8Linear)
    assert engine.model.language_model.embed_tokens.weight.dtype == torch.float32
