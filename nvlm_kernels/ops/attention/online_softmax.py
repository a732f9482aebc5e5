"""Rows of queries against the keys their intervals show: what tile_attention and split_attention share.

A block of rows is BLOCK_M pairs (token, query head) of one kv head, token by token, so k and v are read once for all
G = H / Hkv query heads and a block spans few tokens. Between the first start and the last end of its rows lie

    full blocks      of keys that every row sees: read and used as they are
    masked blocks    the others: a key that no row sees is not read, and 0 stands for it

so memory that no row may see can hold anything, NaN too, and is no traffic. A gap between a block's intervals costs
arithmetic, but no bytes: a branch around it would end the load pipeline. Full blocks come first, then the masked
ones before and behind them, for an online softmax takes keys in any order. Scores are in base 2, fp32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_intervals(
    seen_ptr, batch, first, num_tokens, num_keys, G: tl.constexpr, FROM_LENGTH: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Token, query head of its group, start and end, each [BLOCK_M], of the rows from `first`.

    seen_ptr: [B, T, 2] intervals or, FROM_LENGTH, [B] numbers of keys the last token sees, the one before one less.
    Rows behind the last are empty. What leaves the keys is cut off here: no host can look at it without waiting.
    """
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int32)
    token = rows // G
    inside = token < num_tokens
    if FROM_LENGTH:
        start = tl.zeros([BLOCK_M], tl.int64)
        end = tl.load(seen_ptr + batch).to(tl.int64) - num_tokens + 1 + token
    else:
        at = seen_ptr + (batch.to(tl.int64) * num_tokens + token) * 2
        start = tl.load(at, mask=inside, other=0).to(tl.int64)
        end = tl.load(at + 1, mask=inside, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), num_keys).to(tl.int32)
    end = tl.where(inside, tl.minimum(tl.maximum(end, 0), num_keys), 0).to(tl.int32)
    return token, rows % G, start, end


@triton.jit
def hull(start, end, num_keys):
    """From the first to behind the last key any row sees; the wrong way round where there are none."""
    sees = start < end
    return tl.min(tl.where(sees, start, num_keys), 0), tl.max(tl.where(sees, end, 0), 0)


@triton.jit
def key_blocks(start, end, lo, hi, BLOCK_N: tl.constexpr):
    """Of the blocks between lo and hi: how many before the full ones, how many full, how many masked in all."""
    sees = start < end
    num = tl.maximum(hi - lo + BLOCK_N - 1, 0) // BLOCK_N
    all_lo = tl.maximum(tl.max(tl.where(sees, start, 0), 0), lo)
    all_hi = tl.minimum(tl.min(tl.where(sees, end, hi), 0), hi)
    before = tl.minimum((all_lo - lo + BLOCK_N - 1) // BLOCK_N, num)
    full = tl.maximum(tl.maximum(all_hi - lo, 0) // BLOCK_N - before, 0)
    return before, full, num - full


@triton.jit
def visible_keys(start, end, first, BLOCK_N: tl.constexpr):
    """Which row sees which of the BLOCK_N keys from `first`, and which keys any row sees."""
    keys = first + tl.arange(0, BLOCK_N)
    visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
    return visible, tl.max(visible.to(tl.int32), 0) > 0


@triton.jit
def load_keys(
    ptr, stride, first, wanted, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_N, BLOCK_D] of k or v from key `first`: all keys or, MASKED, the wanted ones and 0 for the others."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    at = ptr + first.to(tl.int64) * stride + offs_n[:, None] * stride + offs_d[None, :]
    lanes = (offs_d < D)[None, :]
    if MASKED:
        x = tl.load(at, mask=wanted[:, None] & lanes, other=0.0)
    elif D == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=lanes, other=0.0)
    return x


@triton.jit
def _attend_block(
    q,
    start,
    end,
    first,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    peak,
    total,
    acc,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    visible, wanted = visible_keys(start, end, first, BLOCK_N)
    k = load_keys(k_ptr, stride_k, first, wanted, MASKED, D, BLOCK_N, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2E)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(peak, tl.max(scores, 1))
    shift = new
    if MASKED:
        shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    v = load_keys(v_ptr, stride_v, first, wanted, MASKED, D, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new, total * decay + tl.sum(p, 1), acc


@triton.jit
def attend(
    q,
    start,
    end,
    lo,
    hi,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row maximum in base 2, sum, and sum of v, not yet divided, of q [BLOCK_M, BLOCK_D] over the keys lo to hi.

    A row without a key there has maximum -inf and sums 0; an empty row may have the sums of keys others see.
    """
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    before, full, masked = key_blocks(start, end, lo, hi, BLOCK_N)
    end = tl.minimum(end, hi)  # not before: a row whose keys all lie behind hi sees something, elsewhere
    for i in range(full):
        first = lo + (before + i) * BLOCK_N
        peak, total, acc = _attend_block(
            q, start, end, first, k_ptr, v_ptr, stride_k, stride_v, peak, total, acc, False, SCALE, D, BLOCK_N, BLOCK_D
        )
    for i in range(masked):
        first = lo + tl.where(i < before, i, i + full) * BLOCK_N
        peak, total, acc = _attend_block(
            q, start, end, first, k_ptr, v_ptr, stride_k, stride_v, peak, total, acc, True, SCALE, D, BLOCK_N, BLOCK_D
        )
    return peak, total, acc
