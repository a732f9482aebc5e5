"""Residual add of a branch with a learned scale for every channel (LayerScale).

    y = x + branch * scale                    x, branch, y: [*, C]    scale: [C]

With dy the gradient of y and the sum over rows:

    dx = dy        dbranch = dy * scale        dscale = sum(dy * branch)

Source: InternViT's blocks, `ls1` and `ls2`. Bound: memory, 3 * numel * itemsize bytes each way (eager multiply-then-add
moves five tensors). A program has BLOCK_R rows of BLOCK_C columns, so a scale is read once for many rows. Numerics:
fp32 inside, one rounding at the store; dscale is at most PARTIALS fp32 rows, added up by torch.sum: same every run.

The statistics of y's rows, of y as it is stored, can be had in the same pass: what norms y then need not read it first.
A program has whole rows then, fewer of them, which it goes through block by block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton
from nvlm_kernels.ops.row_statistics import block_of, join_columns

BLOCK_R, BLOCK_C = 32, 128  # with 8 warps 8 elements a lane of AMD's 64: a 16-byte load in bf16
PARTIALS = 32  # times C / BLOCK_C column blocks: 800 programs at C = 3200; not measured


def layer_scale_residual_ref(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return x + branch * scale


@triton.jit
def _fwd_kernel(x_ptr, branch_ptr, scale_ptr, y_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    num_columns = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    row = (pid // num_columns).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = pid % num_columns * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    offs = row[:, None] * C + cols[None, :]
    scale = tl.load(scale_ptr + cols, mask=cols < C).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    branch = tl.load(branch_ptr + offs, mask=mask).to(tl.float32)
    tl.store(y_ptr + offs, x + branch * scale[None, :], mask=mask)


@triton.jit
def _fwd_statistics_kernel(
    x_ptr, branch_ptr, scale_ptr, y_ptr, stats_ptr, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in range(0, C, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (cols < C)[None, :]
        offs = row[:, None] * C + cols[None, :]
        scale = tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = (x + branch * scale[None, :]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs, y, mask=mask)
        mean, square = join_columns(
            mean,
            square,
            y.to(tl.float32),
            mask,
            tl.cast(first, tl.float32),
            tl.minimum(C - first, BLOCK).to(tl.float32),
        )
    tl.store(stats_ptr + 2 * row, mean, mask=row < rows)
    tl.store(stats_ptr + 2 * row + 1, square, mask=row < rows)


@triton.jit
def _bwd_kernel(
    dy_ptr, branch_ptr, scale_ptr, dbranch_ptr, dscale_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    num_columns = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split, splits = pid // num_columns, tl.num_programs(0) // num_columns
    cols = pid % num_columns * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr + cols, mask=cols < C).to(tl.float32)
    dscale = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(split, tl.cdiv(rows, BLOCK_R), splits):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < C)[None, :]
        offs = row[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dbranch_ptr + offs, dy * scale[None, :], mask=mask)
        dscale += dy * branch
    tl.store(dscale_ptr + split.to(tl.int64) * C + cols, tl.sum(dscale, axis=0), mask=cols < C)


@triton_op("nvlm::layer_scale_residual", mutates_args=())
def _fwd(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if y.numel():
        width = len(scale)
        rows = x.numel() // width
        grid = (triton.cdiv(rows, BLOCK_R) * triton.cdiv(width, BLOCK_C),)
        wrap_triton(_fwd_kernel)[grid](x, branch, scale, y, rows, width, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=8)
    return y


@triton_op("nvlm::layer_scale_residual_statistics", mutates_args=())
def _fwd_statistics(x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    statistics = torch.empty(*x.shape[:-1], 2, dtype=torch.float32, device=x.device)
    if y.numel():
        width = len(scale)
        rows = x.numel() // width
        each, block = block_of(width, BLOCK_R * BLOCK_C)  # a tile of 1025 rows of 3200 fills 129 programs; not measured
        wrap_triton(_fwd_statistics_kernel)[(triton.cdiv(rows, each),)](
            x, branch, scale, y, statistics, rows, width, ROWS=each, BLOCK=block, num_warps=8
        )
    return y, statistics


@triton_op("nvlm::layer_scale_residual_bwd", mutates_args=())
def _bwd(dy: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dbranch = torch.empty_like(branch)
    if not dbranch.numel():
        return dbranch, torch.zeros_like(scale)
    width = len(scale)
    rows = dy.numel() // width
    splits = min(triton.cdiv(rows, BLOCK_R), PARTIALS)
    dscale = torch.empty(splits, width, dtype=torch.float32, device=dy.device)
    wrap_triton(_bwd_kernel)[(splits * triton.cdiv(width, BLOCK_C),)](
        dy, branch, scale, dbranch, dscale, rows, width, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=8
    )
    return dbranch, dscale.sum(0).to(scale.dtype)


def _save(ctx, inputs, output):
    _, branch, scale = inputs
    ctx.save_for_backward(branch, scale)


def _save_statistics(ctx, inputs, output):
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return None, None, None
    return dy, *_bwd(dy.contiguous(), *ctx.saved_tensors)


_fwd.register_autograd(_backward, setup_context=_save)
_fwd_statistics.register_autograd(_backward, setup_context=_save_statistics)


def layer_scale_residual(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """x + branch * scale in one pass. x, branch: [*, C], same shape; scale: [C]; all of one dtype and device.

    Raises ValueError otherwise.
    """
    _check("layer_scale_residual", x, branch, scale)
    if not use_triton(x):
        return layer_scale_residual_ref(x, branch, scale)
    return _fwd(x.contiguous(), branch.contiguous(), scale.contiguous())


def layer_scale_residual_statistics(x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """y = x + branch * scale, and the mean and sum of squared deviations of its rows, [*, 2] fp32, as `row_statistics`
    gives them; None instead of them where no kernel runs. They have no gradient.

    x, branch, scale, errors: as `layer_scale_residual`'s, and C > 0.
    """
    _check("layer_scale_residual_statistics", x, branch, scale)
    if not len(scale):
        raise ValueError("layer_scale_residual_statistics: C must be 1 or more, got 0: such a row has no mean")
    if not use_triton(x):
        return layer_scale_residual_ref(x, branch, scale), None
    return _fwd_statistics(x.contiguous(), branch.contiguous(), scale.contiguous())


def _check(name: str, x: Tensor, branch: Tensor, scale: Tensor) -> None:
    if x.shape != branch.shape or x.dim() == 0 or scale.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: x and branch must be [*, C] and scale [C], "
            f"got {tuple(x.shape)}, {tuple(branch.shape)}, {tuple(scale.shape)}"
        )
    if not x.dtype == branch.dtype == scale.dtype or not x.device == branch.device == scale.device:
        raise ValueError(
            f"{name}: x, branch and scale must share dtype and device, "
            f"got {x.dtype} {x.device}, {branch.dtype} {branch.device}, {scale.dtype} {scale.device}"
        )
    if use_triton(x) and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: x must be float32, float16 or bfloat16 for its kernel, got {x.dtype}")
