"""Root-mean-square norm over the last axis.

    y = weight * n    n = round(x * r)    r = 1 / sqrt(mean(x^2) + eps)         x, y: [*, C]    weight: [C]

With dy the gradient of y and dn = weight * dy, means over C and the sum over rows:

    dx = r * (dn - x * r^2 * mean(dn * x))        dweight = sum(dy * n)

Bound: memory, forward 2 tensors, backward 3 (r is found again from x, which is there anyway). Narrow rows share a
program. Numerics: the statistic and the quotient are fp32; the quotient is rounded to x.dtype before the weight
multiplies it, as the published Qwen2 and InternViT code does (both normalise, cast, then scale). dweight is at most
PARTIALS fp32 rows, each one program's share of x, added up by torch.sum, so it is the same every run; writing them
costs 4 * PARTIALS * C bytes beside the 3 tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton

PARTIALS = 128  # about one program a multiprocessor of an A100 or H100; not measured


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    stat = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (stat * torch.rsqrt(stat.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit
def inverse_rms(x, C, eps):
    """[ROWS, 1] of rows [ROWS, BLOCK_C] in fp32 that are 0 behind column C."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / C + tl.cast(eps, tl.float32))[:, None]


@triton.jit
def fwd_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    rows,
    C,
    eps,
    ADD: tl.constexpr,  # norm x + branch, and store that sum too
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    offs = row[:, None] * C + cols[None, :]
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total_ptr + offs, total, mask=mask)
        x = total.to(tl.float32)
    n = (x * inverse_rms(x, C, eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, weight[None, :] * n, mask=mask)


@triton.jit
def bwd_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    skip_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    C,
    eps,
    ADD: tl.constexpr,  # add skip, the gradient that reached x past the norm
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for block in range(pid, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < C)[None, :]
        offs = row[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        r = inverse_rms(x, C, eps)
        dn = weight * dy
        dx = r * (dn - x * r * (r * (tl.sum(dn * x, axis=1) / C)[:, None]))
        if ADD:
            dx += tl.load(skip_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx, mask=mask)
        dweight += dy * (x * r).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dweight_ptr + pid.to(tl.int64) * C + cols, tl.sum(dweight, axis=0), mask=cols < C)


def tile(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: 8192 elements of narrow rows, or one wide row, 8 a lane of AMD's 64."""
    columns = triton.next_power_of_2(width)
    rows = max(1, 8192 // columns)
    return rows, columns, min(max(rows * columns // 512, 1), 16)


def launch_fwd(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch and its norm, or x itself and its norm."""
    total, y = x if branch is None else torch.empty_like(x), torch.empty_like(x)
    if y.numel():
        width = x.shape[-1]
        rows = x.numel() // width
        block, columns, warps = tile(width)
        other, add = (x, False) if branch is None else (branch, True)
        wrap_triton(fwd_kernel)[(triton.cdiv(rows, block),)](
            x, other, weight, total, y, rows, width, eps, ADD=add, ROWS=block, BLOCK_C=columns, num_warps=warps
        )
    return total, y


def launch_bwd(x: Tensor, weight: Tensor, dy: Tensor, skip: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """dx, with skip added where there is one, and dweight."""
    dx = torch.empty_like(x)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    width = x.shape[-1]
    rows = x.numel() // width
    block, columns, warps = tile(width)
    programs = min(triton.cdiv(rows, block), PARTIALS)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    other, add = (dy, False) if skip is None else (skip, True)
    wrap_triton(bwd_kernel)[(programs,)](
        x, weight, dy, other, dx, dweight, rows, width, eps, ADD=add, ROWS=block, BLOCK_C=columns, num_warps=warps
    )
    return dx, dweight.sum(0).to(weight.dtype)


@triton_op("nvlm::rms_norm", mutates_args=())
def _fwd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch_fwd(x, None, weight, eps)[1]


@triton_op("nvlm::rms_norm_bwd", mutates_args=())
def _bwd(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_bwd(x, weight, dy, None, eps)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    return *_bwd(*ctx.saved_tensors, dy.contiguous(), ctx.eps), None


_fwd.register_autograd(_backward, setup_context=_save)


def check_norm(op: str, x: Tensor, width: int, eps: float, **weights: Tensor) -> None:
    """What the norms ask of a float tensor x and of weights [width]."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: expected floating rows [*, C], got {x.dtype} {tuple(x.shape)}")
    for name, weight in weights.items():
        if weight.shape != (width,):
            raise ValueError(f"{op}: {name} must have shape {(width,)}, got {tuple(weight.shape)}")
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(f"{op}: {name} must be {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}")
    if eps <= 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    if x.dtype == torch.float64 and use_triton(x):
        raise ValueError(f"{op}: x must be float32, float16 or bfloat16 for its kernel, got {x.dtype}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm. x: [*, C]; weight: [C], of x's dtype; returns [*, C] in it.

    Raises ValueError for a weight of another shape, dtype or device, and for eps <= 0.
    """
    check_norm("rms_norm", x, x.shape[-1] if x.dim() else 0, eps, weight=weight)
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps)
    return _fwd(x.contiguous(), weight.contiguous(), eps)
