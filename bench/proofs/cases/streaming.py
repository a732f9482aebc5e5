"""Ops bound by memory: norms, residuals, rotary, swiglu.

Full sizes are the 72B model's: 8192 rows of text (C 8192, I 29568, 64 heads, 8 kv heads, D 128), or 7 tiles of 1025
tokens in the 6B tower (C 3200); decode is a step of a batch of 32. Bytes: each array of rows once, each weight once.
"""

from functools import partial

import torch
from torch import Tensor

from bench.proofs.cases.case import Call, Case, nbytes
from nvlm_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from nvlm_kernels.ops.layer_scale_residual import (
    layer_scale_residual,
    layer_scale_residual_ref,
    layer_scale_residual_statistics,
)
from nvlm_kernels.ops.qk_norm import (
    qk_norm,
    qk_norm_from_sums,
    qk_norm_from_sums_ref,
    qk_norm_ref,
    qk_sum_squares,
    qk_sum_squares_ref,
)
from nvlm_kernels.ops.rms_norm import rms_norm, rms_norm_ref
from nvlm_kernels.ops.rotary import rotary, rotary_cache, rotary_cache_ref, rotary_ref
from nvlm_kernels.ops.swiglu import swiglu, swiglu_ref
from nvlm_kernels.ops.tanh_gated_add import tanh_gated_add, tanh_gated_add_ref

EPS = 1e-6


def _trained(dtype, device, *shape) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


def _tanh_gated_add(dtype, device, rows, width) -> Call:
    x, branch = (_trained(dtype, device, rows, width) for _ in range(2))
    gate = torch.full((1,), 0.5, dtype=dtype, device=device, requires_grad=True)
    return Call(
        tanh_gated_add,
        tanh_gated_add_ref,
        (x, branch, gate),
        forward_bytes=3 * nbytes(x),
        backward_bytes=3 * nbytes(x),
    )


def _rms_norm(dtype, device, rows, width) -> Call:
    x, weight = _trained(dtype, device, rows, width), _trained(dtype, device, width)
    return Call(
        rms_norm,
        rms_norm_ref,
        (x, weight, EPS),
        forward_bytes=2 * nbytes(x) + nbytes(weight),
        backward_bytes=3 * nbytes(x) + 2 * nbytes(weight),
    )


def _add_rms_norm(dtype, device, rows, width) -> Call:
    x, branch = (_trained(dtype, device, rows, width) for _ in range(2))
    weight = _trained(dtype, device, width)
    return Call(
        add_rms_norm,
        add_rms_norm_ref,
        (x, branch, weight, EPS),
        forward_bytes=4 * nbytes(x) + nbytes(weight),
        backward_bytes=4 * nbytes(x) + 2 * nbytes(weight),
    )


def _layer_scale_residual_statistics_ref(x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = layer_scale_residual_ref(x, branch, scale)
    var, mean = torch.var_mean(y.detach().to(torch.promote_types(y.dtype, torch.float32)), -1, correction=0)
    return y, torch.stack([mean, var * y.shape[-1]], -1)


def _layer_scale_residual(dtype, device, rows, width, *, with_statistics=False) -> Call:
    x, branch = (_trained(dtype, device, rows, width) for _ in range(2))
    scale = _trained(dtype, device, width)
    return Call(
        layer_scale_residual_statistics if with_statistics else layer_scale_residual,
        _layer_scale_residual_statistics_ref if with_statistics else layer_scale_residual_ref,
        (x, branch, scale),
        forward_bytes=3 * nbytes(x) + nbytes(scale) + 8 * rows * with_statistics,
        backward_bytes=3 * nbytes(x) + 2 * nbytes(scale),
    )


def _swiglu(dtype, device, rows, width) -> Call:
    gate_up = _trained(dtype, device, rows, 2 * width)
    half = nbytes(gate_up) // 2
    return Call(swiglu, swiglu_ref, (gate_up,), forward_bytes=3 * half, backward_bytes=5 * half)


def _qk_norm(dtype, device, rows, width) -> Call:
    qkv = _trained(dtype, device, rows, 3 * width)
    q_weight, k_weight = (_trained(dtype, device, width) for _ in range(2))
    third, weights = nbytes(qkv) // 3, nbytes(q_weight, k_weight)
    return Call(
        qk_norm,
        qk_norm_ref,
        (qkv, q_weight, k_weight, EPS),
        forward_bytes=4 * third + weights,
        backward_bytes=7 * third + 2 * weights,
    )


def _qk_sum_squares(dtype, device, rows, width) -> Call:
    qkv = _trained(dtype, device, rows, 3 * width)
    third, sums = nbytes(qkv) // 3, rows * 2 * 4
    return Call(
        qk_sum_squares, qk_sum_squares_ref, (qkv,), forward_bytes=2 * third + sums, backward_bytes=5 * third + sums
    )


def _qk_norm_from_sums(dtype, device, rows, width, ranks) -> Call:
    qkv = _trained(dtype, device, rows, 3 * width)
    q_weight, k_weight = (_trained(dtype, device, width) for _ in range(2))
    sums = (qk_sum_squares_ref(qkv.detach()) * ranks).requires_grad_()
    third, weights = nbytes(qkv) // 3, nbytes(q_weight, k_weight)
    return Call(
        qk_norm_from_sums,
        qk_norm_from_sums_ref,
        (qkv, sums, ranks * width, q_weight, k_weight, EPS),
        forward_bytes=4 * third + weights + nbytes(sums),
        backward_bytes=7 * third + 2 * weights + 2 * nbytes(sums),
    )


def _angles(dtype, device, batch, tokens, size) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, tokens, size, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotary(dtype, device, batch, tokens, heads, kv_heads, size) -> Call:
    qkv = _trained(dtype, device, batch, tokens, (heads + 2 * kv_heads) * size)
    cos, sin = _angles(dtype, device, batch, tokens, size)
    q_and_k = nbytes(qkv) * (heads + kv_heads) // (heads + 2 * kv_heads)
    return Call(
        rotary,
        rotary_ref,
        (qkv, cos, sin, heads, kv_heads),
        forward_bytes=2 * q_and_k + nbytes(cos, sin),
        backward_bytes=q_and_k + nbytes(qkv, cos, sin),
    )


def _rotary_cache(dtype, device, batch, slots, heads, kv_heads, size) -> Call:
    qkv = _trained(dtype, device, batch, 1, (heads + 2 * kv_heads) * size).detach()
    cos, sin = _angles(dtype, device, batch, 1, size)
    k, v = torch.zeros(2, 2, batch, slots, kv_heads, size, dtype=dtype, device=device)[:, 1]
    positions = torch.arange(batch, device=device)[:, None] % slots
    return Call(
        rotary_cache,
        rotary_cache_ref,
        (qkv, cos, sin, k, v, positions, heads),
        forward_bytes=2 * nbytes(qkv) + nbytes(cos, sin, positions),
    )


TEXT = dict(rows=8192, width=8192)
TOWER = dict(rows=7 * 1025, width=3200)
TEXT_HEADS = dict(heads=64, kv_heads=8, size=128)
MICRO_HEADS = dict(heads=6, kv_heads=3, size=32)
# Bytes are counted at enough rows for 128 partial sums of weights to be small beside them, and so at narrow ones.
MANY = dict(rows=16384, width=256)


def _case(op, name, build, full, small, traced=None) -> Case:
    return Case(op, name, "stream", build, full, small, traced)


CASES = (
    _case("tanh_gated_add", "prefill", _tanh_gated_add, TEXT, dict(rows=8, width=8192)),
    _case("rms_norm", "text", _rms_norm, TEXT, dict(rows=8, width=8192), MANY),
    _case("rms_norm", "micro", _rms_norm, dict(rows=8192, width=192), dict(rows=64, width=192), MANY | dict(width=192)),
    _case("add_rms_norm", "text", _add_rms_norm, TEXT, dict(rows=8, width=8192), MANY),
    _case(
        "layer_scale_residual",
        "tower",
        _layer_scale_residual,
        TOWER,
        dict(rows=65, width=3200),
        dict(rows=7 * 1025, width=256),
    ),
    _case(
        "layer_scale_residual",
        "statistics",
        partial(_layer_scale_residual, with_statistics=True),
        TOWER,
        dict(rows=65, width=3200),
        dict(rows=7 * 1025, width=128),
    ),
    _case("swiglu", "text", _swiglu, dict(rows=8192, width=29568), dict(rows=2, width=29568)),
    _case("swiglu", "micro", _swiglu, dict(rows=8192, width=512), dict(rows=32, width=512)),
    _case("qk_norm", "tower", _qk_norm, TOWER, dict(rows=8, width=3200), dict(rows=16 * 1025, width=100)),
    _case("qk_norm", "micro", _qk_norm, dict(rows=455, width=160), dict(rows=64, width=160), MANY | dict(width=160)),
    _case("qk_sum_squares", "rank", _qk_sum_squares, dict(rows=7 * 1025, width=640), dict(rows=65, width=640)),
    _case(
        "qk_norm_from_sums",
        "rank",
        _qk_norm_from_sums,
        dict(rows=7 * 1025, width=640, ranks=5),
        dict(rows=65, width=640, ranks=5),
        dict(rows=16 * 1025, width=64, ranks=5),
    ),
    _case("rotary", "text", _rotary, dict(batch=2, tokens=4096, **TEXT_HEADS), dict(batch=1, tokens=4, **TEXT_HEADS)),
    _case(
        "rotary", "micro", _rotary, dict(batch=2, tokens=512, **MICRO_HEADS), dict(batch=1, tokens=64, **MICRO_HEADS)
    ),
    _case(
        "rotary_cache",
        "text",
        _rotary_cache,
        dict(batch=32, slots=4096, **TEXT_HEADS),
        dict(batch=4, slots=8, **TEXT_HEADS),
    ),
)
