// Products of int8 and int4 weights with activations that integers stand for: two weights of a lane at a time, where
// floats take one that has to be widened and scaled first.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "model.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t SPAN = 512;  // activations that share a scale

// acc[l] + the sum of the two products of 16-bit numbers in lane l.
inline vi add_pairs(vi acc, vi x, vi w) {
#ifdef __AVX512VNNI__
    return vi(_mm512_dpwssd_epi32(__m512i(acc), __m512i(x), __m512i(w)));
#elif defined(__AVX512BW__)
    return acc + vi(_mm512_madd_epi16(__m512i(x), __m512i(w)));
#else
    return acc + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

// Rows of x as integers: x[i] is scale[i / SPAN] (a + b / 2^15), a and b of 16 bits, b only where PARTS is 2. A span
// with a NaN or an infinity has zeros and such a scale. a alone is off by up to 1 / 65534 of the largest of SPAN, which
// is less than bf16's rounding for numbers above 1 / 128 of that, and more for those that are small beside it.
template <int PARTS>
struct Fixed {
    const vi* numbers;   // [B, spans, PARTS, LANES], in the order in which the weights lie
    const vi* eights;    // [B, spans, PARTS, SPAN / BLOCK]: what the products of an int4 block with 8, 8, ... take away
    const float* scale;  // [B, spans]
    int64_t spans;

    Fixed from(int64_t b) const {
        const int64_t first = b * spans;
        return {numbers + first * PARTS * LANES, eights + first * PARTS * (SPAN / BLOCK), scale + first, spans};
    }
};

// Two vectors of integers as one of pairs of 16 bits.
inline vi pair_up(vi low, vi high) { return (low & 0xffff) | high << 16; }

// SPAN numbers, zeros behind the end of a row, of which PARTS integers each are made.
template <int KIND, int PARTS>
inline float fix_span(const float* x, vi* numbers, vi* eights) {
    vf most{};
    for (int64_t i = 0; i < SPAN; i += LANES) most = larger(vf(vi(load(x + i)) & 0x7fffffff), most);
    const float peak = largest(most);
    const float inverse = peak > 1e-30f && peak < INFINITY ? 32767.0f / peak : 0.0f;
    const vf round = spread(ROUND);
    constexpr int EACH = BLOCK / LANES;    // vectors of a block
    for (int64_t block = 0; block < SPAN / BLOCK; block++) {
        vi whole[PARTS][EACH];
        for (int j = 0; j < EACH; j++) {
            const vf at = inverse == 0 ? vf{} : load(x + block * BLOCK + j * LANES) * inverse, rounded = at + round;
            whole[0][j] = vi(rounded) - vi(round);
            if constexpr (PARTS == 2) whole[1][j] = vi((at - (rounded - round)) * 32768.0f + round) - vi(round);
        }
        for (int part = 0; part < PARTS; part++) {
            vi* to = numbers + part * LANES + block * EACH / 2;
            vi(&w)[EACH] = whole[part];
            if constexpr (KIND == I8) {
                const vi even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
                for (int j = 0; j < EACH; j += 2) {
                    const vf low = vf(w[j]), high = vf(w[j + 1]);
                    to[j / 2] = pair_up(vi(pick(low, high, even)), vi(pick(low, high, even + 1)));
                }
            } else {  // quarters of vectors change places: lanes 4 g to 4 g + 3 get what belongs to group g
                const vi low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
                const vi even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, odd = even + 4;
                vi by[EACH], total{};
                for (int half = 0; half < 2; half++) {  // w[2 g + half] has numbers 16 half to 16 half + 15 of group g
                    const vf a = vf(w[half]), b = vf(w[2 + half]), c = vf(w[4 + half]), d = vf(w[6 + half]);
                    const vf ab0 = pick(a, b, low), ab1 = pick(a, b, high);
                    const vf cd0 = pick(c, d, low), cd1 = pick(c, d, high);
                    by[4 * half] = vi(pick(ab0, cd0, even));
                    by[4 * half + 1] = vi(pick(ab0, cd0, odd));
                    by[4 * half + 2] = vi(pick(ab1, cd1, even));
                    by[4 * half + 3] = vi(pick(ab1, cd1, odd));
                }
                for (int j = 0; j < EACH; j++) total += by[j];
                eights[part * (SPAN / BLOCK) + block] = total * -8;
                for (int j = 0; j < EACH / 2; j++) to[j] = pair_up(by[j], by[j + EACH / 2]);
            }
        }
    }
    return peak / 32767.0f;
}

// A thread's own copy of x as integers.
template <int KIND, int PARTS>
Fixed<PARTS> fix(const float* x, int64_t B, int64_t ldx, int64_t cols) {
    thread_local std::vector<vi> numbers, eights;
    thread_local std::vector<float> scale;
    const int64_t spans = (cols + SPAN - 1) / SPAN;
    if (int64_t(scale.size()) < B * spans) {
        numbers.resize(B * spans * 2 * LANES);
        eights.resize(B * spans * 2 * (SPAN / BLOCK));
        scale.resize(B * spans);
    }
    for (int64_t b = 0; b < B; b++)
        for (int64_t span = 0; span < spans; span++) {
            const float* from = x + b * ldx + span * SPAN;
            const int64_t at = (b * spans + span) * PARTS, left = cols - span * SPAN;
            float some[SPAN];
            if (left < SPAN) {
                std::memcpy(some, from, left * sizeof(float));
                std::memset(some + left, 0, (SPAN - left) * sizeof(float));
                from = some;
            }
            scale[b * spans + span] = fix_span<KIND, PARTS>(from, &numbers[at * LANES], &eights[at * (SPAN / BLOCK)]);
        }
    return {numbers.data(), eights.data(), scale.data(), spans};
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// The sum that one or two parts of an activation make.
template <int PARTS>
inline vf join(const vi (&sums)[PARTS]) {
    if constexpr (PARTS == 1) return to_float(sums[0]);
    return to_float(sums[0]) + to_float(sums[PARTS - 1]) * 0x1p-15f;
}

// 2 LANES of int8 as 16-bit numbers.
inline vi widen(const int8_t* at) {
#ifdef __AVX512BW__
    return vi(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#else
    typedef int8_t bytes __attribute__((vector_size(32)));
    typedef int16_t halves __attribute__((vector_size(64)));
    bytes raw;
    std::memcpy(&raw, at, sizeof raw);
    return vi(__builtin_convertvector(raw, halves));
#endif
}

// As `dot`, with int8.
template <int NR, int NB, bool ASK, int PARTS>
inline void dot8(const Matrix& m, int64_t row, int64_t apart, const Fixed<PARTS>& x, float (&out)[NR][NB]) {
    constexpr int64_t HALF = 2 * LANES;  // of the weights in a line
    const int8_t* data[NR];
    vf totals[NR][NB];
    for (int r = 0; r < NR; r++) {
        data[r] = static_cast<const int8_t*>(m.data) + (row + r * apart) * m.cols;
        for (int b = 0; b < NB; b++) totals[r][b] = vf{};
    }
    for (int64_t span = 0; span < x.spans; span++) {
        const vi* numbers[NB];
        for (int b = 0; b < NB; b++) numbers[b] = x.numbers + (b * x.spans + span) * PARTS * LANES;
        vi sums[NR][NB][PARTS] = {};
        const int64_t n = std::min(SPAN, m.cols - span * SPAN);
        auto add = [&](const vi(&w)[NR], int64_t i) {
            for (int b = 0; b < NB; b++)
                for (int part = 0; part < PARTS; part++) {
                    vi at = numbers[b][part * LANES + i / HALF];
                    hold(at);
                    for (int r = 0; r < NR; r++) sums[r][b][part] = add_pairs(sums[r][b][part], at, w[r]);
                }
        };
        int64_t i = 0;
        for (; i + 2 * HALF <= n; i += 2 * HALF)
            for (int half = 0; half < 2; half++) {
                vi w[NR];
                for (int r = 0; r < NR; r++) {
                    if (ASK && half == 0) ask(reinterpret_cast<const char*>(data[r] + i));
                    w[r] = widen(data[r] + i + half * HALF);
                }
                add(w, i + half * HALF);
            }
        for (; i < n; i += HALF) {
            vi w[NR];
            for (int r = 0; r < NR; r++) {
                int8_t some[HALF] = {};
                std::memcpy(some, data[r] + i, std::min(HALF, n - i));
                w[r] = widen(some);
            }
            add(w, i);
        }
        for (int r = 0; r < NR; r++) {
            for (int b = 0; b < NB; b++) totals[r][b] += join(sums[r][b]) * x.scale[b * x.spans + span];
            data[r] += SPAN;
        }
    }
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) out[r][b] = sum(totals[r][b]);
}

// As `dot`, with int4.
template <int NR, int NB, bool ASK, int PARTS>
inline void dot4(const Matrix& m, int64_t row, int64_t apart, const Fixed<PARTS>& x, float (&out)[NR][NB]) {
    constexpr int64_t GROUPS = BLOCK / GROUP, BLOCKS = SPAN / BLOCK;
    static_assert(GROUPS * BLOCKS == LANES, "a span has a vector of scales");
    const int64_t blocks = (m.cols + BLOCK - 1) / BLOCK;
    const vi group = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const char* data[NR];
    const uint16_t* scale[NR];
    vf totals[NR][NB];
    for (int r = 0; r < NR; r++) {
        data[r] = static_cast<const char*>(m.data) + (row + r * apart) * blocks * 64;
        scale[r] = static_cast<const uint16_t*>(m.scale) + (row + r * apart) * blocks * GROUPS;
        for (int b = 0; b < NB; b++) totals[r][b] = vf{};
    }
    for (int64_t span = 0; span < x.spans; span++) {
        const int64_t num = std::min(BLOCKS, blocks - span * BLOCKS);
        const vi *numbers[NB], *eights[NB];
        for (int b = 0; b < NB; b++) {
            numbers[b] = x.numbers + (b * x.spans + span) * PARTS * LANES;
            eights[b] = x.eights + (b * x.spans + span) * PARTS * BLOCKS;
        }
        vf scales[NR], sums[NR][NB];
        for (int r = 0; r < NR; r++) {
            uint16_t some[LANES] = {};
            if (num < BLOCKS)
                for (int64_t i = 0; i < num; i++) std::memcpy(some + i * GROUPS, scale[r] + i * GROUPS, 2 * GROUPS);
            scales[r] = load16<BF16>(num < BLOCKS ? some : scale[r], 0);
            for (int b = 0; b < NB; b++) sums[r][b] = vf{};
        }
        for (int64_t i = 0; i < num; i++) {
            vi w[NR][4];
            vf factor[NR];
            for (int r = 0; r < NR; r++) {
                vu packed;
                std::memcpy(&packed, data[r] + i * 64, sizeof packed);
                hold(packed);
                if (ASK) ask(data[r] + i * 64);
                for (int j = 0; j < 4; j++) w[r][j] = vi(packed >> (4 * j) & 0x000f000fu);
                factor[r] = pick(scales[r], group + int32_t(i * GROUPS));
            }
            for (int b = 0; b < NB; b++) {
                vi found[NR][PARTS];
                for (int part = 0; part < PARTS; part++) {
                    for (int r = 0; r < NR; r++) found[r][part] = eights[b][part * BLOCKS + i];
                    for (int j = 0; j < 4; j++) {
                        vi number = numbers[b][part * LANES + i * 4 + j];
                        hold(number);
                        for (int r = 0; r < NR; r++) found[r][part] = add_pairs(found[r][part], number, w[r][j]);
                    }
                }
                for (int r = 0; r < NR; r++) sums[r][b] += join(found[r]) * factor[r];
            }
        }
        for (int r = 0; r < NR; r++) {
            for (int b = 0; b < NB; b++) totals[r][b] += sums[r][b] * x.scale[b * x.spans + span];
            data[r] += BLOCKS * 64;
            scale[r] += LANES;
        }
    }
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) out[r][b] = sum(totals[r][b]);
}

}  // namespace
