FILE = "nvlm_kernels/ops/layer_scale_residual.py"
MUTATIONS = [
    (FILE, "x + branch * scale[None, :], mask", "x + branch, mask", "the scale is left out"),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < C)[None, :]\n    offs",
        "mask = (row < rows)[:, None] & (cols <= C)[None, :]\n    offs",
        "a column past the end",
    ),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < C)[None, :]\n    offs",
        "mask = (row <= rows)[:, None] & (cols < C)[None, :]\n    offs",
        "a row past the end",
    ),
    (FILE, "row = (pid // num_columns)", "row = (pid % num_columns)", "row and column blocks are mixed up"),
    (FILE, "dy * scale[None, :], mask=mask", "dy, mask=mask", "dbranch without the scale"),
    (FILE, "dscale += dy * branch", "dscale += dy", "dscale without the branch"),
    (FILE, "dscale += dy * branch", "dscale = dy * branch", "dscale of a split's last block only"),
    (
        FILE,
        "dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)",
        "dy = tl.load(dy_ptr + offs, mask=mask)",
        "no other= under dscale",
    ),
    (FILE, "dscale_ptr + split.to(tl.int64) * C", "dscale_ptr", "all splits write one row"),
    (FILE, "return dy, *_bwd(", "return dy * 0, *_bwd(", "x gets no gradient"),
    (FILE, "            y.to(tl.float32),", "            x,", "statistics of x"),
    (FILE, "C - first, BLOCK)", "C, BLOCK)", "a last block counted as whole"),
    (FILE, "            tl.cast(first, tl.float32),", "            0.0,", "no block counts but the last"),
    (FILE, "(x + branch * scale[None, :]).to(y_ptr.dtype.element_ty)", "x + branch * scale[None, :]", "of y unrounded"),
    (FILE, "tl.store(stats_ptr + 2 * row + 1,", "tl.store(stats_ptr + 2 * row + 2,", "deviations one place on"),
    (FILE, "    ctx.mark_non_differentiable(output[1])\n", "", "statistics that say they have a gradient"),
]
