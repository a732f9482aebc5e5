FILE = "nvlm_kernels/ops/gated_project.py"
ORDER = "nvlm_kernels/ops/gemm.py"
MUTATIONS = [
    (FILE, "+ tl.load(t_ptr) * acc).to(residual.dtype)", "+ acc).to(residual.dtype)", "the gate is left out"),
    (FILE, "tl.where(sees[:, None], y, residual)", "y", "masked rows pass through arithmetic"),
    (
        FILE,
        "mask=sees[:, None] & (k < K)[None, :], other=0.0",
        "mask=(offs_m < M)[:, None] & (k < K)[None, :], other=0.0",
        "masked attn is read",
    ),
    (
        FILE,
        "mask=in_n[None, :] & (k < K)[:, None], other=0.0",
        "mask=in_n[None, :] & (k < K)[:, None]",
        "no other= under the product",
    ),
    (FILE, "end = K * tl.max(sees.to(tl.int32), 0)", "end = K", "weight is read for rows that see nothing"),
    (FILE, "end = C\n", "end = C - 1\n", "dattn misses the last column"),
    (FILE, "tl.load(t_ptr) * acc, mask=(offs_m < M)[:, None]", "acc, mask=(offs_m < M)[:, None]", "dattn ungated"),
    (FILE, "tl.sum(acc * attn)", "tl.sum(acc)", "dt without attn"),
    (FILE, "tl.sum(acc * attn)", "tl.sum(tl.load(t_ptr) * acc * attn)", "dt gated twice"),
    (FILE, "dt.sum().reshape", "dt[:1].reshape", "dt of the first program alone"),
    (
        FILE,
        "attn = tl.load(attn_ptr + at, mask=sees[:, None] & in_n[None, :], other=0.0)",
        "attn = tl.load(attn_ptr + at, mask=(offs_m < M)[:, None] & in_n[None, :], other=0.0)",
        "dt reads masked attn",
    ),
    (FILE, "sees = _rows(rows_ptr, m, M, HAS_ROWS)", "sees = m < M", "dweight of masked rows"),
    (FILE, "tl.load(t_ptr) * acc, mask=in_c", "acc, mask=in_c", "dweight ungated"),
    (
        FILE,
        "in_c, in_n = offs_c < C, offs_n < K",
        "in_c, in_n = offs_c <= C, offs_n < K",
        "dweight one row past the end",
    ),
    (FILE, "if ctx.needs_input_grad[1]:", "if True:", "a product for a frozen weight"),
    (ORDER, "first = pid // (GROUP * num_n) * GROUP", "first = pid // (GROUP * num_n)", "groups of tiles overlap"),
    (ORDER, "tl.minimum(num_m - first, GROUP)", "GROUP", "a last group counted as whole"),
]
