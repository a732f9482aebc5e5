"""Attention of 1 to 8 tokens to a long cache of keys: split over the keys, so that a few rows fill the device.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s]      over start[t] <= s < end[t], 0 where there are none

q, out: [B, T, H, D]    k, v: [B, S, Hkv, D]    T at most 8    no gradients: decoding only
seen: [B, T, 2] intervals [start, end), or [B] lengths, and then row t sees [0, length - T + 1 + t).
Every program takes one share of the keys its rows see, shares being equal whatever the intervals are, and leaves a
maximum m, a sum l and a weighted sum of v in fp32; a second kernel adds the shares of a row up,

    out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i      m = max_i m_i

A share of nothing leaves m = -inf, l = 0, and its acc is neither written nor read. The grid depends on shapes alone and
nothing waits for the device, so a CUDA graph holds for every length. Two readers: tile_attention and decode_attention.
Bound: memory, the bytes of the visible k and v; the shares add 2 * 4 * num_splits * T * H * D bytes.
Numerics: as tile_attention forward. Source: flash-decoding (PyTorch blog, October 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op
from nvlm_kernels.ops.attention.online_softmax import attend, hull, row_intervals

MAX_TOKENS = 8
PROGRAMS = 128  # about one for each multiprocessor of an H100 (132); chosen, not measured


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, keys: str = "k", values: str = "v") -> None:
    """What every attention op asks of q, k and v."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{op}: q, {keys}, {values} must be [B, T, H, D] and [B, S, Hkv, D] twice, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} heads of q are no multiple of {k.shape[2]} of {keys}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: q, {keys}, {values} must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, {keys}, {values} must be on one device, got {q.device}, {k.device}, {v.device}")


def check_kernel(op: str, q: Tensor) -> None:
    """What the kernels ask beyond it."""
    if q.shape[3] % 16 or not 16 <= q.shape[3] <= 128:
        raise ValueError(f"{op}: head dim of q must be a multiple of 16 up to 128, got {q.shape[3]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: q must be float32, float16 or bfloat16, got {q.dtype}")


def rows_contiguous(t: Tensor) -> Tensor:
    """t itself if its last axis is contiguous: kernels take any other strides, so a view of a cache is not copied."""
    return t if t.stride(-1) == 1 else t.contiguous()


@triton.jit
def _share_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seen_ptr,
    peak_ptr,
    total_ptr,
    acc_ptr,
    num_tokens,
    num_keys,
    num_heads,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    G: tl.constexpr,
    FROM_LENGTH: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups = num_heads // G
    num_splits = tl.num_programs(0)
    split = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64) // groups
    group = tl.program_id(2).to(tl.int64) % groups
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_M
    token, member, start, end = row_intervals(seen_ptr, batch, first_row, num_tokens, num_keys, G, FROM_LENGTH, BLOCK_M)
    head = group * G + member
    lo, hi = hull(start, end, num_keys)
    share = (tl.maximum(hi - lo, 0) + num_splits * BLOCK_N - 1) // (num_splits * BLOCK_N) * BLOCK_N
    lo = lo + split.to(tl.int32) * share
    hi = tl.minimum(lo + share, hi)
    sees = start < end
    offs_d = tl.arange(0, BLOCK_D)
    lanes = (offs_d < D)[None, :]
    at_q = q_ptr + batch * stride_qb + token.to(tl.int64) * stride_qt + head * stride_qh
    q = tl.load(at_q[:, None] + offs_d[None, :], mask=sees[:, None] & lanes, other=0.0)
    k_ptr += batch * stride_kb + group * stride_kh
    v_ptr += batch * stride_vb + group * stride_vh
    peak, total, acc = attend(
        q, start, end, lo, hi, k_ptr, v_ptr, stride_ks, stride_vs, SCALE, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    peak = tl.where(sees, peak, float("-inf"))
    inside = token < num_tokens
    row = ((split * (tl.num_programs(2) // groups) + batch) * num_tokens + token) * num_heads + head
    tl.store(peak_ptr + row, peak, mask=inside)
    tl.store(total_ptr + row, tl.where(sees, total, 0.0), mask=inside)
    written = inside & (peak > float("-inf"))
    tl.store(acc_ptr + row[:, None] * D + offs_d[None, :], acc, mask=written[:, None] & lanes)


@triton.jit
def _sum_kernel(
    peak_ptr,
    total_ptr,
    acc_ptr,
    out_ptr,
    num_splits,
    num_rows,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    at = split.to(tl.int64) * num_rows + row
    peak = tl.load(peak_ptr + at, mask=split < num_splits, other=float("-inf"))
    sees = peak > float("-inf")
    total = tl.load(total_ptr + at, mask=sees, other=0.0)
    acc = tl.load(acc_ptr + at[:, None] * D + offs_d[None, :], mask=sees[:, None] & (offs_d < D)[None, :], other=0.0)
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(top > float("-inf"), top, 0.0))  # 0, not NaN, in a row that sees nothing
    norm = tl.sum(weight * total, 0)
    out = tl.sum(weight[:, None] * acc, 0) / tl.where(norm > 0, norm, 1.0)
    tl.store(out_ptr + row * D + offs_d, out, mask=offs_d < D)


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    """All rows of a token, or of several, up to 64; keys and warps as `_sizes` of tile_attention chooses them."""
    rows = max(16, triton.next_power_of_2(q.shape[1] * (q.shape[2] // k.shape[2])))
    width = triton.next_power_of_2(q.shape[3])
    if q.dtype == torch.float32:
        side = 16 if width > 64 else 32
        rows, keys, num_warps, num_stages = min(rows, side), side, 4 if width <= 32 else 8, 1
    else:
        rows, num_warps, num_stages = min(rows, 64), 4, 2
        keys = 64 if rows < 64 or width <= 64 else 32
    return dict(BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=width, num_warps=num_warps, num_stages=num_stages)


@triton_op("nvlm::split_attention", mutates_args=())
def _split(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_splits: int) -> Tensor:
    batch, num_tokens, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    peak, total = torch.empty(2, num_splits, *q.shape[:3], dtype=torch.float32, device=q.device).unbind()
    acc = torch.empty(num_splits, *q.shape, dtype=torch.float32, device=q.device)
    sizes = _sizes(q, k)
    grid = (num_splits, triton.cdiv(num_tokens * (num_heads // groups), sizes["BLOCK_M"]), batch * groups)
    wrap_triton(_share_kernel)[grid](
        q, k, v, seen, peak, total, acc, num_tokens, num_keys, num_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=num_heads // groups, FROM_LENGTH=seen.dim() == 1, SCALE=head_dim**-0.5, D=head_dim, **sizes,
    )  # fmt: skip
    num_rows = batch * num_tokens * num_heads
    wrap_triton(_sum_kernel)[(num_rows,)](
        peak, total, acc, out, num_splits, num_rows,
        D=head_dim, BLOCK_S=triton.next_power_of_2(num_splits), BLOCK_D=sizes["BLOCK_D"], num_warps=4,
    )  # fmt: skip
    return out


def split_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_splits: int | None = None) -> Tensor:
    """The kernels on inputs that their caller has checked; num_splits is for tests, by shape where None."""
    if num_splits is None:
        sizes = _sizes(q, k)
        blocks = q.shape[0] * k.shape[2] * triton.cdiv(q.shape[1] * (q.shape[2] // k.shape[2]), sizes["BLOCK_M"])
        num_splits = max(1, min(PROGRAMS // blocks, triton.cdiv(k.shape[1], sizes["BLOCK_N"])))
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    return _split(q, k, v, seen.contiguous(), num_splits)
