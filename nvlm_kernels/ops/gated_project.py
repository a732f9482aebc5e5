"""The end of a gated cross-attention layer: output projection, tanh gate and residual in one GEMM.

    y = residual + tanh(gate) * (attn @ weight^T)            y = residual, bit for bit, where rows is False

attn: [*, K]    weight: [C, K]    residual, y: [*, C]    gate: [1]    rows: bool [*] or none    M = all of * together
A False row is the empty-row rule: its attn is never read and may hold NaN, and it sends exactly 0 into the gradients
of attn, weight and gate. A block of rows that are all False reads no weight either. With t = tanh(gate), dy the
gradient of y and p = dy @ weight in fp32:

    dresidual = dy    dattn = t * p    dweight = t * dy^T @ attn    dt = sum(dy * (attn @ weight^T)) = sum(p * attn)

so dt falls out of dattn's product before it is rounded, and the projected branch is never stored or made again. The
tanh of one number, forward and backward, is left to torch.
Bound: flops (2 M C K) in prefill, the weight's bytes in decode. Beside attn and weight 2 M C elements move, residual
and y; a GEMM and then a gated add also write and read the branch, 4 M C. Numerics: fp32 sums, one rounding at the
store; dt is one fp32 partial sum a program, added up by torch.sum, so it is the same every run.

Inference has a free form: F.linear(attn, fold_gate(weight, gate)) + residual. It wins where the gate stands still: the
vendor's GEMM, no kernel of ours, but the weight is rounded once more (half a unit in its last place), the branch is
stored, False rows must hold 0 in attn, and it is a second weight while training goes on. The fused form wins in
training, wherever the gate changes, and where rows are masked.
Source: NVLM paper (arXiv 2409.11402) section 4.3 for the gate; the order of casts is this project's.
"""

from typing import Optional

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton
from nvlm_kernels.ops.gemm import GROUP, grouped_order, tile_sizes

TRAINED = 1024  # the tiles of a backward are large: nothing is trained on a few rows


def gated_project_ref(attn: Tensor, weight: Tensor, residual: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return (residual + gate.tanh() * F.linear(attn, weight)).to(residual.dtype)  # the gate may be wider
    attn = torch.where(rows[..., None], attn, 0)
    return torch.where(rows[..., None], gated_project_ref(attn, weight, residual, gate, None), residual)


@triton.jit
def _rows(rows_ptr, offs_m, M, HAS_ROWS: tl.constexpr):
    """Which of these rows are there and see something."""
    inside = offs_m < M
    if HAS_ROWS:
        inside = inside & (tl.load(rows_ptr + offs_m, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _fwd_kernel(
    attn_ptr,
    weight_ptr,
    residual_ptr,
    t_ptr,
    rows_ptr,
    y_ptr,
    M,
    C,
    K,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = grouped_order(tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sees, in_n = _rows(rows_ptr, offs_m, M, HAS_ROWS), offs_n < C
    end = K
    if HAS_ROWS:
        end = K * tl.max(sees.to(tl.int32), 0)  # nobody sees: nothing to multiply
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        attn = tl.load(attn_ptr + offs_m[:, None] * K + k[None, :], mask=sees[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + offs_n[None, :] * K + k[:, None], mask=in_n[None, :] & (k < K)[:, None], other=0.0
        )
        acc = tl.dot(attn, weight, acc, input_precision="ieee")
    at = offs_m[:, None] * C + offs_n[None, :]
    mask = (offs_m < M)[:, None] & in_n[None, :]
    residual = tl.load(residual_ptr + at, mask=mask)
    y = (residual.to(tl.float32) + tl.load(t_ptr) * acc).to(residual.dtype)
    tl.store(y_ptr + at, tl.where(sees[:, None], y, residual), mask=mask)


@triton.jit
def _dattn_kernel(
    dy_ptr,
    weight_ptr,
    attn_ptr,
    t_ptr,
    rows_ptr,
    dattn_ptr,
    dt_ptr,
    M,
    C,
    K,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = grouped_order(tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sees, in_n = _rows(rows_ptr, offs_m, M, HAS_ROWS), offs_n < K
    end = C
    if HAS_ROWS:
        end = C * tl.max(sees.to(tl.int32), 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, end, BLOCK_K):
        c = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        dy = tl.load(dy_ptr + offs_m[:, None] * C + c[None, :], mask=sees[:, None] & (c < C)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + c[:, None] * K + offs_n[None, :], mask=in_n[None, :] & (c < C)[:, None], other=0.0
        )
        acc = tl.dot(dy, weight, acc, input_precision="ieee")
    at = offs_m[:, None] * K + offs_n[None, :]
    attn = tl.load(attn_ptr + at, mask=sees[:, None] & in_n[None, :], other=0.0).to(tl.float32)
    tl.store(dt_ptr + tl.program_id(0), tl.sum(acc * attn))
    tl.store(dattn_ptr + at, tl.load(t_ptr) * acc, mask=(offs_m < M)[:, None] & in_n[None, :])


@triton.jit
def _dweight_kernel(
    dy_ptr,
    attn_ptr,
    t_ptr,
    rows_ptr,
    dweight_ptr,
    M,
    C,
    K,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_n = grouped_order(tl.cdiv(C, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    offs_c = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_c, in_n = offs_c < C, offs_n < K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, M, BLOCK_K):
        m = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        sees = _rows(rows_ptr, m, M, HAS_ROWS)
        dy = tl.load(dy_ptr + m[None, :] * C + offs_c[:, None], mask=sees[None, :] & in_c[:, None], other=0.0)
        attn = tl.load(attn_ptr + m[:, None] * K + offs_n[None, :], mask=sees[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(dy, attn, acc, input_precision="ieee")
    at = offs_c[:, None] * K + offs_n[None, :]
    tl.store(dweight_ptr + at, tl.load(t_ptr) * acc, mask=in_c[:, None] & in_n[None, :])


def _grid(rows: int, columns: int, sizes: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"]),)


@triton_op("nvlm::gated_project", mutates_args=())
def _fwd(
    attn: Tensor,
    weight: Tensor,
    residual: Tensor,
    t: Tensor,
    rows: Optional[Tensor],  # noqa: UP045 (what torch's schema reader takes)
) -> Tensor:
    """attn [M, K], residual [M, C], t: tanh(gate), fp32 [1], rows: int32 [M].

    With a load of fewer bits in attn's mask Triton 3.7 multiplies fp32 in TF32 on sm_100, against input_precision.
    """
    y = torch.empty_like(residual)
    (num, width), inner = residual.shape, attn.shape[1]
    sizes = tile_sizes(num, attn.dtype)
    if num:
        wrap_triton(_fwd_kernel)[_grid(num, width, sizes)](
            attn,
            weight,
            residual,
            t,
            t if rows is None else rows,
            y,
            num,
            width,
            inner,
            HAS_ROWS=rows is not None,
            GROUP=GROUP,
            **sizes,
        )
    return y


@triton_op("nvlm::gated_project_bwd_attn", mutates_args=())
def _bwd_attn(
    dy: Tensor,
    attn: Tensor,
    weight: Tensor,
    t: Tensor,
    rows: Optional[Tensor],  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    dattn = torch.empty_like(attn)
    (num, inner), width = attn.shape, dy.shape[1]
    sizes = tile_sizes(TRAINED, attn.dtype)
    grid = _grid(num, inner, sizes)
    dt = torch.empty(grid, dtype=torch.float32, device=dy.device)
    if num:
        wrap_triton(_dattn_kernel)[grid](
            dy,
            weight,
            attn,
            t,
            t if rows is None else rows,
            dattn,
            dt,
            num,
            width,
            inner,
            HAS_ROWS=rows is not None,
            GROUP=GROUP,
            **sizes,
        )
    return dattn, dt.sum().reshape(t.shape)


@triton_op("nvlm::gated_project_bwd_weight", mutates_args=())
def _bwd_weight(
    dy: Tensor,
    attn: Tensor,
    t: Tensor,
    rows: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    (num, inner), width = attn.shape, dy.shape[1]
    dweight = torch.empty(width, inner, dtype=attn.dtype, device=attn.device)
    sizes = tile_sizes(TRAINED, attn.dtype)
    wrap_triton(_dweight_kernel)[_grid(width, inner, sizes)](
        dy,
        attn,
        t,
        t if rows is None else rows,
        dweight,
        num,
        width,
        inner,
        HAS_ROWS=rows is not None,
        GROUP=GROUP,
        **sizes,
    )
    return dweight


def _save(ctx, inputs, output):
    attn, weight, _, t, rows = inputs
    ctx.save_for_backward(attn, weight, t, rows)


def _backward(ctx, dy):
    attn, weight, t, rows = ctx.saved_tensors
    plain = dy.contiguous()
    dattn = dweight = dt = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        dattn, dt = _bwd_attn(plain, attn, weight, t, rows)
    if ctx.needs_input_grad[1]:  # a frozen weight costs no GEMM
        dweight = _bwd_weight(plain, attn, t, rows)
    return dattn, dweight, dy, dt, None


_fwd.register_autograd(_backward, setup_context=_save)


def gated_project(attn: Tensor, weight: Tensor, residual: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """residual + tanh(gate) * (attn @ weight^T), and just residual where rows is False.

    attn: [*, K]; weight: [C, K]; residual: [*, C], all of one dtype; gate: [1], that dtype or fp32; rows: bool [*].
    Raises ValueError on anything else.
    """
    name = "gated_project"
    if not attn.is_floating_point() or attn.dim() < 1 or not attn.shape[-1]:
        raise ValueError(f"{name}: attn must be floating [*, K], got {attn.dtype} {tuple(attn.shape)}")
    if weight.dim() != 2 or weight.shape[1] != attn.shape[-1] or not weight.shape[0]:
        raise ValueError(f"{name}: weight must be [C, {attn.shape[-1]}], got {tuple(weight.shape)}")
    shapes = {"residual": (residual, (*attn.shape[:-1], weight.shape[0])), "gate": (gate, (1,))}
    if rows is not None:
        shapes["rows"] = (rows, attn.shape[:-1])
    for what, (t, shape) in shapes.items():
        if t.shape != shape:
            raise ValueError(f"{name}: {what} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    dtypes: dict[str, tuple[Tensor | None, set[torch.dtype]]] = {
        "weight": (weight, {attn.dtype}),
        "residual": (residual, {attn.dtype}),
    }
    dtypes |= {"gate": (gate, {attn.dtype, torch.float32}), "rows": (rows, {torch.bool})}
    for what, (given, allowed) in dtypes.items():
        if given is not None and (given.dtype not in allowed or given.device != attn.device):
            wanted = " or ".join(sorted(map(str, allowed)))
            raise ValueError(f"{name}: {what} must be {wanted} on {attn.device}, got {given.dtype} on {given.device}")
    if not use_triton(attn):
        return gated_project_ref(attn, weight, residual, gate, rows)
    rows = None if rows is None else rows.reshape(-1).to(torch.int32)
    attn, flat = attn.reshape(-1, attn.shape[-1]).contiguous(), residual.reshape(-1, weight.shape[0]).contiguous()
    return _fwd(attn, weight.contiguous(), flat, gate.float().tanh(), rows).view(residual.shape)


def fold_gate(weight: Tensor, gate: Tensor) -> Tensor:
    """tanh(gate) * weight in fp32, rounded once: gated_project is then F.linear(attn, folded) + residual."""
    if weight.dim() != 2 or not weight.is_floating_point() or gate.shape != (1,) or not gate.is_floating_point():
        raise ValueError(
            f"fold_gate: weight must be floating [C, K] and gate floating [1], "
            f"got {weight.dtype} {tuple(weight.shape)}, {gate.dtype} {tuple(gate.shape)}"
        )
    return (gate.float().tanh() * weight.float()).to(weight.dtype)
