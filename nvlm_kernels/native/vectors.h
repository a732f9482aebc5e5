// Sixteen numbers at a time, wherever it runs: vector extensions of GCC and Clang; no fast-math.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "model.h"

namespace {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

// Lane l of the result is lane at[l], modulo their number, of a table or of two that follow each other.
inline vf pick(vf table, vi at) {
#ifdef __clang__
    return __builtin_shufflevector(table, at);
#else
    return __builtin_shuffle(table, at);
#endif
}

inline vf pick(vf low, vf high, vi at) {
#ifdef __clang__
    return (at & LANES) != 0 ? pick(high, at) : pick(low, at);
#else
    return __builtin_shuffle(low, high, at);
#endif
}

inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

inline vf spread(float x) { return x - vf{}; }

inline float sum(vf x) {
    eight halves[2];
    std::memcpy(halves, &x, sizeof x);
    const eight y = halves[0] + halves[1];
    four quarters[2];
    std::memcpy(quarters, &y, sizeof y);
    const four z = quarters[0] + quarters[1];
    return (z[0] + z[2]) + (z[1] + z[3]);
}

template <int KIND>
inline vf load16(const void* data, int64_t i) {
    if constexpr (KIND == F32) {
        return load(static_cast<const float*>(data) + i);
    } else {
        static_assert(KIND == BF16);
        const uint16_t* at = static_cast<const uint16_t*>(data) + i;
#ifdef __AVX512F__  // GCC 12 makes the conversion in the other branch from halves and inserts
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        return vf(_mm512_slli_epi32(wide, 16));
#else
        vh raw;
        std::memcpy(&raw, at, sizeof raw);
        vu wide = __builtin_convertvector(raw, vu) << 16;
        vf x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
#endif
    }
}

// LANES of a row from i + n LANES on, or of bf16 the even (n = 0) and the odd (n = 1) of twice as many from i on, for
// which a shift and a mask are all it takes.
template <int KIND>
inline vf load_part(const void* data, int64_t i, int n) {
    if constexpr (KIND == BF16) {
        vu pairs;
        std::memcpy(&pairs, static_cast<const uint16_t*>(data) + i, sizeof pairs);
        pairs = n == 0 ? pairs << 16 : pairs & 0xffff0000u;
        vf x;
        std::memcpy(&x, &pairs, sizeof x);
        return x;
    } else {
        return load16<KIND>(data, i + n * LANES);
    }
}

template <int KIND>
inline float load1(const void* data, int64_t i) {
    if constexpr (KIND == F32) return static_cast<const float*>(data)[i];
    static_assert(KIND == F32 || KIND == BF16);
    return from_bf16(static_cast<const uint16_t*>(data)[i]);
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it to a number below 2^22 rounds that to an integer

// The larger of two, lane by lane; NaN wins.
inline vf larger(vf x, vf y) { return (x > y) | (x != x) ? x : y; }

// The largest lane; NaN wins.
inline float largest(vf x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found || x[i] != x[i] ? x[i] : found;
    return found;
}

// e^x to about 1e-7, 0 below -87, no more than e^88.
inline vf exp16(vf x) {
    const vf low = spread(-87.0f);
    vi under = x < low;
    x = under ? low : x;
    const vf high = spread(88.0f);
    x = x > high ? high : x;
    vf n = x * 1.44269504f;
    n = (n + ROUND) - ROUND;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
    vf power;
    std::memcpy(&power, &bits, sizeof power);
    return under ? vf{} : p * power;
}

// With AVX512, leaves numbers in their register: GCC reads them again for every product, and a step of 16 rows of bf16
// took 170 ms instead of 98.
template <typename V>
inline void hold([[maybe_unused]] V& x) {
#ifdef __AVX512F__
    asm("" : "+v"(x));
#endif
}

// x[i][l] and x[l][i] change places, a bit of i and l after the other.
template <int BIT = 1>
inline void transpose(vf (&x)[LANES]) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi odd = (lane & BIT) != 0;
    const vi low = odd ? LANES + (lane ^ BIT) : lane, high = odd ? LANES + lane : lane ^ BIT;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & BIT)) {
            const vf first = x[i], second = x[i | BIT];
            x[i] = pick(first, second, low);
            x[i | BIT] = pick(first, second, high);
        }
    if constexpr (2 * BIT < LANES) transpose<2 * BIT>(x);
}

}  // namespace
