"""What the kernels with a matrix product share: the order of their programs, and the size of their tiles."""

import torch
import triton
import triton.language as tl

GROUP = 8  # rows of output tiles that take turns, so that what they read stays in L2


@triton.jit
def grouped_order(num_m, num_n, GROUP: tl.constexpr):
    """Row and column of this program's output tile: down a column of at most GROUP tiles, then the next column."""
    pid = tl.program_id(0).to(tl.int64)
    first = pid // (GROUP * num_n) * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    at = pid % (GROUP * num_n)
    return first + at % rows, at // rows


def tile_sizes(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch options for an output of `rows` rows. Not measured: chosen to fit registers and 64 KB of shared memory."""
    if dtype == torch.float32:  # multiplied by FMA, out of registers
        if rows <= 16:
            return dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2)
    if rows <= 16:
        return dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3)
    if rows <= 64:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4)
