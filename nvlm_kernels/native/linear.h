// y = x W^T + bias: weights come from memory once for all rows of x, at its speed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "integers.h"
#include "model.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 32768;     // bytes of weights that a thread takes at a time
constexpr int64_t WAITING = 262144;  // bytes of weights that a thread asks for while it waits, for its second cache

// Sums that a weight row is added up in, so that adds do not wait for each other. As many in every tile, or a row's
// bits would depend on its batch.
constexpr int SUMS = 2;

// Rows of x that one pass multiplies: they stay in the first cache.
constexpr int TILE = 4;

// Rows of weights that one pass multiplies, each of a part of the matrix of its own: streams that the processor fetches
// side by side, while x is read once for all of them. With a tile of x, as many as their sums leave registers for.
// A step of one row of bf16, 2 cores of an AMD EPYC, share of the speed at which the machine reads: 0.91 with one
// stream and 0.97 with four where it reads 35 GB/s; at 55 GB/s, with `load_part` too, 0.75 and 0.89. int8 takes 0.92 of
// the time with two that it takes with four (48 GB/s).
constexpr int streams_of(int kind, bool is_alone) { return is_alone ? (kind == I8 ? 2 : 4) : kind == I4 ? 2 : 3; }

// Columns up to which a row of x stays in the first cache, however much streams through it. Behind that, and with more
// rows of x, weights have to be asked for in time (53 GB/s against 42 on that EPYC, 4,864 columns); before it the
// processor does better alone (57 against 54, 896 columns, bf16; int8 in 0.91 of the time).
constexpr int64_t FEW_COLS = 2048;

// out[r][b] of the NR weight rows row + r * apart times NB rows of x, which for bf16 are as `unzip` makes them.
template <int KIND, int NR, int NB, bool ASK>
inline void dot(const Matrix& m, int64_t row, int64_t apart, const float* x, int64_t ldx, float (&out)[NR][NB]) {
    constexpr int64_t BYTES = KIND == F32 ? 4 : 2;
    const int64_t cols = m.cols;
    const char* data[NR];
    for (int r = 0; r < NR; r++) data[r] = static_cast<const char*>(m.data) + (row + r * apart) * cols * BYTES;
    vf sums[NR][NB][SUMS];
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++)
            for (int n = 0; n < SUMS; n++) sums[r][b][n] = vf{};
    int64_t i = 0;
    for (; i + SUMS * LANES <= cols; i += SUMS * LANES) {
        for (int r = 0; r < NR && ASK && i * BYTES % 64 == 0; r++)
            for (int64_t line = 0; line < SUMS * LANES * BYTES; line += 64) ask(data[r] + i * BYTES + line);
        for (int n = 0; n < SUMS; n++) {
            vf w[NR];
            for (int r = 0; r < NR; r++) w[r] = load_part<KIND>(data[r], i, n);
            for (int b = 0; b < NB; b++) {
                vf at = load(x + b * ldx + i + n * LANES);
                hold(at);
                for (int r = 0; r < NR; r++) sums[r][b][n] += w[r] * at;
            }
        }
    }
    for (; i + LANES <= cols; i += LANES)
        for (int r = 0; r < NR; r++) {
            const vf w = load16<KIND>(data[r], i);
            for (int b = 0; b < NB; b++) sums[r][b][0] += w * load(x + b * ldx + i);
        }
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) {
            float total = sum(sums[r][b][0] + sums[r][b][1]);
            for (int64_t j = i; j < cols; j++) total = std::fma(load1<KIND>(data[r], j), x[b * ldx + j], total);
            out[r][b] = total;
        }
}

// The row's sum with its scale and bias. fma is named: left to itself, the compiler would fuse in some batches only.
template <int KIND>
inline float finish(const Matrix& m, int64_t row, float total) {
    const float bias = m.bias ? m.bias[row] : 0.0f;
    if constexpr (KIND == I8) return std::fma(total, static_cast<const float*>(m.scale)[row], bias);
    return total + bias;
}

// Rows of x for fp32 and bf16 weights, the latter's as `unzip` makes them.
struct Floats {
    const float* x;
    int64_t ld;

    Floats from(int64_t b) const { return {x + b * ld, ld}; }
};

template <int KIND, int NR, int NB, bool ASK, typename X>
inline void product(const Matrix& m, int64_t row, int64_t apart, const X& x, float* y, int64_t ldy) {
    float out[NR][NB];
    if constexpr (KIND == I8)
        dot8<NR, NB, ASK>(m, row, apart, x, out);
    else if constexpr (KIND == I4)
        dot4<NR, NB, ASK>(m, row, apart, x, out);
    else
        dot<KIND, NR, NB, ASK>(m, row, apart, x.x, x.ld, out);
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) y[b * ldy + row + r * apart] = finish<KIND>(m, row + r * apart, out[r][b]);
}

// The NR weight rows row + r * apart times all rows of x, of which there is one where IS_ALONE.
template <int KIND, int NR, bool IS_ALONE, bool ASK, typename X>
inline void products(const Matrix& m, int64_t row, int64_t apart, int64_t B, const X& x, float* y, int64_t ldy) {
    if constexpr (IS_ALONE) {
        product<KIND, NR, 1, ASK>(m, row, apart, x, y, ldy);
    } else {
        static_assert(TILE == 4, "the switch below has the sizes under it");
        int64_t b = 0;
        for (; b + TILE <= B; b += TILE) product<KIND, NR, TILE, ASK>(m, row, apart, x.from(b), y + b * ldy, ldy);
        switch (B - b) {
            case 3: return product<KIND, NR, 3, ASK>(m, row, apart, x.from(b), y + b * ldy, ldy);
            case 2: return product<KIND, NR, 2, ASK>(m, row, apart, x.from(b), y + b * ldy, ldy);
            case 1: return product<KIND, NR, 1, ASK>(m, row, apart, x.from(b), y + b * ldy, ldy);
        }
    }
}

// A thread's rows, in streams `apart` rows from each other, and what the division leaves.
struct Share {
    int64_t first, last, apart;
};

inline Share share_of(const Matrix& m, int streams, int thread) {
    const int64_t first = m.rows * thread / team->num, last = m.rows * (thread + 1) / team->num;
    return {first, last, (last - first) / streams};
}

inline int64_t row_bytes(const Matrix& m) {
    if (m.kind == I4) return (m.cols + BLOCK - 1) / BLOCK * 64;
    return m.cols * (m.kind == F32 ? 4 : m.kind == BF16 ? 2 : 1);
}

// The beginning of this thread's share of a matrix that B rows are multiplied with.
Next weights_of(const Matrix& m, int64_t B) {
    Next out;
    out.num = streams_of(m.kind, B == 1);
    const Share share = share_of(m, out.num, omp_get_thread_num());
    for (int i = 0; i < out.num; i++)
        out.at[i] = static_cast<const char*>(m.data) + (share.first + i * share.apart) * row_bytes(m);
    out.left = std::min(share.apart * row_bytes(m), WAITING / out.num);
    return out;
}

// This thread's share of the rows, from its beginning on, and then what others have left of theirs, from the end on.
template <int KIND, bool IS_ALONE, bool ASK, typename X>
void share(const Matrix& m, int64_t B, const X& x, float* y, int64_t ldy) {
    constexpr int NR = streams_of(KIND, IS_ALONE);
    static_assert(NR <= MOST_STREAMS, "Next has room for as many");
    const int64_t piece = std::max<int64_t>(1, PIECE / (NR * row_bytes(m)));  // rows of a stream
    const int me = omp_get_thread_num();
    std::vector<Team::Range>& ranges = team->ranges[turn];
    turn ^= 1;
    team->ranges[turn][me].taken.store(0, std::memory_order_relaxed);
    team->ranges[turn][me].stolen.store(0, std::memory_order_relaxed);
    for (int turned = 0; turned < team->num; turned++) {
        const int owner = (me + turned) % team->num;
        Team::Range& range = ranges[owner];
        const auto [first, last, apart] = share_of(m, NR, owner);
        const int64_t pieces = (apart + piece - 1) / piece;
        for (int64_t row = first + NR * apart; row < last && owner == me; row++)
            for (int64_t b = 0; b < B; b++) product<KIND, 1, 1, false>(m, row, 0, x.from(b), y + b * ldy, ldy);
        for (int64_t mine = 0; range.taken.fetch_add(1, std::memory_order_relaxed) < pieces; mine++) {
            const int64_t i = owner == me ? mine : pieces - 1 - range.stolen.fetch_add(1, std::memory_order_relaxed);
            const int64_t end = first + std::min((i + 1) * piece, apart);
            for (int64_t row = first + i * piece; row < end; row++)
                products<KIND, NR, IS_ALONE, ASK>(m, row, apart, B, x, y, ldy);
        }
    }
}

// A thread's own copy of x in the order of `load_part`: of 2 LANES the even ones before the odd ones.
const float* unzip(const float* x, int64_t B, int64_t ldx, int64_t cols) {
    thread_local std::vector<float> copy;
    if (int64_t(copy.size()) < B * ldx) copy.resize(B * ldx);
    const vi even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int64_t b = 0; b < B; b++) {
        const float* from = x + b * ldx;
        float* to = copy.data() + b * ldx;
        int64_t i = 0;
        for (; i + 2 * LANES <= cols; i += 2 * LANES) {
            const vf low = load(from + i), high = load(from + i + LANES);
            store(to + i, pick(low, high, even));
            store(to + i + LANES, pick(low, high, even + 1));
        }
        for (; i < cols; i++) to[i] = from[i];
    }
    return copy.data();
}

template <int KIND, typename X>
void share_rows(const Matrix& m, int64_t B, const X& x, float* y, int64_t ldy) {
    if (B > 1)
        share<KIND, false, true>(m, B, x, y, ldy);
    else if (m.cols > FEW_COLS)
        share<KIND, true, true>(m, B, x, y, ldy);
    else
        share<KIND, true, false>(m, B, x, y, ldy);
}

template <int KIND>
void share_fixed(const Matrix& m, int64_t B, const float* x, int64_t ldx, float* y, int64_t ldy) {
    if (m.parts == 1)
        share_rows<KIND>(m, B, fix<KIND, 1>(x, B, ldx, m.cols), y, ldy);
    else
        share_rows<KIND>(m, B, fix<KIND, 2>(x, B, ldx, m.cols), y, ldy);
}

// y [B, rows] = x [B, cols] W^T + bias, by all threads, which wait for each other at the end. then: what is read next.
void linear(const Matrix& m, int64_t B, const float* x, int64_t ldx, float* y, int64_t ldy, const Next& then) {
    switch (m.kind) {
        case F32: share_rows<F32>(m, B, Floats{x, ldx}, y, ldy); break;
        case BF16: share_rows<BF16>(m, B, Floats{unzip(x, B, ldx, m.cols), ldx}, y, ldy); break;
        case I8: share_fixed<I8>(m, B, x, ldx, y, ldy); break;
        case I4: share_fixed<I4>(m, B, x, ldx, y, ldy); break;
    }
    next = then;
    meet();
}

}  // namespace
