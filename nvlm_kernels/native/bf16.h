// bfloat16 as the upper half of an fp32's bits, rounded half to even; no branches, so loops over them vectorise.

#pragma once

#include <cstdint>
#include <cstring>

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float from_bf16(uint16_t x) { return of_bits(uint32_t(x) << 16); }

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);  // NaN stays NaN
}
