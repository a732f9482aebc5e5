FILE = "nvlm_kernels/ops/rms_norm.py"
MUTATIONS = [
    (FILE, " / C + tl.cast(eps, tl.float32)", " / C", "eps is left out"),
    (FILE, "tl.sum(x * x, axis=1) / C", "tl.sum(x * x, axis=1) / x.shape[1]", "mean over the padded width"),
    (
        FILE,
        "n = (x * inverse_rms(x, C, eps)).to(dtype).to(tl.float32)",
        "n = x * inverse_rms(x, C, eps)",
        "no rounding before the weight",
    ),
    (FILE, "weight[None, :] * n, mask=mask", "n, mask=mask", "forward without the weight"),
    (
        FILE,
        "x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)\n    if ADD:",
        "x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)\n    if ADD:",
        "no other= under the statistic",
    ),
    (
        FILE,
        "row = tl.program_id(0).to(tl.int64) * ROWS",
        "row = tl.program_id(0).to(tl.int64) * (ROWS - 1)",
        "blocks of rows overlap",
    ),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < C)[None, :]\n    offs",
        "mask = (row <= rows)[:, None] & (cols < C)[None, :]\n    offs",
        "a row past the end",
    ),
    (
        FILE,
        "(r * (tl.sum(dn * x, axis=1) / C)[:, None])",
        "(tl.sum(dn * x, axis=1) / C)[:, None]",
        "an r is missing in dx",
    ),
    (FILE, "dn = weight * dy\n", "dn = dy\n", "dx without the weight"),
    (
        FILE,
        "dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)",
        "dy = tl.load(dy_ptr + offs, mask=mask)",
        "no other= under dweight",
    ),
    (FILE, "dweight += dy * (x * r)", "dweight = dy * (x * r)", "dweight of a program's last block only"),
    (FILE, "dweight += dy * (x * r)", "dweight += dn * (x * r)", "dweight times the weight"),
    (FILE, "tl.num_programs(0)):", "1):", "every program takes all later blocks"),
]
