TESTS = ("tests/model/test_native_attention.py",)
FILE, WRAPPER = "nvlm_kernels/native/attention.cpp", "nvlm_kernels/native/attention.py"
ROUTE, PAST = "nvlm_runtime/model/native_attention.py", "nvlm_runtime/model/past.py"
MUTATIONS = [
    (FILE, "if (found > before) {", "if (found > before && key == 0) {", "the maximum of the first block alone"),
    (FILE, "_mm512_store_ps(total, _mm512_mul_ps(shrink, _mm512_load_ps(total)));", "", "totals are not rescaled"),
    (
        FILE,
        "_mm512_mul_ps(shrink, _mm512_load_ps(sums + r * wide + d))",
        "_mm512_load_ps(sums + r * wide + d)",
        "sums are not rescaled",
    ),
    (FILE, "if (low <= 0 && high >= num) {", "if (high >= num) {", "keys before an interval's start count"),
    (FILE, "if (low <= 0 && high >= num) {", "if (low <= 0) {", "keys behind an interval's end count"),
    (
        FILE,
        "if (found == MINUS_INFINITY && before == MINUS_INFINITY) {  // nothing seen so far",
        "if (false) {",
        "-inf minus -inf before a row's first key",
    ),
    (
        FILE,
        "convert(sees ? sums[r * wide + d] * inverse : 0.0f, row + d)",
        "convert(sums[r * wide + d] * inverse, row + d)",
        "0 / 0 in a row that sees nothing",
    ),
    (FILE, "to = ends[r] > to ? ends[r] : to;", "to = ends[r];", "keys up to the last row's end"),
    (FILE, "from = starts[r] < from ? starts[r] : from;", "from = starts[r];", "keys from the last row's start"),
    (FILE, "key = from / KEYS * KEYS;", "key = from;", "blocks begin where an interval does"),
    (FILE, "(n * a.kv_heads + head / group) * size", "(n * a.kv_heads + head % a.kv_heads) * size", "kv heads in turn"),
    (
        FILE,
        "typename P::Element some[LANES][MAX_HEAD] = {};",
        "typename P::Element some[LANES][MAX_HEAD];",
        "no zeros behind the keys' end",
    ),
    (FILE, "const float unit = a.scale * 1.44269504f;", "const float unit = a.scale;", "2^x for e^x"),
    (FILE, "_mm512_set1_ps(-126.0f), _CMP_NLT_UQ)", "_mm512_set1_ps(-126.0f), _CMP_GE_OQ)", "NaN becomes 0"),
    (
        FILE,
        "case 5: return products<P, 5>(a, lda, b, ldb, n, out, ldo, vectors, adds);",
        "case 5: return products<P, 4>(a, lda, b, ldb, n, out, ldo, vectors, adds);",
        "a strip's last row is lost",
    ),
    (
        FILE,
        "convert(k[(first + s) * a.k.stride_token + d], &some[s][d]);",
        "convert(k[(first + s) * a.kv_heads * D + d], &some[s][d]);",
        "keys are taken for contiguous",
    ),
    (
        WRAPPER,
        "is_bf16 and not in_fp32 and library.attention_level == 2",
        "is_bf16 and library.attention_level == 2",
        "in_fp32 is not heard",
    ),
    (ROUTE, "q.dtype == torch.bfloat16 and fp32_is_faster()", "False", "bf16 products where fp32 is faster"),
    (ROUTE, "        and not (torch.is_grad_enabled() and q.requires_grad)\n", "", "under autograd"),
    (
        PAST,
        "torch.zeros_like(positions), positions + 1",
        "torch.zeros_like(positions), positions",
        "a token does not see itself",
    ),
]
