"""Attention from text tokens to image tokens, where each text token sees one interval of them.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s]      over start[t] <= s < end[t]
    out[t] = 0                                                where start[t] >= end[t]

q, out: [B, T, H, D]    k, v: [B, S, Hkv, D], H a multiple of Hkv    intervals: [B, T, 2] integers.
A token with an empty interval gives exactly 0 and sends exactly 0 into every gradient. With p the softmax, dout the
gradient of out, and every sum over visible pairs only (dk, dv: also over the query heads of the kv head):

    delta[t] = dout[t] . out[t]      ds[t, s] = p[t, s] (dout[t] . v[s] - delta[t]) / sqrt(D)
    dq[t] = sum_s ds[t, s] k[s]      dk[s] = sum_t ds[t, s] q[t]      dv[s] = sum_t p[t, s] dout[t]

Bound: prefill by flops, 4 D per visible pair and query head forward and 10 D backward (14 D as implemented: both
backward kernels compute the scores again); decoding by the bytes of the visible k and v, where up to 8 tokens take
`split_attention`. Keys that no row of a block sees are not read (see `online_softmax`) and may hold NaN.
Numerics: scores, softmax and sums are in fp32; p and ds are rounded to the inputs' dtype for their products, as in
flash-attention. The backward uses the log-sum-exp of each row, which is +inf for an empty row, so that its p is 0. One
program sums dk and dv of a block of keys, without atomics: the same bits every run.
Source: NVLM paper (arXiv 2409.11402) section 4.3: a tile tag sees its own tile. The interval form follows
attention-gym's Flamingo mask; the kernels follow FlashAttention-2 (arXiv 2307.08691).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nvlm_kernels._backend import has_values, triton_op, use_triton
from nvlm_kernels.ops.attention.online_softmax import (
    LOG2E,
    attend,
    key_blocks,
    key_range,
    load_keys,
    load_queries,
    row_intervals,
    visible_keys,
)
from nvlm_kernels.ops.attention.split import MAX_TOKENS, check_attention, check_kernel, rows_contiguous, split_attention

INTERVAL_CHUNK = 128  # tokens whose intervals a program of the dk, dv kernel reads at once


def tile_attention_ref(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    if k.shape[1] == 0:
        # No image: zeros that still belong to the autograd graph of q, k and v.
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0) + (k.sum() + v.sum())
    start, end = intervals[..., :1], intervals[..., 1:]
    keys = torch.arange(k.shape[1], device=q.device)
    sees = end > start  # [B, T, 1]
    visible = ((keys >= start) & (keys < end)) | ~sees  # an empty row sees all keys, and is zeroed below
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(sees[..., None], out.transpose(1, 2), 0)


def tile_attention_by_blocks(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """The reference for rows of the batch that hold several documents: each document against its own keys alone."""
    out = []
    for qb, kb, vb, rows in zip(q.split(1), k.split(1), v.split(1), intervals.split(1), strict=True):
        starts = _diagonal_blocks(rows[0])
        edges = zip(*starts, (q.shape[1], k.shape[1]), strict=True)
        tokens, keys = ([b - a for a, b in zip(at, at[1:])] for at in edges)
        parts = qb.split(tokens, 1), kb.split(keys, 1), vb.split(keys, 1), rows.split(tokens, 1)
        blocks = zip(*parts, (first for _, first in starts), strict=True)
        out.append(torch.cat([tile_attention_ref(qs, ks, vs, seen - first) for qs, ks, vs, seen, first in blocks], 1))
    return torch.cat(out)


def _diagonal_blocks(intervals: Tensor) -> list[tuple[int, int]]:
    """Where the intervals [T, 2] divide into independent blocks: the first (token, key) of each, from (0, 0) on.

    No token of a block sees a key of another block.
    """
    start, end = intervals.unbind(-1)
    sees = end > start
    most = torch.iinfo(intervals.dtype).max
    reached = torch.where(sees, end, 0).cummax(0).values[:-1]  # the last key that earlier tokens see
    ahead = torch.where(sees, start, most).flip(0).cummin(0).values.flip(0)[1:]
    cuts = 1 + torch.nonzero(sees[1:] & (reached > 0) & (reached <= ahead)).flatten()
    return [(0, 0), *zip(cuts.tolist(), ahead[cuts - 1].tolist(), strict=True)]


@triton.jit
def _fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    intervals_ptr,
    out_ptr,
    lse_ptr,
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
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups = num_heads // G
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    q, token, head, start, end = load_queries(
        q_ptr, intervals_ptr, batch, group, tl.program_id(0).to(tl.int64) * BLOCK_M, num_tokens, num_keys,
        stride_qb, stride_qt, stride_qh, G, False, D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    lo, hi = key_range(start, end, num_keys)
    sees = start < end
    offs_d = tl.arange(0, BLOCK_D)
    lanes = (offs_d < D)[None, :]
    k_ptr += batch * stride_kb + group * stride_kh
    v_ptr += batch * stride_vb + group * stride_vh
    row_max, row_sum, acc = attend(
        q, start, end, lo, hi, k_ptr, v_ptr, stride_ks, stride_vs, SCALE, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    out = tl.where(sees[:, None], acc / tl.where(sees, row_sum, 1.0)[:, None], 0.0)
    row = (batch * num_tokens + token) * num_heads + head
    inside = token < num_tokens
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], out, mask=inside[:, None] & lanes)
    lse = row_max + tl.log2(tl.where(sees, row_sum, 1.0))
    tl.store(lse_ptr + row, tl.where(sees, lse, float("inf")), mask=inside)


@triton.jit
def _dq_block(
    q,
    dout,
    lse,
    delta,
    start,
    end,
    first,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    dq,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    visible, wanted = visible_keys(start, end, first, BLOCK_N)
    k = load_keys(k_ptr, stride_k, first, wanted, MASKED, D, BLOCK_N, BLOCK_D)
    v = load_keys(v_ptr, stride_v, first, wanted, MASKED, D, BLOCK_N, BLOCK_D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2E) - lse[:, None])
    ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    intervals_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dq_ptr,
    delta_ptr,
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
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups = num_heads // G
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    q, token, head, start, end = load_queries(
        q_ptr, intervals_ptr, batch, group, tl.program_id(0).to(tl.int64) * BLOCK_M, num_tokens, num_keys,
        stride_qb, stride_qt, stride_qh, G, False, D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    lo, hi = key_range(start, end, num_keys)
    sees = start < end
    offs_d = tl.arange(0, BLOCK_D)
    lanes = (offs_d < D)[None, :]
    read = sees[:, None] & lanes
    row = (batch * num_tokens + token) * num_heads + head
    at = row[:, None] * D + offs_d[None, :]
    dout = tl.load(dout_ptr + at, mask=read, other=0.0)
    out = tl.load(out_ptr + at, mask=read, other=0.0)
    lse = tl.load(lse_ptr + row, mask=sees, other=float("inf"))
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    inside = token < num_tokens
    tl.store(delta_ptr + row, delta, mask=inside)
    k_ptr += batch * stride_kb + group * stride_kh
    v_ptr += batch * stride_vb + group * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    before, full, masked = key_blocks(start, end, lo, hi, BLOCK_N)
    for i in range(full):
        first = lo + (before + i) * BLOCK_N
        dq = _dq_block(
            q, dout, lse, delta, start, end, first, k_ptr, v_ptr, stride_ks, stride_vs, dq,
            False, SCALE, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in range(masked):
        first = lo + tl.where(i < before, i, i + full) * BLOCK_N
        dq = _dq_block(
            q, dout, lse, delta, start, end, first, k_ptr, v_ptr, stride_ks, stride_vs, dq,
            True, SCALE, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    tl.store(dq_ptr + at, dq * SCALE, mask=inside[:, None] & lanes)


@triton.jit
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    intervals_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
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
    SCALE: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups = num_heads // G
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    first = (tl.program_id(0).to(tl.int64) * BLOCK_N).to(tl.int32)
    last = tl.minimum(first + BLOCK_N, num_keys)
    # The first and the last token that see any of the keys: only rows between them are processed.
    low = num_tokens
    high = 0
    for chunk in range(0, num_tokens, CHUNK):
        token, _, start, end = row_intervals(intervals_ptr, batch, chunk, num_tokens, num_keys, 1, False, CHUNK)
        sees = tl.maximum(start, first) < tl.minimum(end, last)
        low = tl.minimum(low, tl.min(tl.where(sees, token, num_tokens), 0))
        high = tl.maximum(high, tl.max(tl.where(sees, token + 1, 0), 0))
    keys = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    lanes = (offs_d < D)[None, :]
    inside = (keys < num_keys)[:, None] & lanes
    read = (keys < tl.where(low < high, num_keys, 0))[:, None] & lanes
    wide = keys.to(tl.int64)[:, None]
    k_ptr += batch * stride_kb + group * stride_kh
    v_ptr += batch * stride_vb + group * stride_vh
    k = tl.load(k_ptr + wide * stride_ks + offs_d[None, :], mask=read, other=0.0)
    v = tl.load(v_ptr + wide * stride_vs + offs_d[None, :], mask=read, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_ptr += batch * stride_qb
    first_row = batch * num_tokens * num_heads
    for rows in range(low * G, high * G, BLOCK_M):
        token, member, start, end = row_intervals(intervals_ptr, batch, rows, num_tokens, num_keys, G, False, BLOCK_M)
        head = group * G + member
        sees = tl.maximum(start, first) < tl.minimum(end, last)
        wanted = sees[:, None] & lanes
        row = first_row + token * num_heads + head
        at_q = token.to(tl.int64) * stride_qt + head * stride_qh
        q = tl.load(q_ptr + at_q[:, None] + offs_d[None, :], mask=wanted, other=0.0)
        dout = tl.load(dout_ptr + row[:, None] * D + offs_d[None, :], mask=wanted, other=0.0)
        lse = tl.load(lse_ptr + row, mask=sees, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=sees, other=0.0)
        visible = (keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :])
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * (SCALE * LOG2E) - lse[None, :])
        p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(tl.where(visible, ds, 0.0).to(q.dtype), q, dk, input_precision="ieee")
    at = ((batch * num_keys + wide) * groups + group) * D + offs_d[None, :]
    tl.store(dk_ptr + at, dk * SCALE, mask=inside)
    tl.store(dv_ptr + at, dv, mask=inside)


def _sizes(kernel: str, dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Launch options: of the blocks tried, the largest that spill no register on sm_80, sm_90, sm_100 and gfx942.

    Checked for D of 32, 64, 80, 96 and 128; D of 16 spills 8 bytes in places. Not timed. fp32 products do not use the
    matrix unit and keep a whole row of q in one thread, so wide heads get small blocks.
    """
    width = triton.next_power_of_2(head_dim)
    wide, narrow = {
        "fwd": ((16, 16, 8, 1), (32, 32, 8, 1)),
        "dq": ((16, 16, 8, 1), (32, 32, 8, 1)),
        "dkdv": ((16, 32, 4, 1), (32, 32, 8, 1)),
    }[kernel]
    half = {"fwd": (64, 64, 8, 2), "dq": (64, 32, 4, 2), "dkdv": (16, 128, 8, 2)}[kernel]
    fp32 = wide if width > 64 else narrow if width > 32 else (32, 32, 4, 1)
    rows, keys, num_warps, num_stages = fp32 if dtype == torch.float32 else half
    return dict(BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=width, num_warps=num_warps, num_stages=num_stages)


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])


@triton_op("nvlm::tile_attention", mutates_args=())
def _fwd(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sizes = _sizes("fwd", q.dtype, head_dim)
    grid = (triton.cdiv(num_tokens * (num_heads // groups), sizes["BLOCK_M"]), batch * groups)
    wrap_triton(_fwd_kernel)[grid](
        q, k, v, intervals, out, lse, num_tokens, num_keys, num_heads, *_strides(q, k, v),
        G=num_heads // groups, SCALE=head_dim**-0.5, D=head_dim, **sizes,
    )  # fmt: skip
    return out, lse


@triton_op("nvlm::tile_attention_dq", mutates_args=())
def _dq(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    sizes = _sizes("dq", q.dtype, head_dim)
    grid = (triton.cdiv(num_tokens * (num_heads // groups), sizes["BLOCK_M"]), batch * groups)
    wrap_triton(_dq_kernel)[grid](
        q, k, v, intervals, out, lse, dout, dq, delta, num_tokens, num_keys, num_heads, *_strides(q, k, v),
        G=num_heads // groups, SCALE=head_dim**-0.5, D=head_dim, **sizes,
    )  # fmt: skip
    return dq, delta


@triton_op("nvlm::tile_attention_dkdv", mutates_args=())
def _dkdv(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, lse: Tensor, delta: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1:3]
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    sizes = _sizes("dkdv", q.dtype, head_dim)
    grid = (triton.cdiv(num_keys, sizes["BLOCK_N"]), batch * groups)
    wrap_triton(_dkdv_kernel)[grid](
        q, k, v, intervals, lse, delta, dout, dk, dv, num_tokens, num_keys, num_heads, *_strides(q, k, v),
        G=num_heads // groups, SCALE=head_dim**-0.5, D=head_dim, CHUNK=INTERVAL_CHUNK, **sizes,
    )  # fmt: skip
    return dk, dv


def _save(ctx, inputs, output):
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, out, lse)


def _backward(ctx, dout, _):
    q, k, v, intervals, out, lse = ctx.saved_tensors
    dout = dout.contiguous()
    dq, delta = _dq(q, k, v, intervals, out, lse, dout)
    dk, dv = None, None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dk, dv = _dkdv(q, k, v, intervals, lse, delta, dout)
    return dq, dk, dv, None


_fwd.register_autograd(_backward, setup_context=_save)


def tile_attention(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """Attention of text tokens to the image tokens in their interval [start, end).

    Up to 8 tokens that need no gradient take `split_attention`, which has a fixed grid and no host sync, as a CUDA
    graph needs.

    Args:
        q: Queries [B, T, H, D]. The kernels take D in multiples of 16 up to 128, in fp32, fp16 or bf16.
        k: Image keys [B, S, Hkv, D] in q's dtype, any strides. S may be 0 (no image): every interval is then empty.
        v: Image values like k.
        intervals: int32 or int64 [B, T, 2].

    Returns:
        [B, T, H, D] in q's dtype. Differentiable in q, k and v.

    Raises:
        ValueError: A shape, dtype or device is wrong, or, on a CPU, an interval leaves [0, S]. A GPU does not check
            intervals, because that would wait for the device: it clamps them to [0, S].

    Source:
        NVLM paper (arXiv 2409.11402) section 4.3; FlashAttention-2 (arXiv 2307.08691).
    """
    check_attention("tile_attention", q, k, v)
    if intervals.shape != (*q.shape[:2], 2) or intervals.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tile_attention: intervals must be int32 or int64 of shape {(*q.shape[:2], 2)}, "
            f"got {intervals.dtype} {tuple(intervals.shape)}"
        )
    if intervals.device != q.device:
        raise ValueError(f"tile_attention: intervals are on {intervals.device}, q on {q.device}")
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not use_triton(q):
        if has_values(intervals):
            outside = intervals[((intervals < 0) | (intervals > k.shape[1])).any(-1)].tolist()
            if outside:
                raise ValueError(
                    f"tile_attention: intervals must be within the {k.shape[1]} keys, got {outside[0]} and "
                    f"{len(outside) - 1} more outside"
                )
        by_blocks = trained and q.numel() and k.numel() and has_values(intervals)
        return (tile_attention_by_blocks if by_blocks else tile_attention_ref)(q, k, v, intervals)
    check_kernel("tile_attention", q)
    if q.numel() == 0 or k.shape[1] == 0:
        return tile_attention_ref(q, k, v, intervals)
    if q.shape[1] <= MAX_TOKENS and not trained:
        return split_attention(q, k, v, intervals)
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    return _fwd(q, k, v, intervals.contiguous())[0]
