FILE = "nvlm_kernels/ops/row_statistics.py"
MUTATIONS = [
    (FILE, " + step * step * (before * share)", "", "variance without the part between blocks"),
    (
        FILE,
        "tl.sum(apart * apart, 1)",
        "(tl.sum(x * x, 1) - count * here * here)",
        "variance as mean of squares less square of the mean",
    ),
    (FILE, "tl.where(mask, x - here[:, None], 0.0)", "x - here[:, None]", "masked columns count in the variance"),
    (FILE, "tl.minimum(C - first, BLOCK)", "tl.minimum(C, BLOCK)", "a last block counted as whole"),
    (FILE, "mean + step * share", "mean + step * 0.5", "blocks of any size weigh the same"),
    (FILE, "row % per_tile * stride_p", "row % per_tile * C", "rows taken as if side by side"),
    (FILE, "(cols < C)[None, :]", "(cols <= C)[None, :]", "a column more"),
    (FILE, "x if x.stride(2) == 1 else x.contiguous()", "x", "columns taken as if side by side"),
]
