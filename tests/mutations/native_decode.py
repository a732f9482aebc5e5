TESTS = ("tests/runtime/test_weight_only.py", "tests/runtime/test_native.py", "-k", "not tokens and not twin")
FILE = "nvlm_kernels/native/decode.cpp"
MUTATIONS = [
    (FILE, "pairs << 16 : pairs & 0xffff0000u", "pairs << 16 : pairs", "odd weights keep the bits of even ones"),
    (FILE, "pairs = n == 0 ?", "pairs = n == 1 ?", "even and odd weights in each other's place"),
    (
        FILE,
        "for (; i < cols; i++) to[i] = from[i];",
        "for (; i < cols; i++) to[i] = 0;",
        "the columns behind the last whole block are lost",
    ),
    (
        FILE,
        "row = first + NR * apart; row < last && owner == me; row++)",
        "row = first + NR * apart; row + 1 < last && owner == me; row++)",
        "a row that is in no stream is lost",
    ),
    (
        FILE,
        "y[b * ldy + row + r * apart] = finish<KIND>(m, row + r * apart, out[r][b])",
        "y[b * ldy + row + r * apart] = finish<KIND>(m, row + r, out[r][b])",
        "a stream's bias is its neighbour's",
    ),
    (
        FILE,
        "last = m.rows * (thread + 1) / team->num",
        "last = m.rows / team->num * (thread + 1)",
        "rows that are no thread's",
    ),
    (FILE, "(row + r * apart) * blocks * GROUPS", "row * blocks * GROUPS", "int4 streams share their scales"),
    (FILE, "(8 * group + 4 * n)", "(8 * group)", "each int4 weight twice"),
    (FILE, "at_scale = i * GROUPS % LANES", "at_scale = i * GROUPS % (2 * LANES)", "scales are widened half as often"),
]
