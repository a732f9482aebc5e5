FILE = "nvlm_kernels/ops/tanh_gated_add.py"
MUTATIONS = [
    (FILE, "x + tl.load(t_ptr) * branch, mask=mask", "x + branch, mask=mask", "the gate is left out"),
    (FILE, "mask = offs < numel\n    x =", "mask = offs <= numel\n    x =", "one lane past the end"),
    (FILE, "tl.store(dbranch_ptr + offs, tl.load(t_ptr) * dy", "tl.store(dbranch_ptr + offs, dy", "dbranch ungated"),
    (FILE, "tl.sum(dy * branch)", "tl.sum(dy)", "dt without the branch"),
    (
        FILE,
        "tl.load(dy_ptr + offs, mask=mask, other=0.0)",
        "tl.load(dy_ptr + offs, mask=mask)",
        "no other= in a sum",
    ),
]
