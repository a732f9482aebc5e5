TESTS = ("tests/model/test_weight_only.py", "tests/engine/test_native.py", "-k", "not tokens and not twin")
VECTORS, TEAM = "nvlm_kernels/native/vectors.h", "nvlm_kernels/native/team.h"
LINEAR, INTEGERS = "nvlm_kernels/native/linear.h", "nvlm_kernels/native/integers.h"
ATTENTION = "nvlm_kernels/native/cached_attention.h"
MUTATIONS = [
    (VECTORS, "pairs << 16 : pairs & 0xffff0000u", "pairs << 16 : pairs", "odd weights keep the bits of even ones"),
    (VECTORS, "pairs = n == 0 ?", "pairs = n == 1 ?", "even and odd weights in each other's place"),
    (VECTORS, "odd ? LANES + (lane ^ BIT) : lane", "odd ? LANES + lane : lane", "keys that are not transposed"),
    (
        LINEAR,
        "for (; i < cols; i++) to[i] = from[i];",
        "for (; i < cols; i++) to[i] = 0;",
        "the columns behind the last whole block are lost",
    ),
    (
        LINEAR,
        "row = first + NR * apart; row < last && owner == me; row++)",
        "row = first + NR * apart; row + 1 < last && owner == me; row++)",
        "a row that is in no stream is lost",
    ),
    (
        LINEAR,
        "y[b * ldy + row + r * apart] = finish<KIND>(m, row + r * apart, out[r][b])",
        "y[b * ldy + row + r * apart] = finish<KIND>(m, row + r, out[r][b])",
        "a stream's bias is its neighbour's",
    ),
    (
        LINEAR,
        "last = m.rows * (thread + 1) / team->num",
        "last = m.rows / team->num * (thread + 1)",
        "rows that are no thread's",
    ),
    (
        LINEAR,
        "pieces - 1 - range.stolen.fetch_add",
        "pieces - 1 - 0 * range.stolen.fetch_add",
        "the last piece is taken again and again",
    ),
    (
        LINEAR,
        "team->ranges[turn][me].taken.store(0, std::memory_order_relaxed);",
        "",
        "pieces of two products before count as taken",
    ),
    (INTEGERS, "(row + r * apart) * blocks * GROUPS", "row * blocks * GROUPS", "int4 streams share their scales"),
    (INTEGERS, "packed >> (4 * j)", "packed >> (8 * j)", "nibbles of another weight"),
    (INTEGERS, "total * -8", "total * -7", "int4 weights are one too large"),
    (INTEGERS, "group + int32_t(i * GROUPS)", "group", "every block has the first one's scales"),
    (INTEGERS, "(rounded - round)) * 32768.0f", "(rounded - round)) * 16384.0f", "the second integer is half of it"),
    (INTEGERS, "to_float(sums[PARTS - 1]) * 0x1p-15f", "to_float(sums[PARTS - 1]) * 0", "no second integer"),
    (VECTORS, "return (x > y) | (x != x) ? x : y;", "return x > y ? x : y;", "a maximum loses NaN"),
    (VECTORS, "x = x > high ? high : x;", "", "e^89 and more has another sign"),
    (INTEGERS, "spread(ROUND)", "spread(ROUND / 4)", "half an integer more"),
    (INTEGERS, "std::memcpy(some, data[r] + i, std::min(HALF, n - i));", "", "int8 weights behind the last line"),
    (INTEGERS, "left = cols - span * SPAN;", "left = SPAN;", "activations behind a row's end count"),
    (
        ATTENTION,
        "i = num; i < LANES; i++) out[i] = -INFINITY",
        "i = num; i < LANES; i++) out[i] = 0",
        "keys that are none",
    ),
    (ATTENTION, "total[g][0] + total[g][SPLIT - 1]", "total[g][0]", "odd numbers of few heads are lost"),
    (ATTENTION, "pick(first, second, zip)", "first", "even and odd values stay apart"),
    (ATTENTION, "slice % chunks() * CHUNK", "0", "every chunk is the first"),
    (
        ATTENTION,
        "std::min(CHUNK, ends[slice / chunks()] - start(slice))",
        "CHUNK",
        "a row's last chunk goes on behind its end",
    ),
]
