TESTS = ("tests/model/test_quantize.py", "-k", "not micro_model")  # whose picture is not in the copy
FILE, LAYER = "nvlm_kernels/native/int8.cpp", "nvlm_runtime/model/quantize.py"
HEADER = "nvlm_kernels/native/bf16.h"
MUTATIONS = [
    (FILE, "const float unit = found > least ? found : least;", "const float unit = found;", "0 / 0 in a row of zeros"),
    (FILE, "/ unit + ROUNDS - ROUNDS", "/ unit", "cut off, not rounded"),
    (FILE, "of_bits(most) / 127", "of_bits(most) / 126", "127 is passed"),
    (FILE, "if (most >= 0x7f800000) {", "if (false) {", "a row that is not finite gives numbers"),
    (
        FILE,
        "bits_of(widen(row[k])) & 0x7fffffff",
        "bits_of(widen(row[k]) > 0 ? widen(row[k]) : 0)",
        "the largest of positive ones",
    ),
    (
        FILE,
        "std::fma(float(row[l]) * scale, scale_w[l], bias[l])",
        "std::fma(float(row[l]), scale_w[l], bias[l])",
        "no scale of the rows",
    ),
    (HEADER, "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", "cut off to bf16"),
    (
        LAYER,
        "native.quantize_rows(self.native, x.contiguous())",
        "native.quantize_rows(self.native, x)",
        "rows that are not dense",
    ),
    (
        LAYER,
        "zip(x.chunk(parts), y.chunk(parts), strict=True)",
        "zip(x.chunk(parts), y.chunk(parts)[::-1])",
        "blocks of rows change places",
    ),
]
