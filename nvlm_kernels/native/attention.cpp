// Attention of many query rows on a CPU with AVX512, one interval of the keys a row: prompts and tiles.
//
// out[t] = softmax(scale * q[t] k[start:end]^T) v[start:end], block by block of the keys, with a running maximum. Keys and
// values are packed once a head in the order the products read them: pairs of bf16 for vdpbf16ps (sums in fp32, weights
// rounded to bf16, as torch's attention does), or fp32 for a core whose bf16 product is the slower one. Blocks of keys lie
// at fixed places and a row's sums are added in one order, so its bits do not depend on the rows beside it, on how many
// are asked for at a time, or on the number of threads. A row that sees no key gives 0.
//
// N batch, T queries, S keys, H heads, Hkv kv heads, D head size.

#include <omp.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "bf16.h"

extern "C" {

// Of q, k, v and out: [N, T or S, heads, D], the last dense, strides in elements.
struct Heads {
    void* data;
    int64_t stride_batch, stride_token, stride_head;
};

// intervals: int64 [N, T, 2] of keys [start, end), or null where every row sees all. is_bf16: what the four hold, fp32
// otherwise. products_bf16: whether products are made in bf16, of bf16 inputs. scale: above 0. packed: `nvlm_attention_room` bytes.
struct Attention {
    Heads q, k, v, out;
    const int64_t* intervals;
    void* packed;
    int64_t batch, queries, keys, heads, kv_heads, head_dim;
    float scale;
    int32_t is_bf16, products_bf16;
};
}

#ifdef __AVX512F__
#include <immintrin.h>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 48, KEYS = 128;  // of a block: 24 KB of scores
constexpr int STRIP = 6, WIDE = 4;        // rows and vectors of a product's sums, 24 of 32 registers
constexpr int64_t MAX_HEAD = 128;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Fp32 {
    typedef float Element;
    static constexpr int PAIR = 1;
    static __m512 spread(const Element* x) { return _mm512_set1_ps(*x); }
    static __m512 load(const Element* x) { return _mm512_loadu_ps(x); }
    static __m512 add_product(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

// A sum's lane takes in two products at once: elements come in pairs.
#ifdef __AVX512BF16__
struct Bf16 {
    typedef uint16_t Element;
    static constexpr int PAIR = 2;
    static __m512i spread(const Element* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static __m512i load(const Element* x) { return _mm512_loadu_si512(x); }
    static __m512 add_product(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

inline void convert(float x, float* to) { *to = x; }
inline void convert(uint16_t x, float* to) { *to = from_bf16(x); }
inline void convert(uint16_t x, uint16_t* to) { *to = x; }
inline void convert(float x, uint16_t* to) { *to = to_bf16(x); }

// 2^x to about 1e-7, 0 below -126; NaN stays. Polynomial: Cephes' exp2f.
inline __m512 power_of_two(__m512 x) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(above, p, n);
}

// out [NR][NV * LANES] (+)= a [NR][n * PAIR] b [n][lanes][PAIR]: `n` steps of the sum. a's rows are lda elements apart,
// b's steps ldb, out's rows ldo floats.
template <typename P, int NR, int NV>
inline void product(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb, int64_t n,
                    float* out, int64_t ldo, bool adds) {
    __m512 sums[NR][NV];
    for (int r = 0; r < NR; r++)
        for (int v = 0; v < NV; v++) sums[r][v] = adds ? _mm512_loadu_ps(out + r * ldo + v * LANES) : _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i++) {
        decltype(P::load(b)) right[NV];
        for (int v = 0; v < NV; v++) right[v] = P::load(b + i * ldb + v * LANES * P::PAIR);
        for (int r = 0; r < NR; r++) {
            const auto left = P::spread(a + r * lda + i * P::PAIR);
            for (int v = 0; v < NV; v++) sums[r][v] = P::add_product(sums[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < NR; r++)
        for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + r * ldo + v * LANES, sums[r][v]);
}

// The same for `vectors` vectors.
template <typename P, int NR>
void products(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb, int64_t n, float* out,
              int64_t ldo, int64_t vectors, bool adds) {
    int64_t v = 0;
    for (; v + WIDE <= vectors; v += WIDE)
        product<P, NR, WIDE>(a, lda, b + v * LANES * P::PAIR, ldb, n, out + v * LANES, ldo, adds);
    for (; v < vectors; v++) product<P, NR, 1>(a, lda, b + v * LANES * P::PAIR, ldb, n, out + v * LANES, ldo, adds);
}

// The same for `rows` rows.
template <typename P>
void all_products(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb, int64_t n,
                  float* out, int64_t ldo, int64_t rows, int64_t vectors, bool adds) {
    int64_t r = 0;
    for (; r + STRIP <= rows; r += STRIP) products<P, STRIP>(a + r * lda, lda, b, ldb, n, out + r * ldo, ldo, vectors, adds);
    static_assert(STRIP == 6, "the switch below has the sizes under it");
    a += r * lda;
    out += r * ldo;
    switch (rows - r) {
        case 5: return products<P, 5>(a, lda, b, ldb, n, out, ldo, vectors, adds);
        case 4: return products<P, 4>(a, lda, b, ldb, n, out, ldo, vectors, adds);
        case 3: return products<P, 3>(a, lda, b, ldb, n, out, ldo, vectors, adds);
        case 2: return products<P, 2>(a, lda, b, ldb, n, out, ldo, vectors, adds);
        case 1: return products<P, 1>(a, lda, b, ldb, n, out, ldo, vectors, adds);
    }
}

// Elements of a head's packed keys, and of its values: whole vectors of keys, an even D.
template <typename P>
int64_t packed_size(const Attention& a) {
    return up(a.keys, LANES * P::PAIR) * up(a.head_dim, LANES);
}

// A head's keys as [D / PAIR][S][PAIR] and values as [S / PAIR][D][PAIR], zeros behind their ends.
template <typename P, typename In>
void pack(const Attention& a, int64_t n, int64_t head, typename P::Element* keys, typename P::Element* values) {
    const In* k = static_cast<const In*>(a.k.data) + n * a.k.stride_batch + head * a.k.stride_head;
    const In* v = static_cast<const In*>(a.v.data) + n * a.v.stride_batch + head * a.v.stride_head;
    const int64_t D = a.head_dim, wide = up(D, LANES), S = up(a.keys, LANES * P::PAIR);
    for (int64_t first = 0; first < S; first += LANES) {  // a vector of keys at a time: whole lines are written
        typename P::Element some[LANES][MAX_HEAD] = {};
        for (int64_t s = 0; s < LANES && first + s < a.keys; s++)
            for (int64_t d = 0; d < D; d++) convert(k[(first + s) * a.k.stride_token + d], &some[s][d]);
        for (int64_t d = 0; d < wide; d += P::PAIR)
            for (int64_t s = 0; s < LANES; s++)
                std::memcpy(keys + d * S + (first + s) * P::PAIR, &some[s][d], P::PAIR * sizeof *keys);
    }
    for (int64_t first = 0; first < S; first += P::PAIR) {
        typename P::Element some[P::PAIR][MAX_HEAD] = {};
        for (int64_t s = 0; s < P::PAIR && first + s < a.keys; s++)
            for (int64_t d = 0; d < D; d++) convert(v[(first + s) * a.v.stride_token + d], &some[s][d]);
        typename P::Element* to = values + first * wide;
        for (int64_t d = 0; d < wide; d++)
            for (int64_t s = 0; s < P::PAIR; s++) to[d * P::PAIR + s] = some[s][d];
    }
}

inline void round_into(__m512 x, float* to) { _mm512_store_ps(to, x); }
#ifdef __AVX512BF16__
inline void round_into(__m512 x, uint16_t* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif

// Scores [KEYS] of a row that sees [low, high) of a block of `num` keys: minus infinity outside. Returns the largest, and
// NaN only where all of them are.
inline float hide(float* row, int64_t low, int64_t high, int64_t num) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 most = _mm512_set1_ps(MINUS_INFINITY);
    if (low <= 0 && high >= num) {
        for (int64_t s = 0; s < num; s += LANES) most = _mm512_max_ps(most, _mm512_load_ps(row + s));
        return _mm512_reduce_max_ps(most);
    }
    const __m512i lowest = _mm512_set1_epi32(int32_t(low < 0 ? 0 : low < KEYS ? low : KEYS));
    const __m512i behind = _mm512_set1_epi32(int32_t(high < 0 ? 0 : high < KEYS ? high : KEYS));
    for (int64_t s = 0; s < num; s += LANES) {
        const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(s)));
        const __mmask16 seen = _mm512_cmpge_epi32_mask(at, lowest) & _mm512_cmplt_epi32_mask(at, behind);
        const __m512 x = _mm512_mask_load_ps(_mm512_set1_ps(MINUS_INFINITY), seen, row + s);
        _mm512_store_ps(row + s, x);
        most = _mm512_max_ps(most, x);
    }
    return _mm512_reduce_max_ps(most);
}

// Rows [first, end) of a head of one batch element. Weights are 2^(score * scale * log2 e - ...): one product less each.
template <typename P, typename In>
void attend(const Attention& a, int64_t n, int64_t head, int64_t first, int64_t end, const typename P::Element* keys,
            const typename P::Element* values) {
    typedef typename P::Element Element;
    const int64_t D = a.head_dim, wide = up(D, LANES), S = up(a.keys, LANES * P::PAIR), rows = end - first;
    alignas(64) Element q[ROWS * MAX_HEAD], weights[ROWS * KEYS];
    alignas(64) float scores[ROWS * KEYS], sums[ROWS * MAX_HEAD], totals[ROWS * LANES];
    float peaks[ROWS];
    int64_t starts[ROWS], ends[ROWS], from = a.keys, to = 0;
    for (int64_t r = 0; r < rows; r++) {
        const In* row = static_cast<const In*>(a.q.data) + n * a.q.stride_batch + (first + r) * a.q.stride_token +
                        head * a.q.stride_head;
        for (int64_t d = 0; d < D; d++) convert(row[d], q + r * wide + d);
        for (int64_t d = D; d < wide; d++) q[r * wide + d] = 0;
        const int64_t* interval = a.intervals ? a.intervals + (n * a.queries + first + r) * 2 : nullptr;
        starts[r] = interval ? interval[0] : 0;
        ends[r] = interval ? interval[1] : a.keys;
        if (starts[r] < ends[r]) {
            from = starts[r] < from ? starts[r] : from;
            to = ends[r] > to ? ends[r] : to;
        }
        peaks[r] = MINUS_INFINITY;
    }
    std::memset(sums, 0, rows * wide * sizeof *sums);
    std::memset(totals, 0, rows * LANES * sizeof *totals);
    const float unit = a.scale * 1.44269504f;
    for (int64_t key = from / KEYS * KEYS; key < to; key += KEYS) {
        const int64_t num = key + KEYS <= S ? KEYS : S - key;
        all_products<P>(q, wide, keys + key * P::PAIR, S * P::PAIR, wide / P::PAIR, scores, KEYS, rows, num / LANES, false);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * KEYS, *total = totals + r * LANES;
            const float before = peaks[r], found = hide(row, starts[r] - key, ends[r] - key, num);
            if (found == MINUS_INFINITY && before == MINUS_INFINITY) {  // nothing seen so far
                std::memset(weights + r * KEYS, 0, num * sizeof *weights);
                continue;
            }
            if (found > before) {
                peaks[r] = found;
                const __m512 shrink = power_of_two(_mm512_set1_ps((before - found) * unit));
                _mm512_store_ps(total, _mm512_mul_ps(shrink, _mm512_load_ps(total)));
                for (int64_t d = 0; d < wide; d += LANES)
                    _mm512_store_ps(sums + r * wide + d, _mm512_mul_ps(shrink, _mm512_load_ps(sums + r * wide + d)));
            }
            const __m512 less = _mm512_set1_ps(peaks[r] * unit), units = _mm512_set1_ps(unit);
            __m512 sum = _mm512_load_ps(total);
            for (int64_t s = 0; s < num; s += LANES) {
                const __m512 x = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(row + s), units, less));
                sum = _mm512_add_ps(sum, x);
                round_into(x, weights + r * KEYS + s);
            }
            _mm512_store_ps(total, sum);
        }
        all_products<P>(weights, KEYS, values + key * wide, wide * P::PAIR, num / P::PAIR, sums, wide, rows, wide / LANES,
                        true);
    }
    for (int64_t r = 0; r < rows; r++) {
        In* row = static_cast<In*>(a.out.data) + n * a.out.stride_batch + (first + r) * a.out.stride_token +
                  head * a.out.stride_head;
        const bool sees = starts[r] < ends[r];
        const float inverse = 1.0f / _mm512_reduce_add_ps(_mm512_load_ps(totals + r * LANES));
        for (int64_t d = 0; d < D; d++) convert(sees ? sums[r * wide + d] * inverse : 0.0f, row + d);
    }
}

template <typename P, typename In>
void run(const Attention& a, int64_t threads) {
    typedef typename P::Element Element;
    const int64_t size = packed_size<P>(a), blocks = (a.queries + ROWS - 1) / ROWS, group = a.heads / a.kv_heads;
    Element* packed = static_cast<Element*>(a.packed);
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.batch * a.kv_heads; i++)
            pack<P, In>(a, i / a.kv_heads, i % a.kv_heads, packed + 2 * i * size, packed + (2 * i + 1) * size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a.batch * a.heads * blocks; task++) {
            const int64_t i = task / blocks, first = task % blocks * ROWS, n = i / a.heads, head = i % a.heads;
            const Element* keys = packed + 2 * (n * a.kv_heads + head / group) * size;
            attend<P, In>(a, n, head, first, first + ROWS < a.queries ? first + ROWS : a.queries, keys, keys + size);
        }
    }
}

}  // namespace
#endif

extern "C" {

// Whether this CPU has it: 0 not, 1 with products in fp32, 2 also in bf16.
int32_t nvlm_attention_level() {
#if defined(__AVX512BF16__)
    return 2;
#elif defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}

// Bytes of `packed`.
int64_t nvlm_attention_room(const Attention* a) {
#ifdef __AVX512F__
#ifdef __AVX512BF16__
    if (a->products_bf16) return 2 * a->batch * a->kv_heads * packed_size<Bf16>(*a) * int64_t(sizeof(uint16_t));
#endif
    return 2 * a->batch * a->kv_heads * packed_size<Fp32>(*a) * int64_t(sizeof(float));
#else
    return 0;
#endif
}

void nvlm_attention(const Attention* a, int64_t threads) {
#ifdef __AVX512F__
#ifdef __AVX512BF16__
    if (a->products_bf16) return run<Bf16, uint16_t>(*a, threads);
#endif
    a->is_bf16 ? run<Fp32, uint16_t>(*a, threads) : run<Fp32, float>(*a, threads);
#endif
}
}
