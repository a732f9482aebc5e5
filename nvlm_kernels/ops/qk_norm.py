"""RMS norm of queries and keys over the whole width, all heads jointly, read in place from the fused projection.

    q = rms_norm(qkv[.., :C], q_weight)    k = rms_norm(qkv[.., C:2C], k_weight)        qkv: [*, 3C]    q, k: [*, C]

The norms are `rms_norm`'s, gradients and rounding alike; the gradient is one [*, 3C] tensor, exactly 0 in v's third.
Where ranks hold C of `width` columns each, the statistic crosses the wire as two fp32 numbers a row:

    sums = qk_sum_squares(qkv)                     [*, 2]: sum(q^2), sum(k^2) over this rank's columns
    all-reduce of sums
    q, k = qk_norm_from_sums(qkv, sums, width, ..)  r = 1 / sqrt(sums / width + eps)

Differentiated through sums as well, so that both steps together have qk_norm's gradient. With dn = weight * dy:

    x's part: dx = r * dn        dsums = -r^3 / (2 width) * sum(dn * x)        qk_sum_squares: dx = 2 * x * dsums

(an all-reduce's own backward adds up dsums over the ranks). Source: InternViT-6B, `qk_normalization`. Bound: memory,
4C elements a row forward, 7C backward; v is never read. Numerics: as rms_norm; the weight gradients are at most
PARTIALS fp32 rows each, added up by torch.sum, so they are the same every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton
from nvlm_kernels.ops.rms_norm import PARTIALS, check_norm, inverse_rms, rms_norm_ref, tile


def qk_norm_ref(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.chunk(3, dim=-1)
    return rms_norm_ref(q, q_weight, eps), rms_norm_ref(k, k_weight, eps)


def qk_sum_squares_ref(qkv: Tensor) -> Tensor:
    q, k, _ = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1)
    return torch.stack([q.square().sum(-1), k.square().sum(-1)], dim=-1)


def qk_norm_from_sums_ref(
    qkv: Tensor, sums: Tensor, width: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.to(sums.dtype).chunk(3, dim=-1)
    q_rms, k_rms = torch.rsqrt(sums / width + eps).chunk(2, dim=-1)
    return q_weight * (q * q_rms).to(qkv.dtype), k_weight * (k * k_rms).to(qkv.dtype)


@triton.jit
def _inverse_rms(x, sums_ptr, row, rows, C, width, eps, HAS_SUMS: tl.constexpr):
    """[ROWS, 1], from the rows themselves or from every second of sums."""
    if HAS_SUMS:
        sums = tl.load(sums_ptr + row * 2, mask=row < rows, other=0.0)
        r = tl.rsqrt(sums / width + tl.cast(eps, tl.float32))[:, None]
    else:
        r = inverse_rms(x, C, eps)
    return r


@triton.jit
def _norm(
    x_ptr,
    sums_ptr,
    weight_ptr,
    y_ptr,
    row,
    rows,
    C,
    width,
    eps,
    HAS_SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * (3 * C) + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    n = (x * _inverse_rms(x, sums_ptr, row, rows, C, width, eps, HAS_SUMS)).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * C + cols[None, :], weight[None, :] * n, mask=mask)


@triton.jit
def _fwd_kernel(
    qkv_ptr,
    sums_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    rows,
    C,
    width,
    eps,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _norm(qkv_ptr, sums_ptr, q_weight_ptr, q_ptr, row, rows, C, width, eps, HAS_SUMS, BLOCK_C)
    _norm(qkv_ptr + C, sums_ptr + 1, k_weight_ptr, k_ptr, row, rows, C, width, eps, HAS_SUMS, BLOCK_C)


@triton.jit
def _norm_gradients(
    x_ptr,
    sums_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    dsums_ptr,
    dweight_ptr,
    rows,
    C,
    width,
    eps,
    V_OFFSET: tl.constexpr,  # v's third is so many thirds behind dx_ptr; 0 leaves it alone
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All of a program's blocks of one third: dx, dsums where there are sums, and its row of dweight."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for block in range(pid, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < C)[None, :]
        offs = row[:, None] * (3 * C) + cols[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        r = _inverse_rms(x, sums_ptr, row, rows, C, width, eps, HAS_SUMS)
        dn = weight * dy
        dot = tl.sum(dn * x, axis=1)[:, None]
        if HAS_SUMS:
            dx = r * dn
            dsums = r * (r * (r * dot)) * (-0.5 / width)
            tl.store(dsums_ptr + row[:, None] * 2, dsums, mask=(row < rows)[:, None])
        else:
            dx = r * (dn - x * r * (r * (dot / C)))
        tl.store(dx_ptr + offs, dx, mask=mask)
        if V_OFFSET > 0:
            tl.store(dx_ptr + V_OFFSET * C + offs, tl.zeros([ROWS, BLOCK_C], tl.float32), mask=mask)
        dweight += dy * (x * r).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dweight_ptr + pid.to(tl.int64) * C + cols, tl.sum(dweight, axis=0), mask=cols < C)


@triton.jit
def _bwd_kernel(
    qkv_ptr,
    sums_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    dqkv_ptr,
    dsums_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    rows,
    C,
    width,
    eps,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if tl.program_id(1) == 0:  # one dweight a program: with both, sm_100 spilled
        _norm_gradients(
            qkv_ptr,
            sums_ptr,
            q_weight_ptr,
            dq_ptr,
            dqkv_ptr,
            dsums_ptr,
            dq_weight_ptr,
            rows,
            C,
            width,
            eps,
            0,
            HAS_SUMS,
            ROWS,
            BLOCK_C,
        )
    else:
        _norm_gradients(
            qkv_ptr + C,
            sums_ptr + 1,
            k_weight_ptr,
            dk_ptr,
            dqkv_ptr + C,
            dsums_ptr + 1,
            dk_weight_ptr,
            rows,
            C,
            width,
            eps,
            1,
            HAS_SUMS,
            ROWS,
            BLOCK_C,
        )


@triton.jit
def _sums_kernel(qkv_ptr, sums_ptr, rows, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    offs = row[:, None] * (3 * C) + cols[None, :]
    q = tl.load(qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv_ptr + C + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * 2, tl.sum(q * q, axis=1), mask=row < rows)
    tl.store(sums_ptr + row * 2 + 1, tl.sum(k * k, axis=1), mask=row < rows)


@triton.jit
def _sums_bwd_kernel(qkv_ptr, dsums_ptr, dqkv_ptr, rows, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    offs = row[:, None] * (3 * C) + cols[None, :]
    dq_sum = tl.load(dsums_ptr + row * 2, mask=row < rows, other=0.0)[:, None]
    dk_sum = tl.load(dsums_ptr + row * 2 + 1, mask=row < rows, other=0.0)[:, None]
    q = tl.load(qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv_ptr + C + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dqkv_ptr + offs, 2 * q * dq_sum, mask=mask)
    tl.store(dqkv_ptr + C + offs, 2 * k * dk_sum, mask=mask)
    tl.store(dqkv_ptr + 2 * C + offs, tl.zeros([ROWS, BLOCK_C], tl.float32), mask=mask)


def _launch_fwd(qkv, sums, q_weight, k_weight, width, eps, has_sums):
    local = len(q_weight)
    q, k = (qkv.new_empty(*qkv.shape[:-1], local) for _ in range(2))
    if q.numel():
        rows = q.numel() // local
        block, columns, warps = tile(local)
        wrap_triton(_fwd_kernel)[(triton.cdiv(rows, block),)](
            qkv,
            sums,
            q_weight,
            k_weight,
            q,
            k,
            rows,
            local,
            width,
            eps,
            HAS_SUMS=has_sums,
            ROWS=block,
            BLOCK_C=columns,
            num_warps=warps,
        )
    return q, k


def _launch_bwd(qkv, sums, q_weight, k_weight, dq, dk, width, eps, has_sums):
    dqkv = torch.empty_like(qkv)
    dsums = torch.empty_like(sums) if has_sums else sums
    if not dqkv.numel():
        return dqkv, dsums, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    local = len(q_weight)
    rows = dq.numel() // local
    block, columns, warps = tile(local)
    programs = min(triton.cdiv(rows, block), PARTIALS)
    dq_weight, dk_weight = (torch.empty(programs, local, dtype=torch.float32, device=qkv.device) for _ in range(2))
    wrap_triton(_bwd_kernel)[(programs, 2)](
        qkv,
        sums,
        q_weight,
        k_weight,
        dq,
        dk,
        dqkv,
        dsums,
        dq_weight,
        dk_weight,
        rows,
        local,
        width,
        eps,
        HAS_SUMS=has_sums,
        ROWS=block,
        BLOCK_C=columns,
        num_warps=warps,
    )
    return dqkv, dsums, *(partial.sum(0).to(q_weight.dtype) for partial in (dq_weight, dk_weight))


@triton_op("nvlm::qk_norm", mutates_args=())
def _fwd(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch_fwd(qkv, qkv, q_weight, k_weight, len(q_weight), eps, False)


@triton_op("nvlm::qk_norm_bwd", mutates_args=())
def _bwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, dq: Tensor, dk: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv, _, dq_weight, dk_weight = _launch_bwd(qkv, qkv, q_weight, k_weight, dq, dk, len(q_weight), eps, False)
    return dqkv, dq_weight, dk_weight


@triton_op("nvlm::qk_norm_from_sums", mutates_args=())
def _from_sums(
    qkv: Tensor, sums: Tensor, width: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch_fwd(qkv, sums, q_weight, k_weight, width, eps, True)


@triton_op("nvlm::qk_norm_from_sums_bwd", mutates_args=())
def _from_sums_bwd(
    qkv: Tensor, sums: Tensor, width: int, q_weight: Tensor, k_weight: Tensor, dq: Tensor, dk: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_bwd(qkv, sums, q_weight, k_weight, dq, dk, width, eps, True)


@triton_op("nvlm::qk_sum_squares", mutates_args=())
def _sums(qkv: Tensor) -> Tensor:
    sums = qkv.new_empty(*qkv.shape[:-1], 2, dtype=torch.float32)
    if qkv.numel():
        width = qkv.shape[-1] // 3
        block, columns, warps = tile(width)
        rows = sums.numel() // 2
        wrap_triton(_sums_kernel)[(triton.cdiv(rows, block),)](
            qkv, sums, rows, width, ROWS=block, BLOCK_C=columns, num_warps=warps
        )
    return sums


@triton_op("nvlm::qk_sum_squares_bwd", mutates_args=())
def _sums_bwd(qkv: Tensor, dsums: Tensor) -> Tensor:
    dqkv = torch.empty_like(qkv)
    if qkv.numel():
        width = qkv.shape[-1] // 3
        block, columns, warps = tile(width)
        rows = dsums.numel() // 2
        wrap_triton(_sums_bwd_kernel)[(triton.cdiv(rows, block),)](
            qkv, dsums, dqkv, rows, width, ROWS=block, BLOCK_C=columns, num_warps=warps
        )
    return dqkv


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk):
    return *_bwd(*ctx.saved_tensors, dq.contiguous(), dk.contiguous(), ctx.eps), None


def _save_from_sums(ctx, inputs, output):
    qkv, sums, ctx.width, q_weight, k_weight, ctx.eps = inputs
    ctx.save_for_backward(qkv, sums, q_weight, k_weight)


def _backward_from_sums(ctx, dq, dk):
    qkv, sums, q_weight, k_weight = ctx.saved_tensors
    dqkv, dsums, dq_weight, dk_weight = _from_sums_bwd(
        qkv, sums, ctx.width, q_weight, k_weight, dq.contiguous(), dk.contiguous(), ctx.eps
    )
    return dqkv, dsums, None, dq_weight, dk_weight, None


def _save_sums(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_sums(ctx, dsums):
    return _sums_bwd(*ctx.saved_tensors, dsums.contiguous())


_fwd.register_autograd(_backward, setup_context=_save)
_from_sums.register_autograd(_backward_from_sums, setup_context=_save_from_sums)
_sums.register_autograd(_backward_sums, setup_context=_save_sums)


def _check(op: str, qkv: Tensor, eps: float, **weights: Tensor) -> None:
    if qkv.dim() == 0 or qkv.shape[-1] % 3:
        raise ValueError(f"{op}: qkv must be [*, 3C], got {tuple(qkv.shape)}")
    check_norm(op, qkv, qkv.shape[-1] // 3, eps, **weights)


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """q and k of a fused projection, normed over C. qkv: [*, 3C]; weights: [C]; returns [*, C] twice.

    Raises ValueError for another width, a dtype or device that differs, and for eps <= 0.
    """
    _check("qk_norm", qkv, eps, q_weight=q_weight, k_weight=k_weight)
    if not use_triton(qkv):
        return qk_norm_ref(qkv, q_weight, k_weight, eps)
    return _fwd(qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous(), eps)


def qk_sum_squares(qkv: Tensor) -> Tensor:
    """Sums of squares of q and of k, [*, 2] in fp32, over the columns at hand. qkv: [*, 3C]."""
    _check("qk_sum_squares", qkv, 1.0)
    if not use_triton(qkv):
        return qk_sum_squares_ref(qkv)
    return _sums(qkv.contiguous())


def qk_norm_from_sums(
    qkv: Tensor, sums: Tensor, width: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """qk_norm of one rank's columns. qkv: [*, 3C]; sums: [*, 2], fp32, over all ranks' `width` columns; weights: [C].

    Raises ValueError for another width, a dtype or device that differs, sums of another shape, and for eps <= 0.
    """
    _check("qk_norm_from_sums", qkv, eps, q_weight=q_weight, k_weight=k_weight)
    exact = torch.promote_types(qkv.dtype, torch.float32)
    if sums.shape != (*qkv.shape[:-1], 2) or sums.dtype != exact or sums.device != qkv.device:
        raise ValueError(
            f"qk_norm_from_sums: sums must be {exact} {(*qkv.shape[:-1], 2)} on {qkv.device}, "
            f"got {sums.dtype} {tuple(sums.shape)} on {sums.device}"
        )
    if width < len(q_weight):
        raise ValueError(f"qk_norm_from_sums: width must be at least {len(q_weight)}, got {width}")
    if not use_triton(qkv):
        return qk_norm_from_sums_ref(qkv, sums, width, q_weight, k_weight, eps)
    return _from_sums(qkv.contiguous(), sums.contiguous(), width, q_weight.contiguous(), k_weight.contiguous(), eps)
