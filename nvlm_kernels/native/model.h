// What a decoder is made of, as its caller lays it out (nvlm_kernels/native/library.py has the same).

#pragma once

#include <cstdint>

namespace {

enum Kind : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
enum Ffn : int32_t { NONE = 0, SWIGLU = 1, GELU = 2 };

constexpr int64_t GROUP = 32;   // int4 weights that share a scale
constexpr int64_t BLOCK = 128;  // int4 weights in 64 bytes: nibble j of lane l is weight 32 (l / 4) + 4 j + l % 4

}  // namespace

extern "C" {

// scale: I8 fp32 [rows]; I4 bf16 [rows, cols / 32]. bias: fp32 [rows] or null. I4 rows are padded to whole blocks.
// parts: of I8 and I4, the 16-bit integers that an activation is made of, 1 or 2: see integers.h.
struct Matrix {
    const void* data;
    const void* scale;
    const float* bias;
    int64_t rows, cols;
    int32_t kind, parts;
};

struct Layer {
    const float *input_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
    int32_t cross, before, ffn;  // which gated layer this is, or -1
    const float *cross_norm, *ffn_norm;
    Matrix cross_q, cross_o, ffn_in, ffn_up, ffn_out;
    float gate, ffn_gate;  // tanh of the parameters
};

struct Model {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, vocab;
    float eps, rope_scale;
    const float *norm, *inv_freq;
    Matrix embed, head;
    const Layer* layers;
};

// Keys and values of one kind (F32 or BF16), strides in elements: [layers, B, S, Hkv, D], the last two dense.
struct Cache {
    void *k, *v;
    int64_t stride_layer, stride_row, stride_position;
    int32_t kind;
};

// rows: B, of the caches too. intervals: [B, 2], or null where no row sees an image.
struct Step {
    int64_t rows;
    const int64_t *token, *position, *intervals;
    const uint8_t* active;
    Cache cache, cross;
    float *logits, *scratch;
};
}
