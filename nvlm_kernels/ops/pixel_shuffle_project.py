"""From ViT patches to image tokens: pixel shuffle, LayerNorm, Linear and exact GELU, without a shuffled copy.

    s = pixel_shuffle(patches of x)          [N, P, 4C], P = S*S/4: run 2*dr + dq of a row is patch (2r + dr, 2q + dq)
    n = (s - mean(s)) / sqrt(var(s) + eps) * norm_weight + norm_bias
    z = n @ weight^T + bias                  y = z, or gelu(z) = z * (1 + erf(z / sqrt(2))) / 2

x: [N, S*S, C], or [N, 1 + S*S, C] with a CLS row that is skipped by stride and never read; any tile and row stride.
norm_weight, norm_bias: [4C]    weight: [F, 4C]    bias: [F] or none    y: [N, P, F]    M = N * P rows of the product.
statistics: [N, S*S, 2], of every patch, as `row_statistics` makes them in a pass of memory, or as the tower's last
residual add made them when it wrote x (`layer_scale_residual_statistics`); a token's are joined from its 4 patches'.
K = 4C is four contiguous runs of C, so the shuffle is index arithmetic in the load: v1 and v2 differ by swapping r, q.

"fused":           one GEMM that norms what it loads and has bias and GELU in its epilogue. Moves MK + MF elements of
                   activations, where eager moves 5MK + 3MF; MF more where it keeps z.
"norm_then_gemm":  one kernel shuffles and norms into [M, 4C], then the vendor's GEMM and GELU: 3MK + 3MF.
Each moves MK more where it is not given the statistics.

With dz = dy * gelu'(z) and dn = dz @ weight, gradients, d(x) in x's own layout with a CLS row of 0:

    dweight = dz^T @ n    dbias = sum(dz)    dnorm_weight = sum(dn * s^)    dnorm_bias = sum(dn)    over rows
    ds = (g - mean(g) - s^ * mean(g * s^)) / sqrt(var + eps)    g = dn * norm_weight, s^: n before its weight

n is made again from x in the backward (a pass of memory, instead of M * 4C saved). z is saved, M * F elements that
eager keeps too, or with `recompute` made again as well, by a third GEMM. Without gradients nothing is saved.

Bound: flops (2 M K F); the weight's bytes where M is a few hundred. Numerics: statistics are joined by Chan's update,
so a mean a thousand times the deviation cancels nothing. n and z are rounded to x's type and sums are fp32, as in
F.layer_norm, F.linear and F.gelu; gradients of the norm's weights are fp32 partial sums. To fold the norm into the
weight instead, (s @ W') - mean * sum(W'), would subtract what a large mean makes large.
Source: Chan, Golub, LeVeque 1979 for the update; pixel_shuffle.py and the projector of the published NVLM-D code.
"""

from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from torch.utils.checkpoint import checkpoint

from nvlm_kernels._backend import triton_op, use_triton
from nvlm_kernels.ops.gemm import GROUP, grouped_order, tile_sizes
from nvlm_kernels.ops.pixel_shuffle import pixel_shuffle_ref
from nvlm_kernels.ops.row_statistics import block_of, row_statistics

# The chip the strategy is predicted for: H100 SXM, dense bf16, from NVIDIA's data sheet.
FLOPS, BYTES = 989e12, 3.35e12
FUSED_RATE = 0.85  # of the vendor GEMM's rate: assumed, as the fused one norms its left side again in every column


def pixel_shuffle_project_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    version: str,
    eps: float,
    gelu: bool = False,
    has_cls: bool = False,
) -> Tensor:
    x = pixel_shuffle_ref(x[:, 1:] if has_cls else x, version)
    x = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)
    return F.gelu(x) if gelu else x


def pick_strategy(rows: int, width: int, features: int, gelu: bool) -> str:
    """ "fused" or "norm_then_gemm" for [rows, width] @ [width, features]: predicted from bytes and flops, not measured.

    Seconds lost to the fused GEMM's lower rate, against the passes over memory that it saves, in 16 bits.
    """
    flops, weight = 2 * rows * width * features / FLOPS, 2 * width * features / BYTES
    lost = max(flops / FUSED_RATE, weight) - max(flops, weight)
    saved = 4 * rows * (width + features * gelu) / BYTES
    return "fused" if lost <= saved else "norm_then_gemm"


@triton.jit
def _patch_of(token, half, stride_n, stride_p, FIRST: tl.constexpr, V1: tl.constexpr):
    """Where run 0 of a token begins in x: its patch (2r, 2q)."""
    tile, at = token // (half * half), token % (half * half)
    r, q = at // half, at % half
    if V1:
        r, q = q, r
    return tile * stride_n + (FIRST + (2 * r) * (2 * half) + 2 * q) * stride_p


@triton.jit
def _run_at(run, half, stride_p):
    """How far behind run 0 run 2*dr + dq begins."""
    return (run // 2 * (2 * half) + run % 2) * stride_p


@triton.jit
def _token_statistics(stats_ptr, token, inside, half, C, stride_n, eps, V1: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of tokens, joined from the statistics of their patches, which lie as x's rows do."""
    first = stats_ptr + _patch_of(token, half, stride_n, 2, 0, V1)
    mean = tl.load(first, mask=inside, other=0.0)
    square = tl.load(first + 1, mask=inside, other=0.0)
    for run in tl.static_range(1, 4):
        at = first + _run_at(run, half, 2)
        step = tl.load(at, mask=inside, other=0.0) - mean
        square += tl.load(at + 1, mask=inside, other=0.0) + step * step * (C * (run / (run + 1)))
        mean += step * (1 / (run + 1))
    rstd = tl.rsqrt(square / (4 * C) + tl.full([], eps, tl.float32))
    return mean, tl.where(inside, rstd, 0.0)  # eps may be 0


@triton.jit
def _norm_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    stats_ptr,
    normed_ptr,
    num_tokens,
    half,
    C,
    stride_n,
    stride_p,
    stats_stride_n,
    eps,
    FIRST: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens
    base = _patch_of(token, half, stride_n, stride_p, FIRST, V1)
    mean, rstd = _token_statistics(stats_ptr, token, inside, half, C, stats_stride_n, eps, V1)
    num_blocks = tl.cdiv(C, BLOCK)
    for i in range(4 * num_blocks):
        cols = i % num_blocks * BLOCK + tl.arange(0, BLOCK)
        in_run = cols < C
        mask = inside[:, None] & in_run[None, :]
        k = i // num_blocks * C + cols
        at = base[:, None] + (_run_at(i // num_blocks, half, stride_p) + cols)[None, :]
        x = tl.load(x_ptr + at, mask=mask).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + k, mask=in_run).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + k, mask=in_run).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :]
        tl.store(normed_ptr + token[:, None] * (4 * C) + k[None, :], y, mask=mask)


@triton.jit
def _project_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    num_tokens,
    half,
    C,
    num_features,
    stride_n,
    stride_p,
    stats_stride_n,
    eps,
    FIRST: tl.constexpr,
    V1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    SAVE: tl.constexpr,  # z is stored
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = grouped_order(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_features, BLOCK_N), GROUP)
    token = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, in_n = token < num_tokens, offs_n < num_features
    base = _patch_of(token, half, stride_n, stride_p, FIRST, V1)
    mean, rstd = _token_statistics(stats_ptr, token, inside, half, C, stats_stride_n, eps, V1)
    num_blocks = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(4 * num_blocks):
        cols = i % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        in_run = cols < C
        k = i // num_blocks * C + cols
        at = base[:, None] + (_run_at(i // num_blocks, half, stride_p) + cols)[None, :]
        x = tl.load(x_ptr + at, mask=inside[:, None] & in_run[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + offs_n[None, :] * (4 * C) + k[:, None], mask=in_run[:, None] & in_n[None, :], other=0.0
        )
        norm_weight = tl.load(norm_weight_ptr + k, mask=in_run, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + k, mask=in_run, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :]
        acc = tl.dot(normed.to(x.dtype), weight, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    z = acc.to(y_ptr.dtype.element_ty)
    at = token[:, None] * num_features + offs_n[None, :]
    mask = inside[:, None] & in_n[None, :]
    if SAVE:
        tl.store(z_ptr + at, z, mask=mask)
    if GELU:
        wide = z.to(tl.float32)
        tl.store(y_ptr + at, 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476)), mask=mask)
    else:
        tl.store(y_ptr + at, z, mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dnormed_ptr,
    x_ptr,
    norm_weight_ptr,
    stats_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    num_tokens,
    half,
    C,
    stride_n,
    stride_p,
    dx_stride_n,
    stats_stride_n,
    eps,
    FIRST: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    token = pid * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens
    base = _patch_of(token, half, stride_n, stride_p, FIRST, V1)
    dx_base = _patch_of(token, half, dx_stride_n, C, FIRST, V1)
    mean, rstd = _token_statistics(stats_ptr, token, inside, half, C, stats_stride_n, eps, V1)
    num_blocks = tl.cdiv(C, BLOCK)
    sum_g = tl.zeros([ROWS], tl.float32)
    sum_gx = tl.zeros([ROWS], tl.float32)
    for i in range(4 * num_blocks):
        cols = i % num_blocks * BLOCK + tl.arange(0, BLOCK)
        in_run = cols < C
        mask = inside[:, None] & in_run[None, :]
        k = i // num_blocks * C + cols
        at = base[:, None] + (_run_at(i // num_blocks, half, stride_p) + cols)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + token[:, None] * (4 * C) + k[None, :], mask=mask, other=0.0).to(tl.float32)
        g = dnormed * tl.load(norm_weight_ptr + k, mask=in_run, other=0.0).to(tl.float32)[None, :]
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(g * (x - mean[:, None]) * rstd[:, None], 1)
    mean_g, mean_gx = sum_g / (4 * C), sum_gx / (4 * C)
    for i in range(4 * num_blocks):
        cols = i % num_blocks * BLOCK + tl.arange(0, BLOCK)
        in_run = cols < C
        mask = inside[:, None] & in_run[None, :]
        k = i // num_blocks * C + cols
        run_at = _run_at(i // num_blocks, half, stride_p)
        x = tl.load(x_ptr + base[:, None] + (run_at + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + token[:, None] * (4 * C) + k[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None]
        g = dnormed * tl.load(norm_weight_ptr + k, mask=in_run, other=0.0).to(tl.float32)[None, :]
        dx = (g - mean_g[:, None] - normed * mean_gx[:, None]) * rstd[:, None]
        tl.store(dx_ptr + dx_base[:, None] + (_run_at(i // num_blocks, half, C) + cols)[None, :], dx, mask=mask)
        tl.store(dweight_ptr + pid * (4 * C) + k, tl.sum(dnormed * normed, 0), mask=in_run)
        tl.store(dbias_ptr + pid * (4 * C) + k, tl.sum(dnormed, 0), mask=in_run)


def _norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    tokens: int,
    version: str,
    eps: float,
    has_cls: bool,
) -> Tensor:
    """The shuffled and normed rows [M, 4C]."""
    width = x.shape[2]
    normed = x.new_empty(tokens, 4 * width)
    rows, block = block_of(width, 2048)  # 8 elements a thread with 4 warps of 64 lanes (AMD) and of 32 alike
    if tokens:
        wrap_triton(_norm_kernel)[(triton.cdiv(tokens, rows),)](
            x,
            norm_weight,
            norm_bias,
            statistics,
            normed,
            tokens,
            _half(x, has_cls),
            width,
            x.stride(0),
            x.stride(1),
            statistics.stride(0),
            eps,
            FIRST=int(has_cls),
            V1=version == "v1",
            ROWS=rows,
            BLOCK=block,
        )
    return normed


def _half(x: Tensor, has_cls: bool) -> int:
    return round((x.shape[1] - has_cls) ** 0.5) // 2


@triton_op("nvlm::pixel_shuffle_project", mutates_args=())
def _fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (what torch's schema reader takes)
    statistics: Tensor,
    version: str,
    eps: float,
    gelu: bool,
    has_cls: bool,
    fused: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y [N, P, F]; z [M, F] where it is to be saved, else empty."""
    num, half, features = x.shape[0], _half(x, has_cls), weight.shape[0]
    tokens = num * half * half
    if not fused:
        normed = _norm(x, norm_weight, norm_bias, statistics, tokens, version, eps, has_cls)
        z = F.linear(normed, weight, bias)
        y = F.gelu(z) if gelu else z
        return y.view(num, half * half, features), z if save else z.new_empty(0)
    y = x.new_empty(num, half * half, features)
    z = x.new_empty(y.shape if save else 0)
    sizes = tile_sizes(tokens, x.dtype)
    if tokens:
        grid = (triton.cdiv(tokens, sizes["BLOCK_M"]) * triton.cdiv(features, sizes["BLOCK_N"]),)
        wrap_triton(_project_kernel)[grid](
            x,
            norm_weight,
            norm_bias,
            statistics,
            weight,
            norm_bias if bias is None else bias,
            y,
            z,
            tokens,
            half,
            x.shape[2],
            features,
            x.stride(0),
            x.stride(1),
            statistics.stride(0),
            eps,
            FIRST=int(has_cls),
            V1=version == "v1",
            HAS_BIAS=bias is not None,
            GELU=gelu,
            SAVE=save,
            GROUP=GROUP,
            **sizes,
        )
    return y, z


@triton_op("nvlm::pixel_shuffle_project_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    statistics: Tensor,
    z: Tensor,
    version: str,
    eps: float,
    gelu: bool,
    has_cls: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z: as `_fwd` gives it; one that was not saved is made again."""
    tokens, width = dy.shape[0] * dy.shape[1], x.shape[2]
    dz = dy.view(tokens, weight.shape[0])
    normed = _norm(x, norm_weight, norm_bias, statistics, tokens, version, eps, has_cls)
    if gelu:
        dz = torch.ops.aten.gelu_backward(dz, z.view(dz.shape) if z.numel() else F.linear(normed, weight, bias))
    dbias = dz.new_empty(0) if bias is None else dz.sum(0)
    dweight = dz.T @ normed
    del normed  # as large as what is made next
    dnormed = dz @ weight
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if has_cls:
        dx[:, 0] = 0
    rows, block = block_of(width, 4096)
    programs = triton.cdiv(tokens, rows)
    parts = [torch.empty(programs, 4 * width, dtype=torch.float32, device=x.device) for _ in range(2)]
    if tokens:
        wrap_triton(_norm_bwd_kernel)[(programs,)](
            dnormed,
            x,
            norm_weight,
            statistics,
            dx,
            *parts,
            tokens,
            _half(x, has_cls),
            width,
            x.stride(0),
            x.stride(1),
            dx.stride(0),
            statistics.stride(0),
            eps,
            FIRST=int(has_cls),
            V1=version == "v1",
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
        )
    dnorm_weight, dnorm_bias = (part.sum(0).to(x.dtype) for part in parts)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias


def _save(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, statistics, ctx.version, ctx.eps, ctx.gelu, ctx.has_cls, _, _ = inputs
    _, z = output
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, statistics, z)
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    *grads, dbias = _bwd(dy.contiguous(), *saved, ctx.version, ctx.eps, ctx.gelu, ctx.has_cls)
    return *grads, None if saved[4] is None else dbias, *[None] * 7


_fwd.register_autograd(_backward, setup_context=_save)


def pixel_shuffle_project(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    version: str,
    eps: float,
    gelu: bool = False,
    has_cls: bool = False,
    statistics: Tensor | None = None,
    strategy: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """[N, S*S, C] patches, or [N, 1 + S*S, C] with has_cls, to [N, S*S/4, F] projected image tokens.

    norm_weight, norm_bias: [4C]; weight: [F, 4C]; bias: [F] or None; all of x's dtype. version: "v1" or "v2".
    statistics: [N, S*S, 2] fp32, `row_statistics` of the patches, not checked to be theirs; made here where None.
    strategy: "fused", "norm_then_gemm" or None, which lets `pick_strategy` choose. Both matter where Triton runs.
    recompute: of what is made here the statistics at most are kept for the backward, which makes the rest again.
    Raises ValueError on any other shape, dtype, device or name.
    """
    name = "pixel_shuffle_project"
    if version not in ("v1", "v2"):
        raise ValueError(f"{name}: version must be 'v1' or 'v2', got {version!r}")
    if strategy not in (None, "fused", "norm_then_gemm"):
        raise ValueError(f"{name}: strategy must be 'fused', 'norm_then_gemm' or None, got {strategy!r}")
    patches = x.shape[1] - has_cls if x.dim() == 3 else 0
    side = round(max(patches, 0) ** 0.5)
    if not x.is_floating_point() or patches <= 0 or side * side != patches or side % 2 or not x.shape[2]:
        expected = "[N, 1 + S*S, C]" if has_cls else "[N, S*S, C]"
        raise ValueError(f"{name}: x must be floating {expected} with S even, got {x.dtype} {tuple(x.shape)}")
    width = 4 * x.shape[2]
    if weight.dim() != 2 or weight.shape[1] != width or not weight.shape[0]:
        raise ValueError(f"{name}: weight must be [F, {width}], got {tuple(weight.shape)}")
    vectors = {"norm_weight": (norm_weight, width), "norm_bias": (norm_bias, width), "bias": (bias, weight.shape[0])}
    for what, (t, size) in vectors.items():
        if t is not None and t.shape != (size,):
            raise ValueError(f"{name}: {what} must be [{size}], got {tuple(t.shape)}")
    for what, t in {"norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name}: {what} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
    if statistics is not None:
        _check_statistics(statistics, x, patches)
    inputs = norm_weight, norm_bias, weight, bias
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *inputs))
    if not use_triton(x):
        ref = partial(pixel_shuffle_project_ref, version=version, eps=eps, gelu=gelu, has_cls=has_cls)
        if recompute and learns:
            return checkpoint(ref, x, *inputs, use_reentrant=False, preserve_rng_state=False)
        return ref(x, *inputs)
    if strategy is None:
        strategy = pick_strategy(x.shape[0] * patches // 4, width, weight.shape[0], gelu)
    x = x if x.stride(2) == 1 else x.contiguous()
    if statistics is None:
        statistics = row_statistics(x[:, 1:] if has_cls else x)
    elif statistics.stride()[1:] != (2, 1):
        statistics = statistics.contiguous()
    dense = [t if t is None else t.contiguous() for t in inputs]
    keep = gelu and learns and not recompute
    return _fwd(x, *dense, statistics, version, eps, gelu, has_cls, strategy == "fused", keep)[0]


def _check_statistics(statistics: Tensor, x: Tensor, patches: int) -> None:
    shape = x.shape[0], patches, 2
    if statistics.shape != shape or statistics.dtype != torch.float32 or statistics.device != x.device:
        raise ValueError(
            f"pixel_shuffle_project: statistics must be torch.float32 {shape} on {x.device}, "
            f"got {statistics.dtype} {tuple(statistics.shape)} on {statistics.device}"
        )
