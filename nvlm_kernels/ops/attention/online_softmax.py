"""Online softmax of query rows over intervals of keys: the device functions of tile_attention and split_attention.

A row is a pair (token, query head). A block holds BLOCK_M rows of one kv head, token by token, so k and v are read once
for all G = H / Hkv query heads, and a block spans few tokens. The keys between the first start and the last end of a
block's rows are processed in blocks of BLOCK_N:

    full blocks      every row sees every key: read and used as they are
    masked blocks    all others: a key that no row sees is not read, and counts as 0

So memory that no row sees may hold anything, NaN too, and costs no traffic. A gap between the intervals of a block
costs arithmetic but no bytes: a branch around it would end the load pipeline. An online softmax takes keys in any
order: the full blocks come first, then the masked blocks before and after them.
Numerics: scores are in base 2, in fp32.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_intervals(
    intervals_ptr, batch, first, num_tokens, num_keys, G: tl.constexpr, FROM_LENGTH: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Returns token, query head within the group, start and end of BLOCK_M rows from row `first`, each [BLOCK_M].

    intervals_ptr: intervals [B, T, 2]; or, with FROM_LENGTH, lengths [B]: the last token sees `length` keys, each token
    before it one less. Rows past the last token see nothing. Intervals are clamped to the keys here, because the host
    cannot check them without waiting for the device.
    """
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int32)
    token = rows // G
    inside = token < num_tokens
    if FROM_LENGTH:
        start = tl.zeros([BLOCK_M], tl.int64)
        end = tl.load(intervals_ptr + batch).to(tl.int64) - num_tokens + 1 + token
    else:
        at = intervals_ptr + (batch.to(tl.int64) * num_tokens + token) * 2
        start = tl.load(at, mask=inside, other=0).to(tl.int64)
        end = tl.load(at + 1, mask=inside, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), num_keys).to(tl.int32)
    end = tl.where(inside, tl.minimum(tl.maximum(end, 0), num_keys), 0).to(tl.int32)
    return token, rows % G, start, end


@triton.jit
def load_queries(
    q_ptr,
    intervals_ptr,
    batch,
    group,
    first,
    num_tokens,
    num_keys,
    stride_qb,
    stride_qt,
    stride_qh,
    G: tl.constexpr,
    FROM_LENGTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The start of every kernel over query rows: q [BLOCK_M, BLOCK_D], 0 in rows that see nothing, and the rows' token,
    query head, start and end, each [BLOCK_M].
    """
    token, member, start, end = row_intervals(
        intervals_ptr, batch, first, num_tokens, num_keys, G, FROM_LENGTH, BLOCK_M
    )
    head = group * G + member
    offs_d = tl.arange(0, BLOCK_D)
    at = q_ptr + batch * stride_qb + token.to(tl.int64) * stride_qt + head * stride_qh
    mask = (start < end)[:, None] & (offs_d < D)[None, :]
    q = tl.load(at[:, None] + offs_d[None, :], mask=mask, other=0.0)
    return q, token, head, start, end


@triton.jit
def key_range(start, end, num_keys):
    """The first key that any row sees, and the end of the last one; lo > hi if no row sees any."""
    sees = start < end
    return tl.min(tl.where(sees, start, num_keys), 0), tl.max(tl.where(sees, end, 0), 0)


@triton.jit
def key_blocks(start, end, lo, hi, BLOCK_N: tl.constexpr):
    """Of the blocks between lo and hi: the number before the full ones, of full ones, and of masked ones in all."""
    sees = start < end
    num = tl.maximum(hi - lo + BLOCK_N - 1, 0) // BLOCK_N
    all_lo = tl.maximum(tl.max(tl.where(sees, start, 0), 0), lo)
    all_hi = tl.minimum(tl.min(tl.where(sees, end, hi), 0), hi)
    before = tl.minimum((all_lo - lo + BLOCK_N - 1) // BLOCK_N, num)
    full = tl.maximum(tl.maximum(all_hi - lo, 0) // BLOCK_N - before, 0)
    return before, full, num - full


@triton.jit
def visible_keys(start, end, first, BLOCK_N: tl.constexpr):
    """Of the BLOCK_N keys from `first`: which row sees which, [BLOCK_M, BLOCK_N], and which any sees, [BLOCK_N]."""
    keys = first + tl.arange(0, BLOCK_N)
    visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
    return visible, tl.max(visible.to(tl.int32), 0) > 0


@triton.jit
def load_keys(
    ptr, stride, first, wanted, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Loads [BLOCK_N, BLOCK_D] of k or v from key `first`; with MASKED, only the wanted keys, and 0 for the others."""
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
    row_max,
    row_sum,
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
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max
    if MASKED:
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing so far
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    v = load_keys(v_ptr, stride_v, first, wanted, MASKED, D, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, row_sum * decay + tl.sum(p, 1), acc


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
    """Attention of q [BLOCK_M, BLOCK_D] over the keys lo to hi: row max in base 2, row sum, and undivided sum of v.

    A row that sees no key there has row max -inf and sums of 0. A row that sees no key at all may have the sums of keys
    that other rows see: the caller masks it.
    """
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    before, full, masked = key_blocks(start, end, lo, hi, BLOCK_N)
    end = tl.minimum(end, hi)  # not earlier: a row whose keys all lie after hi is not empty
    for i in range(full):
        first = lo + (before + i) * BLOCK_N
        row_max, row_sum, acc = _attend_block(
            q, start, end, first, k_ptr, v_ptr, stride_k, stride_v, row_max, row_sum, acc,
            False, SCALE, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in range(masked):
        first = lo + tl.where(i < before, i, i + full) * BLOCK_N
        row_max, row_sum, acc = _attend_block(
            q, start, end, first, k_ptr, v_ptr, stride_k, stride_v, row_max, row_sum, acc,
            True, SCALE, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    return row_max, row_sum, acc
