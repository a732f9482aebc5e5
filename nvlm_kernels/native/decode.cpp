// One decoding step of a Qwen2 or Llama decoder with gated cross-attention, on a CPU, as one call.
//
// A step reads every weight once, so it runs at the memory's speed if nothing else costs more: activations stay in fp32
// (where weights are int8 or int4, integers stand for them: see integers.h), one parallel region spans the step, each
// weight row is fetched once for all rows of the batch, and threads that wait ask for what they read next. A row's sums
// are added in one fixed order that depends neither on the batch nor on the number of threads: same input, same bits.
//
// Shapes: B rows, C hidden size, H heads, Hkv kv heads, D head size, S slots; matrices are [rows, cols], as torch's
// Linear keeps them.

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "bf16.h"
#include "cached_attention.h"
#include "linear.h"
#include "model.h"
#include "team.h"
#include "vectors.h"

namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t B, int64_t C, int64_t ld, float* out) {
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < B; b++) {
        const float* row = x + b * ld;
        vf squares{};
        int64_t i = 0;
        for (; i + LANES <= C; i += LANES) squares += load(row + i) * load(row + i);
        float total = sum(squares);
        for (; i < C; i++) total += row[i] * row[i];
        const float inverse = 1.0f / std::sqrt(total / C + eps);
        for (i = 0; i < C; i++) out[b * ld + i] = row[i] * inverse * weight[i];
    }
    meet();
}

inline void put(const Cache& cache, void* side, int64_t at, float x) {
    if (cache.kind == F32)
        static_cast<float*>(side)[at] = x;
    else
        static_cast<uint16_t*>(side)[at] = to_bf16(x);
}

// Turns q and k in place by their row's angle and puts k and v into the cache.
void rotate_and_keep(const Model& m, const Step& step, int64_t layer, float* qkv, int64_t ld) {
    const int64_t D = m.head_dim, half = D / 2, turned = m.heads + m.kv_heads;
    const Cache& cache = step.cache;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < step.rows; b++) {
        if (!step.active[b]) continue;
        const int64_t slot = layer * cache.stride_layer + b * cache.stride_row + step.position[b] * cache.stride_position;
        float* row = qkv + b * ld;
        for (int64_t i = 0; i < half; i++) {
            const float angle = float(step.position[b]) * m.inv_freq[i];
            const float cosine = std::cos(angle) * m.rope_scale, sine = std::sin(angle) * m.rope_scale;
            for (int64_t h = 0; h < turned; h++) {
                float &first = row[h * D + i], &second = row[h * D + i + half];
                const float x = first, y = second;
                first = x * cosine - y * sine;
                second = y * cosine + x * sine;
            }
        }
        for (int64_t i = 0; i < m.kv_heads * D; i++) {
            put(cache, cache.k, slot + i, row[m.heads * D + i]);
            put(cache, cache.v, slot + i, row[turned * D + i]);
        }
    }
    meet();
}

void swiglu(const float* gate, const float* up, int64_t ld, int64_t B, int64_t n, float* out, int64_t ldo) {
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t b = 0; b < B; b++) {
        for (int64_t block = 0; block < (n + 255) / 256; block++) {
            int64_t i = block * 256;
            const int64_t end = i + 256 < n ? i + 256 : n;
            for (; i + LANES <= end; i += LANES) {
                vf g = load(gate + b * ld + i);
                store(out + b * ldo + i, g / (1.0f + exp16(-g)) * load(up + b * ld + i));
            }
            for (; i < end; i++) {
                const float g = gate[b * ld + i];
                out[b * ldo + i] = g / (1.0f + std::exp(-g)) * up[b * ld + i];
            }
        }
    }
    meet();
}

void gelu(const float* x, int64_t ld, int64_t B, int64_t n, float* out, int64_t ldo) {
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < n; i++) {
            const float value = x[b * ld + i];
            out[b * ldo + i] = 0.5f * value * (1.0f + std::erf(value * 0.70710678118654752f));
        }
    meet();
}

// x += gate * branch on the rows that see something (every one where `sees` is null).
void add(float* x, const float* branch, float gate, const uint8_t* sees, int64_t B, int64_t C, int64_t ld) {
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < C; i++)
            if (!sees || sees[b]) x[b * ld + i] += gate * branch[b * ld + i];
    meet();
}

// Widths of the scratch arrays.
struct Widths {
    int64_t x, qkv, heads, wide, act;
};

Widths widths(const Model& m) {
    int64_t wide = 0, act = 0;
    for (int64_t i = 0; i < m.num_layers; i++) {
        const Layer& l = m.layers[i];
        const int64_t ffn = l.cross >= 0 && l.ffn != NONE ? l.ffn_out.cols : 0;
        wide = wide > l.gate_up.rows ? wide : l.gate_up.rows;
        wide = wide > 2 * ffn ? wide : 2 * ffn;
        act = act > l.down.cols ? act : l.down.cols;
        act = act > ffn ? act : ffn;
    }
    const int64_t qkv = (m.heads + 2 * m.kv_heads) * m.head_dim;
    return {m.hidden, qkv, m.heads * m.head_dim, wide, act};
}

int64_t scratch_floats(const Model& m, int64_t B, int64_t longest) {
    const Widths w = widths(m);
    const int64_t chunks = (longest + CHUNK - 1) / CHUNK;
    return B * (3 * w.x + w.qkv + w.heads + w.wide + w.act + m.heads * chunks * (m.head_dim + 2));
}

// What the rows see: the slots of self-attention [0, lengths) and the image keys [starts, ends).
struct Views {
    const int64_t *zeros, *lengths, *starts, *ends;
    const uint8_t* sees;
    int64_t longest, longest_cross;
};

void run(const Model& m, const Step& step, const Views& views) {
    const Widths w = widths(m);
    const int64_t B = step.rows, C = m.hidden;
    float* x = step.scratch;
    float* normed = x + B * w.x;
    float* branch = normed + B * w.x;
    float* qkv = branch + B * w.x;
    float* heads = qkv + B * w.qkv;
    float* wide = heads + B * w.heads;
    float* act = wide + B * w.wide;
    float* parts = act + B * w.act;

    auto weights = [&](const Matrix& matrix) { return weights_of(matrix, B); };
    auto seen_by = [&](const Cache& cache, int64_t layer, const int64_t* starts, const int64_t* ends, int64_t longest) {
        return Seen{cache, layer, B, m.kv_heads, starts, ends, longest};
    };
    auto gated = [&](const Layer& l) {
        const Next after = weights(l.before ? l.qkv : l.gate_up);
        const Seen seen = seen_by(step.cross, l.cross, views.starts, views.ends, views.longest_cross);
        rms_norm(x, l.cross_norm, m.eps, B, C, w.x, normed);
        linear(l.cross_q, B, normed, w.x, qkv, w.qkv, seen.first());
        attention(m, seen, qkv, w.qkv, heads, w.heads, parts, weights(l.cross_o));
        linear(l.cross_o, B, heads, w.heads, branch, w.x, l.ffn == NONE ? after : weights(l.ffn_in));
        add(x, branch, l.gate, views.sees, B, C, w.x);
        if (l.ffn == NONE) return;
        const int64_t n = l.ffn_out.cols;
        rms_norm(x, l.ffn_norm, m.eps, B, C, w.x, normed);
        linear(l.ffn_in, B, normed, w.x, wide, w.wide, weights(l.ffn == SWIGLU ? l.ffn_up : l.ffn_out));
        if (l.ffn == SWIGLU) {
            linear(l.ffn_up, B, normed, w.x, wide + w.wide / 2, w.wide, weights(l.ffn_out));
            swiglu(wide, wide + w.wide / 2, w.wide, B, n, act, w.act);
        } else {
            gelu(wide, w.wide, B, n, act, w.act);
        }
        linear(l.ffn_out, B, act, w.act, branch, w.x, after);
        add(x, branch, l.ffn_gate, views.sees, B, C, w.x);
    };

#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < C; i++) {
            const int64_t at = step.token[b] * C + i;
            x[b * w.x + i] = m.embed.kind == F32 ? load1<F32>(m.embed.data, at) : load1<BF16>(m.embed.data, at);
        }
    meet();
    for (int64_t i = 0; i < m.num_layers; i++) {
        const Layer& l = m.layers[i];
        const bool sees = l.cross >= 0 && step.intervals;
        const Seen seen = seen_by(step.cache, i, views.zeros, views.lengths, views.longest);
        if (sees && l.before) gated(l);
        rms_norm(x, l.input_norm, m.eps, B, C, w.x, normed);
        linear(l.qkv, B, normed, w.x, qkv, w.qkv, seen.first());
        rotate_and_keep(m, step, i, qkv, w.qkv);
        attention(m, seen, qkv, w.qkv, heads, w.heads, parts, weights(l.o));
        linear(l.o, B, heads, w.heads, branch, w.x, weights(sees && !l.before ? l.cross_q : l.gate_up));
        add(x, branch, 1.0f, nullptr, B, C, w.x);
        if (sees && !l.before) gated(l);
        rms_norm(x, l.post_norm, m.eps, B, C, w.x, normed);
        linear(l.gate_up, B, normed, w.x, wide, w.wide, weights(l.down));
        swiglu(wide, wide + l.gate_up.rows / 2, w.wide, B, l.down.cols, act, w.act);
        const Matrix& after = i + 1 < m.num_layers ? m.layers[i + 1].qkv : m.head;
        linear(l.down, B, act, w.act, branch, w.x, weights(after));
        add(x, branch, 1.0f, nullptr, B, C, w.x);
    }
    rms_norm(x, m.norm, m.eps, B, C, w.x, normed);
    linear(m.head, B, normed, w.x, step.logits, m.vocab, Next{});
}

}  // namespace

extern "C" {

// Floats of scratch that a step of `rows` rows needs, none of them attending to more than `longest` keys.
int64_t nvlm_scratch(const Model* model, int64_t rows, int64_t longest) {
    return scratch_floats(*model, rows, longest);
}

// longest: slots that any row attends to, at most.
void nvlm_step(const Model* model, const Step* step, int64_t threads) {
    const int64_t B = step->rows;
    std::vector<int64_t> zeros(B, 0), lengths(B), starts(B, 0), ends(B, 0);
    std::vector<uint8_t> sees(B, 0);
    int64_t longest = 0, longest_cross = 0;
    for (int64_t b = 0; b < B; b++) {
        lengths[b] = step->active[b] ? step->position[b] + 1 : 0;
        longest = lengths[b] > longest ? lengths[b] : longest;
        if (!step->intervals || !step->active[b]) continue;
        starts[b] = step->intervals[2 * b];
        ends[b] = step->intervals[2 * b + 1];
        sees[b] = ends[b] > starts[b];
        longest_cross = ends[b] - starts[b] > longest_cross ? ends[b] - starts[b] : longest_cross;
    }
    const Views views{zeros.data(), lengths.data(), starts.data(), ends.data(), sees.data(), longest, longest_cross};
    together(threads, [&] { run(*model, *step, views); });
}

// y [B, rows] = x [B, cols] W^T + bias. x has rows of `ldx` floats.
void nvlm_linear(const Matrix* matrix, int64_t B, const float* x, int64_t ldx, float* y, int64_t threads) {
    together(threads, [&] { linear(*matrix, B, x, ldx, y, matrix->rows, Next{}); });
}

// The sum of n floats, n a multiple of 64 * threads: how fast this machine reads.
float nvlm_read(const float* data, int64_t n, int64_t threads) {
    float total = 0;
#pragma omp parallel num_threads(int(threads)) reduction(+ : total)
    {
        vf sums[4] = {};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n / (4 * LANES); i++)
            for (int lane = 0; lane < 4; lane++) sums[lane] += load(data + (4 * i + lane) * LANES);
        total += sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    }
    return total;
}
}
