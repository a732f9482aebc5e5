FILE = "bench/proofs/bf16.py"
MUTATIONS = [
    (FILE, "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000", "ties go up"),
    (FILE, "np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)", "rounded", "NaN becomes infinity or zero"),
    (FILE, '    (InterpreterBuilder, "create_dot", _dot),\n', "", "a product of patterns"),
    (FILE, '("unary_op", "binary_op", "ternary_op")', '("unary_op", "ternary_op")', "patterns are added"),
    (FILE, "            setattr(owner, name, original)", "            pass", "the repair stays"),
]
