FILE = "nvlm_kernels/ops/swiglu.py"
MUTATIONS = [
    (FILE, "gate * tl.sigmoid(gate) * up, mask", "tl.sigmoid(gate) * up, mask", "sigmoid for silu"),
    (FILE, "gate * tl.sigmoid(gate) * up, mask", "up * tl.sigmoid(up) * gate, mask", "gate and up are swapped"),
    (
        FILE,
        "gate_ptr = gate_up_ptr + row[:, None] * (2 * width)",
        "gate_ptr = gate_up_ptr + row[:, None] * width",
        "rows of half the stride",
    ),
    (FILE, "(1 + gate * (1 - s)), mask", "(1 + gate * s), mask", "another slope of silu"),
    (
        FILE,
        "dgate_up_ptr + offs + width, dy * gate * s,",
        "dgate_up_ptr + offs + width, dy * s,",
        "dup without the gate",
    ),
    (FILE, "tl.store(dgate_up_ptr + offs + width, dy * gate * s, mask=mask)", "pass", "dup is not written"),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < width)[None, :]\n    gate_ptr",
        "mask = (row < rows)[:, None] & (cols <= width)[None, :]\n    gate_ptr",
        "a column past the end",
    ),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < width)[None, :]\n    gate_ptr",
        "mask = (cols < width)[None, :]\n    gate_ptr",
        "rows without a mask",
    ),
    (
        FILE,
        "mask = (row < rows)[:, None] & (cols < width)[None, :]\n    offs",
        "mask = (row < rows - 1)[:, None] & (cols < width)[None, :]\n    offs",
        "the last row's gradient is not written",
    ),
]
