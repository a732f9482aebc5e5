"""Attention of 1 to 8 tokens to many keys, split over the keys so that few rows fill the device.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s]      over start[t] <= s < end[t]; 0 if there are none

q, out: [B, T, H, D]    k, v: [B, S, Hkv, D]    T at most 8    no gradients: for decoding only
intervals: [B, T, 2] of [start, end); or lengths [B], and then token t sees [0, length - T + 1 + t).

The keys that a block of rows sees are divided into equal splits, whatever the intervals are. One program per split
leaves a row max m, a row sum l and a weighted sum of v in fp32; a second kernel combines the splits of each row:

    out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i      m = max_i m_i

An empty split leaves m = -inf and l = 0, and its acc is neither written nor read. The grid depends on shapes alone and
nothing waits for the device, so one CUDA graph serves every length. How many keys there are changes no constant of
the kernels, so a growing context compiles nothing. tile_attention and decode_attention call this.
Bound: memory, the bytes of the visible k and v; the splits add 2 * 4 * num_splits * T * H * D bytes.
Numerics: as the forward of tile_attention.
Source: Flash-Decoding (PyTorch blog, October 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import triton_op
from nvlm_kernels.ops.attention.online_softmax import attend, key_range, load_queries

MAX_TOKENS = 8
PROGRAMS = 128  # about one per multiprocessor of an H100 (132); chosen, not measured


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, keys: str = "k", values: str = "v") -> None:
    """Raises ValueError unless q [B, T, H, D] and k, v [B, S, Hkv, D] fit each other. keys, values: their names."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{op}: q, {keys}, {values} must be [B, T, H, D] and [B, S, Hkv, D] twice, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: the {q.shape[2]} heads of q must be a multiple of the {k.shape[2]} heads of {keys}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: q, {keys}, {values} must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, {keys}, {values} must be on one device, got {q.device}, {k.device}, {v.device}")


def check_kernel(op: str, q: Tensor) -> None:
    """Raises ValueError unless the kernels support q's head dim and dtype."""
    if q.shape[3] % 16 or not 16 <= q.shape[3] <= 128:
        raise ValueError(f"{op}: head dim of q must be a multiple of 16 up to 128, got {q.shape[3]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: q must be float32, float16 or bfloat16, got {q.dtype}")


def rows_contiguous(t: Tensor) -> Tensor:
    """Returns t with a contiguous last axis. Kernels take any other strides, so a view of a cache is not copied."""
    return t if t.stride(-1) == 1 else t.contiguous()


@triton.jit(do_not_specialize=["num_keys"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    intervals_ptr,
    max_ptr,
    sum_ptr,
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
    q, token, head, start, end = load_queries(
        q_ptr, intervals_ptr, batch, group, first_row, num_tokens, num_keys, stride_qb, stride_qt, stride_qh,
        G, FROM_LENGTH, D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    lo, hi = key_range(start, end, num_keys)
    keys_per_split = (tl.maximum(hi - lo, 0) + num_splits * BLOCK_N - 1) // (num_splits * BLOCK_N) * BLOCK_N
    lo = lo + split.to(tl.int32) * keys_per_split
    hi = tl.minimum(lo + keys_per_split, hi)
    k_ptr += batch * stride_kb + group * stride_kh
    v_ptr += batch * stride_vb + group * stride_vh
    row_max, row_sum, acc = attend(
        q, start, end, lo, hi, k_ptr, v_ptr, stride_ks, stride_vs, SCALE, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    sees = start < end
    row_max = tl.where(sees, row_max, float("-inf"))
    offs_d = tl.arange(0, BLOCK_D)
    lanes = (offs_d < D)[None, :]
    inside = token < num_tokens
    row = ((split * (tl.num_programs(2) // groups) + batch) * num_tokens + token) * num_heads + head
    tl.store(max_ptr + row, row_max, mask=inside)
    tl.store(sum_ptr + row, tl.where(sees, row_sum, 0.0), mask=inside)
    written = inside & (row_max > float("-inf"))
    tl.store(acc_ptr + row[:, None] * D + offs_d[None, :], acc, mask=written[:, None] & lanes)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _combine_kernel(
    max_ptr,
    sum_ptr,
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
    split_max = tl.load(max_ptr + at, mask=split < num_splits, other=float("-inf"))
    sees = split_max > float("-inf")
    split_sum = tl.load(sum_ptr + at, mask=sees, other=0.0)
    acc = tl.load(acc_ptr + at[:, None] * D + offs_d[None, :], mask=sees[:, None] & (offs_d < D)[None, :], other=0.0)
    row_max = tl.max(split_max, 0)
    weight = tl.exp2(split_max - tl.where(row_max > float("-inf"), row_max, 0.0))  # 0, not NaN, in an empty row
    row_sum = tl.sum(weight * split_sum, 0)
    out = tl.sum(weight[:, None] * acc, 0) / tl.where(row_sum > 0, row_sum, 1.0)
    tl.store(out_ptr + row * D + offs_d, out, mask=offs_d < D)


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    """Launch options: all rows of one or more tokens, up to 64; keys and warps as in `_sizes` of tile_attention."""
    rows = max(16, triton.next_power_of_2(q.shape[1] * (q.shape[2] // k.shape[2])))
    width = triton.next_power_of_2(q.shape[3])
    if q.dtype == torch.float32:
        side = 16 if width > 64 else 32
        rows, keys, num_warps, num_stages = min(rows, side), side, 4 if width <= 32 else 8, 1
    else:
        rows, num_warps, num_stages = min(rows, 64), 4, 2
        keys = 64 if rows < 64 or width <= 64 else 32
    return dict(BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=width, num_warps=num_warps, num_stages=num_stages)


def _most_splits(q: Tensor, k: Tensor) -> int:
    """The splits of as many keys as one likes: what fills the device."""
    sizes = _sizes(q, k)
    blocks = q.shape[0] * k.shape[2] * triton.cdiv(q.shape[1] * (q.shape[2] // k.shape[2]), sizes["BLOCK_M"])
    return max(1, PROGRAMS // blocks)


@triton_op("nvlm::split_attention", mutates_args=())
def _split(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, num_splits: int) -> Tensor:
    batch, num_tokens, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    row_max, row_sum = torch.empty(2, num_splits, *q.shape[:3], dtype=torch.float32, device=q.device).unbind()
    acc = torch.empty(num_splits, *q.shape, dtype=torch.float32, device=q.device)
    sizes = _sizes(q, k)
    grid = (num_splits, triton.cdiv(num_tokens * (num_heads // groups), sizes["BLOCK_M"]), batch * groups)
    wrap_triton(_split_kernel)[grid](
        q, k, v, intervals, row_max, row_sum, acc, num_tokens, num_keys, num_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=num_heads // groups, FROM_LENGTH=intervals.dim() == 1, SCALE=head_dim**-0.5, D=head_dim, **sizes,
    )  # fmt: skip
    num_rows = batch * num_tokens * num_heads
    wrap_triton(_combine_kernel)[(num_rows,)](
        row_max, row_sum, acc, out, num_splits, num_rows,
        D=head_dim, BLOCK_S=triton.next_power_of_2(max(num_splits, _most_splits(q, k))), BLOCK_D=sizes["BLOCK_D"],
        num_warps=4,
    )  # fmt: skip
    return out


def split_attention(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, num_splits: int | None = None) -> Tensor:
    """Runs the kernels on inputs that the caller has checked.

    Args:
        q: [B, T, H, D], T at most MAX_TOKENS.
        k, v: [B, S, Hkv, D], any strides.
        intervals: [B, T, 2] intervals or [B] lengths, integers.
        num_splits: Number of splits of the keys. Default: chosen from the shapes; tests set it.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    if num_splits is None:
        num_splits = max(1, min(_most_splits(q, k), triton.cdiv(k.shape[1], _sizes(q, k)["BLOCK_N"])))
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    return _split(q, k, v, intervals.contiguous(), num_splits)
