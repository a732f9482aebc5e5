FILE = "nvlm_kernels/ops/rotary.py"
MUTATIONS = [
    (
        FILE,
        "turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2",
        "turned1, turned2 = first * cos1 + second * sin1, second * cos2 - first * sin2",
        "turned the other way",
    ),
    (FILE, "second * cos2 + first * sin2", "second * cos1 + first * sin1", "the second half takes the first's angles"),
    (
        FILE,
        "first * cos1 + second * sin2, second * cos2 - first * sin1",
        "first * cos1 - second * sin2, second * cos2 + first * sin1",
        "backward turns forward",
    ),
    (
        FILE,
        "first * cos1 + second * sin2, second * cos2 - first * sin1",
        "first * cos1 + second * sin1, second * cos2 - first * sin2",
        "backward takes the other half's sines",
    ),
    (
        FILE,
        "token, head = (row // (H + HKV))[:, None], (row % (H + HKV))[:, None]",
        "token, head = (row // (H + 2 * HKV))[:, None], (row % (H + 2 * HKV))[:, None]",
        "v's rows are counted in the forward",
    ),
    (
        FILE,
        "(H + 2 * HKV) + head) * (2 * HALF) + offs_d\n    first = tl.load(x_ptr, mask=mask, other=0.0).to",
        "(H + HKV) + head) * (2 * HALF) + offs_d\n    first = tl.load(x_ptr, mask=mask, other=0.0).to",
        "rows of qkv without v",
    ),
    (FILE, "tl.store(to_k, first, mask=mask & (head >= H))", "tl.store(to_k, first, mask=mask)", "q is written over k"),
    (FILE, "mask & (head >= H) & (head < H + HKV)", "mask & (head >= H)", "v's gradient is read from dk"),
    (
        FILE,
        "sin_ptr + angle, is_q | is_k, HALF, True)\n    dx_ptr",
        "sin_ptr + angle, is_q | is_k, HALF, True)\n    mask = is_q | is_k\n    dx_ptr",
        "v's gradient is not written",
    ),
    (FILE, "& (position >= 0) & (position < S)", "& (position < S)", "a negative position writes"),
    (
        FILE,
        "& (position >= 0) & (position < S)",
        "& (position >= 0) & (position <= S)",
        "a position past the slots writes",
    ),
    (FILE, "v_cache_ptr + token // T * stride_vb", "v_cache_ptr + token // T * stride_kb", "v's cache by k's stride"),
    (FILE, "token // T * stride_kb", "token * stride_kb", "tokens for rows of the batch"),
    (FILE, "tl.store(to_v, first, mask=mask & is_v)", "tl.store(to_v, turned1, mask=mask & is_v)", "v is turned too"),
    (
        FILE,
        "tl.store(to_k, turned1, mask=mask & ~is_q & ~is_v)",
        "tl.store(to_k, first, mask=mask & ~is_q & ~is_v)",
        "half of k is not turned",
    ),
    (FILE, "(head - H - HKV) * stride_vh", "(head - H) * stride_vh", "v's heads are off"),
]
