FILE = "nvlm_kernels/ops/attention/decode.py"
SOFTMAX = "nvlm_kernels/ops/attention/online_softmax.py"
SPLIT = "nvlm_kernels/ops/attention/split.py"
MUTATIONS = [
    (SOFTMAX, "num_tokens + 1 + token", "num_tokens + 2 + token", "a token sees the next one"),
    (SOFTMAX, "num_tokens + 1 + token", "num_tokens + 1", "every token sees as much as the first"),
    (SOFTMAX, "tl.load(intervals_ptr + batch)", "tl.load(intervals_ptr)", "all requests have the first one's length"),
    (
        SOFTMAX,
        "end = tl.where(inside, tl.minimum(tl.maximum(end, 0)",
        "end = tl.where(inside, tl.minimum(tl.abs(end)",
        "a negative end is taken for its absolute value",
    ),
    (SPLIT, "lo = lo + split.to(tl.int32) * keys_per_split", "lo = lo", "every split begins with the first key"),
    (SPLIT, "hi = tl.minimum(lo + keys_per_split, hi)", "hi = hi", "every split goes on to the last key"),
    (SPLIT, "num_splits * BLOCK_N - 1) // (num_splits", "num_splits) // (num_splits", "the last split is lost"),
    (
        SPLIT,
        'mask=split < num_splits, other=float("-inf"))',
        "mask=split < num_splits, other=0.0)",
        "lanes past the last split count",
    ),
    (SPLIT, "weight * split_sum", "split_sum", "row sums of the splits are added as they are"),
    (SPLIT, "weight[:, None] * acc", "acc", "weighted v of the splits is added as it is"),
    (SPLIT, 'tl.where(row_max > float("-inf"), row_max, 0.0)', "row_max", "-inf minus -inf in a row that sees nothing"),
    (
        SPLIT,
        "mask=sees[:, None] & (offs_d < D)[None, :]",
        "mask=(split < num_splits)[:, None] & (offs_d < D)[None, :]",
        "acc of empty splits is read",
    ),
    (SPLIT, "tl.where(row_sum > 0, row_sum, 1.0)", "row_sum", "0 / 0 in a row that sees nothing"),
    (
        SPLIT,
        "    k_ptr += batch * stride_kb + group * stride_kh",
        "    k_ptr += batch * stride_kb",
        "every head reads the first head's keys",
    ),
    (SOFTMAX, "head = group * G + member", "head = group * G", "one query head of a group"),
    (
        SOFTMAX,
        "return visible, tl.max(visible.to(tl.int32), 0) > 0",
        "return visible, tl.max(visible.to(tl.int32), 0) >= 0",
        "positions past the length are read",
    ),
]
