// A step's rows attend to a cache: chunks of keys, each with a softmax of its own, put together at the end.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "model.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 256;  // keys that one task of attention looks at

// total [G][SPLIT] += q[g D + j] times number j of sixteen keys. keys: transposed; a lane of 32 bits holds one fp32
// number or two of bf16.
template <int KIND, int G, int SPLIT>
inline void add_product(const float* q, int64_t D, const vf (&keys)[LANES], int64_t j, vf (&total)[G][SPLIT]) {
    const vf key = KIND == F32 ? keys[j] : vf(j % 2 ? vu(keys[j / 2]) & 0xffff0000u : vu(keys[j / 2]) << 16);
    for (int g = 0; g < G; g++) total[g][j % SPLIT] += spread(q[g * D + j]) * key;
}

// scores [G][CHUNK]: the products of G heads with n keys, times scale; -inf up to a whole vector.
template <int KIND, int G>
void score(const float* q, const void* k, int64_t base, int64_t stride, int64_t n, int64_t D, float scale,
           float* scores, Next& ahead) {
    constexpr int64_t BYTES = KIND == F32 ? 4 : 2, WIDTH = 64 / BYTES;
    constexpr int SPLIT = G <= 4 ? 2 : 1;  // enough sums that adds do not wait for each other
    const char* data = static_cast<const char*>(k) + base * BYTES;
    for (int64_t s = 0; s < n; s += LANES) {
        const int64_t num = std::min<int64_t>(n - s, LANES);
        vf total[G][SPLIT] = {};
        for (int64_t d = 0; d < D; d += WIDTH) {
            const char* at = data + (s * stride + d) * BYTES;
            vf keys[LANES] = {};
            ask_ahead(ahead, LANES);
            if (num == LANES && d + WIDTH <= D) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) std::memcpy(&keys[i], at + i * stride * BYTES, sizeof keys[i]);
                transpose(keys);
#pragma GCC unroll 32
                for (int64_t j = 0; j < WIDTH; j++) add_product<KIND, G, SPLIT>(q + d, D, keys, j, total);
            } else {
                const int64_t width = std::min(D - d, WIDTH);
                for (int64_t i = 0; i < num; i++) std::memcpy(&keys[i], at + i * stride * BYTES, width * BYTES);
                transpose(keys);
#pragma GCC unroll 1
                for (int64_t j = 0; j < width; j++) add_product<KIND, G, SPLIT>(q + d, D, keys, j, total);
            }
        }
        for (int g = 0; g < G; g++) {
            vf out = (SPLIT == 2 ? total[g][0] + total[g][SPLIT - 1] : total[g][0]) * scale;
            for (int64_t i = num; i < LANES; i++) out[i] = -INFINITY;
            store(scores + g * CHUNK + s, out);
        }
    }
}

// acc [G][LANES], rows `ld` apart: the values of n keys times G heads' weights, LANES of their D.
template <int KIND, int G>
inline void weigh_half(const float* weights, const void* v, int64_t base, int64_t stride, int64_t n, float* acc,
                       int64_t ld) {
    vf sums[G] = {};
    for (int64_t s = 0; s < n; s++) {
        const vf value = load16<KIND>(v, base + s * stride);
        for (int g = 0; g < G; g++) sums[g] += spread(weights[g * CHUNK + s]) * value;
    }
    for (int g = 0; g < G; g++) store(acc + g * ld, sums[g]);
}

// As above, 2 LANES of their D.
template <int KIND, int G>
inline void weigh(const float* weights, const void* v, int64_t base, int64_t stride, int64_t n, float* acc,
                  int64_t ld) {
    vf sums[G][2] = {};
    for (int64_t s = 0; s < n; s++) {
        const vf first = load_part<KIND>(v, base + s * stride, 0), second = load_part<KIND>(v, base + s * stride, 1);
        for (int g = 0; g < G; g++) {
            const vf weight = spread(weights[g * CHUNK + s]);
            sums[g][0] += weight * first;
            sums[g][1] += weight * second;
        }
    }
    const vi zip = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    for (int g = 0; g < G; g++) {
        const auto [first, second] = sums[g];
        store(acc + g * ld, KIND == F32 ? first : pick(first, second, zip));
        store(acc + g * ld + LANES, KIND == F32 ? second : pick(first, second, zip + LANES / 2));
    }
}

template <int KIND, int G>
void weigh_all(const float* weights, const void* v, int64_t base, int64_t stride, int64_t n, int64_t D, float* acc,
               int64_t ld) {
    int64_t d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES) weigh<KIND, G>(weights, v, base + d, stride, n, acc + d, ld);
    if (d + LANES <= D) {
        weigh_half<KIND, G>(weights, v, base + d, stride, n, acc + d, ld);
        d += LANES;
    }
    for (; d < D; d++)
        for (int g = 0; g < G; g++) {
            float total = 0;
            for (int64_t s = 0; s < n; s++) total += weights[g * CHUNK + s] * load1<KIND>(v, base + s * stride + d);
            acc[g * ld + d] = total;
        }
}

// One chunk of n keys for G query heads of one kv head: peak, total and acc [D] a head.
template <int KIND, int G>
void attend_some(const float* q, const void* k, const void* v, int64_t base, int64_t stride, int64_t n, int64_t D,
                 float scale, float* part, Next& ahead) {
    float scores[G * CHUNK];
    score<KIND, G>(q, k, base, stride, n, D, scale, scores, ahead);
    for (int g = 0; g < G; g++) {
        float* row = scores + g * CHUNK;
        vf most = load(row);
        for (int64_t s = LANES; s < n; s += LANES) most = larger(load(row + s), most);
        const float peak = largest(most);
        vf total{};
        for (int64_t s = 0; s < n; s += LANES) {
            const vf weight = exp16(load(row + s) - peak);
            store(row + s, weight);
            total += weight;
        }
        part[g * (D + 2)] = peak;
        part[g * (D + 2) + 1] = sum(total);
    }
    weigh_all<KIND, G>(scores, v, base, stride, n, D, part + 2, D + 2);
}

// As above for all heads, in groups that share a pass over the keys.
template <int KIND>
void attend(const float* q, const Cache& cache, int64_t base, int64_t n, int64_t G, int64_t D, float scale, float* part,
            Next& ahead) {
    const void *k = cache.k, *v = cache.v;
    const int64_t stride = cache.stride_position;
    while (G > 0) {
        const int64_t some = G >= 8 ? 8 : G == 7 ? 7 : G >= 4 ? 4 : G >= 2 ? 2 : 1;
        switch (some) {
            case 8: attend_some<KIND, 8>(q, k, v, base, stride, n, D, scale, part, ahead); break;
            case 7: attend_some<KIND, 7>(q, k, v, base, stride, n, D, scale, part, ahead); break;
            case 4: attend_some<KIND, 4>(q, k, v, base, stride, n, D, scale, part, ahead); break;
            case 2: attend_some<KIND, 2>(q, k, v, base, stride, n, D, scale, part, ahead); break;
            case 1: attend_some<KIND, 1>(q, k, v, base, stride, n, D, scale, part, ahead); break;
        }
        G -= some, q += some * D, part += some * (D + 2);
    }
}

// The keys [start, end) that each of B rows sees in a layer of a cache, in chunks. A task is a chunk of a kv head; a
// thread has tasks that follow each other, all heads of a chunk before the next chunk.
struct Seen {
    const Cache& cache;
    int64_t layer, B, kv_heads;
    const int64_t *starts, *ends;
    int64_t longest;

    int64_t chunks() const { return (longest + CHUNK - 1) / CHUNK; }
    int64_t first_task(int thread) const { return B * chunks() * kv_heads * thread / team->num; }
    int64_t start(int64_t slice) const { return starts[slice / chunks()] + slice % chunks() * CHUNK; }
    int64_t num(int64_t slice) const {
        return std::max<int64_t>(0, std::min(CHUNK, ends[slice / chunks()] - start(slice)));
    }
    int64_t base(int64_t slice) const {
        return layer * cache.stride_layer + slice / chunks() * cache.stride_row + start(slice) * cache.stride_position;
    }
    // The keys and values of a chunk, of all heads.
    Next memory(int64_t slice) const {
        const int64_t bytes = cache.kind == F32 ? 4 : 2;
        Next out;
        out.num = 2;
        out.at[0] = static_cast<const char*>(cache.k) + base(slice) * bytes;
        out.at[1] = static_cast<const char*>(cache.v) + base(slice) * bytes;
        out.left = num(slice) * cache.stride_position * bytes;
        return out;
    }
    // The next chunk from `slice` on that has keys, of the tasks before `last`; `then` where there is none.
    Next upcoming(int64_t slice, int64_t last, const Next& then) const {
        for (; slice * kv_heads < last; slice++)
            if (num(slice)) return memory(slice);
        return then;
    }
    // This thread's first.
    Next first() const {
        const int64_t task = first_task(omp_get_thread_num()), last = first_task(omp_get_thread_num() + 1);
        return task < last ? upcoming(task / kv_heads, last, Next{}) : Next{};
    }
};

// out [B, H * D], rows ldo apart: what each row sees, weighed; nothing gives 0. then: what is read next.
template <int KIND>
void attention_of(const Model& m, const Seen& seen, const float* q, int64_t ldq, float* out, int64_t ldo, float* parts,
                  const Next& then) {
    const int64_t D = m.head_dim, G = m.heads / m.kv_heads, chunks = seen.chunks(), size = G * (D + 2);
    const float scale = 1.0f / std::sqrt(float(D));
    const int64_t first = seen.first_task(omp_get_thread_num()), last = seen.first_task(omp_get_thread_num() + 1);
    Next& ahead = next;
    for (int64_t task = first; task < last; task++) {
        const int64_t slice = task / m.kv_heads, h = task % m.kv_heads, b = slice / chunks, c = slice % chunks;
        if (task == first || h == 0) ahead = seen.upcoming(slice + 1, last, then);
        if (seen.num(slice))
            attend<KIND>(q + b * ldq + h * G * D, seen.cache, seen.base(slice) + h * D, seen.num(slice), G, D, scale,
                         parts + ((b * m.kv_heads + h) * chunks + c) * size, ahead);
    }
    if (first == last) ahead = then;
    meet();
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t b = 0; b < seen.B; b++) {
        for (int64_t head = 0; head < m.heads; head++) {
            float* to = out + b * ldo + head * D;
            const int64_t n = seen.ends[b] - seen.starts[b], used = n > 0 ? (n + CHUNK - 1) / CHUNK : 0;
            const int64_t begin = (b * m.kv_heads + head / G) * chunks;
            float peak = -INFINITY, total = 0;
            for (int64_t c = 0; c < used; c++) {
                const float other = parts[(begin + c) * size + head % G * (D + 2)];
                peak = other > peak || other != other ? other : peak;
            }
            for (int64_t d = 0; d < D; d++) to[d] = 0;
            for (int64_t c = 0; c < used; c++) {
                const float* part = parts + (begin + c) * size + head % G * (D + 2);
                const float weight = std::exp(part[0] - peak);
                total += weight * part[1];
                for (int64_t d = 0; d < D; d++) to[d] += weight * part[2 + d];
            }
            for (int64_t d = 0; d < D && used; d++) to[d] /= total;
        }
    }
    meet();
}

void attention(const Model& m, const Seen& seen, const float* q, int64_t ldq, float* out, int64_t ldo, float* parts,
               const Next& then) {
    if (seen.cache.kind == F32)
        attention_of<F32>(m, seen, q, ldq, out, ldo, parts, then);
    else
        attention_of<BF16>(m, seen, q, ldq, out, ldo, parts, then);
}

}  // namespace
