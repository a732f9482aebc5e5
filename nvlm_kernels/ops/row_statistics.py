"""Mean and sum of squared deviations of rows, which a norm behind a shuffle joins into those of longer rows.

    mean = sum(x) / C        square = sum((x - mean)^2)

x: [N, P, C], any tile and row stride      statistics: [N, P, 2] fp32, (mean, square)

Bound: memory, x once. Numerics: fp32; each block of columns has its own mean and blocks are joined by Chan's update, so
a mean a thousand times the deviation cancels nothing. No gradient: whoever norms by them differentiates them too.
Source: Chan, Golub, LeVeque 1979.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op, use_triton


def row_statistics_ref(x: Tensor) -> Tensor:
    """In fp32, or fp64 of what is fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    return torch.cat([mean, (wide - mean).square().sum(-1, keepdim=True)], -1)


@triton.jit
def join_columns(mean, square, x, mask, before, count):
    """Statistics [ROWS] of `before` columns, with those of `count` more: x [ROWS, BLOCK], 0 where the mask is not."""
    here = tl.sum(x, 1) / count
    apart = tl.where(mask, x - here[:, None], 0.0)
    step = here - mean
    share = count / (before + count)
    return mean + step * share, square + tl.sum(apart * apart, 1) + step * step * (before * share)


@triton.jit
def _statistics_kernel(
    x_ptr, stats_ptr, rows, per_tile, C, stride_n, stride_p, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    base = row // per_tile * stride_n + row % per_tile * stride_p
    mean = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in range(0, C, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + base[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean, square = join_columns(
            mean, square, x, mask, tl.cast(first, tl.float32), tl.minimum(C - first, BLOCK).to(tl.float32)
        )
    tl.store(stats_ptr + 2 * row, mean, mask=inside)
    tl.store(stats_ptr + 2 * row + 1, square, mask=inside)


def block_of(width: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a program's block of that many elements."""
    block = min(512, triton.next_power_of_2(width))
    return max(1, elements // block), block


@triton_op("nvlm::row_statistics", mutates_args=())
def _fwd(x: Tensor) -> Tensor:
    num, per_tile, width = x.shape
    statistics = torch.empty(num, per_tile, 2, dtype=torch.float32, device=x.device)
    if statistics.numel():
        rows, block = block_of(width, 2048)  # 8 elements a thread with 4 warps of 64 lanes (AMD) and of 32 alike
        grid = (triton.cdiv(num * per_tile, rows),)
        strides = x.stride(0), x.stride(1)
        wrap_triton(_statistics_kernel)[grid](
            x, statistics, num * per_tile, per_tile, width, *strides, ROWS=rows, BLOCK=block
        )
    return statistics


@torch.no_grad()
def row_statistics(x: Tensor) -> Tensor:
    """[N, P, C] to [N, P, 2] fp32: mean and sum of squared deviations of every row. No gradient.

    Raises ValueError where x is not floating [N, P, C] with C > 0.
    """
    if x.dim() != 3 or not x.is_floating_point() or not x.shape[2]:
        raise ValueError(f"row_statistics: x must be floating [N, P, C], got {x.dtype} {tuple(x.shape)}")
    if not use_triton(x):
        return row_statistics_ref(x).float()
    return _fwd(x if x.stride(2) == 1 else x.contiguous())
