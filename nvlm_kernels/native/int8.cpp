// Rows to int8 with a scale each, and what their products were as they should be: the passes around an int8 product.
//
// scale[m] = max_k |x[m, k]| / 127, q[m, k] = round(x[m, k] / scale[m]), half to even
// y[m, l] = products[m, l] * scale_x[m] * scale_w[l] + bias[l]
//
// Each reads its input once from memory: bound by bytes. A row that holds inf or nan is 0 with a scale that makes its
// products nan. M rows, K columns, L out features.

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bf16.h"

namespace {

constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bf16(x); }

inline void put(float x, float* to) { *to = x; }
inline void put(float x, uint16_t* to) { *to = to_bf16(x); }

template <typename T>
void quantize(const T* x, int64_t rows, int64_t cols, int8_t* out, float* scale, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const T* row = x + m * cols;
        int8_t* to = out + m * cols;
        uint32_t most = 0;  // magnitudes are ordered as their bits are
        for (int64_t k = 0; k < cols; k++) {
            const uint32_t magnitude = bits_of(widen(row[k])) & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        if (most >= 0x7f800000) {
            scale[m] = std::numeric_limits<float>::quiet_NaN();
            std::memset(to, 0, cols);
            continue;
        }
        const float found = of_bits(most) / 127, least = std::numeric_limits<float>::min();
        const float unit = found > least ? found : least;  // a row of zeros
        scale[m] = unit;
        for (int64_t k = 0; k < cols; k++) to[k] = int8_t(int32_t(widen(row[k]) / unit + ROUNDS - ROUNDS));
    }
}

template <typename T>
void unite(const int32_t* products, const float* scale_x, const float* scale_w, const float* bias, int64_t rows,
           int64_t cols, T* out, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const int32_t* row = products + m * cols;
        T* to = out + m * cols;
        const float scale = scale_x[m];
        if (bias)
            for (int64_t l = 0; l < cols; l++) put(std::fma(float(row[l]) * scale, scale_w[l], bias[l]), to + l);
        else
            for (int64_t l = 0; l < cols; l++) put(float(row[l]) * scale * scale_w[l], to + l);
    }
}

}  // namespace

extern "C" {

// x: bf16 or fp32 [M, K]. out: int8 [M, K]. scale: fp32 [M].
void nvlm_quantize_rows(const void* x, int32_t is_bf16, int64_t rows, int64_t cols, int8_t* out, float* scale,
                        int64_t threads) {
    if (is_bf16)
        quantize(static_cast<const uint16_t*>(x), rows, cols, out, scale, threads);
    else
        quantize(static_cast<const float*>(x), rows, cols, out, scale, threads);
}

// products: int32 [M, L]. bias: fp32 [L] or null. out: bf16 or fp32 [M, L].
void nvlm_scale_products(const int32_t* products, const float* scale_x, const float* scale_w, const float* bias,
                         int64_t rows, int64_t cols, void* out, int32_t is_bf16, int64_t threads) {
    if (is_bf16)
        unite(products, scale_x, scale_w, bias, rows, cols, static_cast<uint16_t*>(out), threads);
    else
        unite(products, scale_x, scale_w, bias, rows, cols, static_cast<float*>(out), threads);
}
}
