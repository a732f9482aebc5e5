FILE = "nvlm_kernels/ops/attention/decode.py"
SOFTMAX = "nvlm_kernels/ops/attention/online_softmax.py"
SPLIT = "nvlm_kernels/ops/attention/split.py"
MUTATIONS = [
    (SOFTMAX, "num_tokens + 1 + token", "num_tokens + 2 + token", "a token sees the one behind it"),
    (SOFTMAX, "num_tokens + 1 + token", "num_tokens + 1", "every token sees as much as the first"),
    (SOFTMAX, "tl.load(seen_ptr + batch)", "tl.load(seen_ptr)", "all requests have the first one's length"),
    (
        SOFTMAX,
        "end = tl.where(inside, tl.minimum(tl.maximum(end, 0)",
        "end = tl.where(inside, tl.minimum(tl.abs(end)",
        "an end before slot 0 is taken for its size",
    ),
    (SPLIT, "lo = lo + split.to(tl.int32) * share", "lo = lo", "every share begins with the first slot"),
    (SPLIT, "hi = tl.minimum(lo + share, hi)", "hi = hi", "every share goes on to the last slot"),
    (SPLIT, "num_splits * BLOCK_N - 1) // (num_splits", "num_splits) // (num_splits", "the last share is lost"),
    (
        SPLIT,
        'mask=split < num_splits, other=float("-inf"))',
        "mask=split < num_splits, other=0.0)",
        "lanes past the last share count",
    ),
    (SPLIT, "weight * total", "total", "sums of the shares are added as they are"),
    (SPLIT, "weight[:, None] * acc", "acc", "weighted v of the shares is added as it is"),
    (SPLIT, 'tl.where(top > float("-inf"), top, 0.0)', "top", "-inf minus -inf in a row that sees nothing"),
    (
        SPLIT,
        "mask=sees[:, None] & (offs_d < D)[None, :]",
        "mask=(split < num_splits)[:, None] & (offs_d < D)[None, :]",
        "acc of empty shares is read",
    ),
    (SPLIT, "tl.where(norm > 0, norm, 1.0)", "norm", "0 / 0 in a row that sees nothing"),
    (
        SPLIT,
        "    k_ptr += batch * stride_kb + group * stride_kh",
        "    k_ptr += batch * stride_kb",
        "every head reads the first head's keys",
    ),
    (SPLIT, "head = group * G + member", "head = group * G", "one query head of a group"),
    (
        SOFTMAX,
        "return visible, tl.max(visible.to(tl.int32), 0) > 0",
        "return visible, tl.max(visible.to(tl.int32), 0) >= 0",
        "slots past the length are read",
    ),
]
