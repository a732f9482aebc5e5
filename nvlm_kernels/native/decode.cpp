// One decoding step of a Qwen2 or Llama decoder with gated cross-attention, on a CPU, as one call.
//
// A step reads every weight once, so it runs at the memory's speed if nothing else costs more: activations stay in fp32,
// one parallel region spans the step, and each weight row is read once for all rows of the batch. A row's sums are added
// in one fixed order that depends neither on the batch nor on the number of threads: same input, same bits.
//
// Vector extensions of GCC and Clang, sixteen lanes wherever it runs; no fast-math. Shapes: B rows, C hidden size,
// H heads, Hkv kv heads, D head size, S slots; matrices are [rows, cols], as torch's Linear keeps them.

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "bf16.h"

namespace {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int16_t vs __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));

enum Kind : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
enum Ffn : int32_t { NONE = 0, SWIGLU = 1, GELU = 2 };

constexpr int64_t CHUNK = 256;     // keys that one task of attention looks at
constexpr int64_t HEADS = 8;       // query heads that share a pass over them
constexpr int MOST_STREAMS = 4;    // that a thread reads side by side
constexpr int64_t PIECE = 32768;   // bytes of weights that a thread takes at a time
constexpr int64_t WAITING = 262144;  // bytes of weights that a thread asks for while it waits: a part of its second cache
// Bytes between the weights in use and those asked for, into the second and into the first cache. Others from 4096, 512
// to 32768, 4096 were no faster, with one stream.
constexpr int64_t FAR = 16384, NEAR = 2048;
constexpr int64_t GROUP = 32;      // int4 weights that share a scale
constexpr int64_t BLOCK = 128;     // int4 weights in 64 bytes: nibble j of lane l is weight 16 j + l

}  // namespace

extern "C" {

// scale: I8 fp32 [rows]; I4 bf16 [rows, cols / 32]. bias: fp32 [rows] or null. I4 rows are padded to whole blocks.
struct Matrix {
    const void* data;
    const void* scale;
    const float* bias;
    int64_t rows, cols;
    int32_t kind;
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
    int64_t stride_layer, stride_row, stride_slot;
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

namespace {

// Where threads wait for each other, some hundred times a step. OpenMP's own barrier puts a waiting thread to sleep as
// soon as the process has more threads than cores, and waking it takes longer than the work: 2.8 ms against 0.7 a step
// of 9 MB of weights. This one spins, and lets others run after a while.
struct Team {
    // Of a product, a thread's share: pieces taken, and those of them that other threads took.
    struct alignas(128) Range {
        std::atomic<int64_t> taken{0}, stolen{0};
    };

    const int num;
    std::vector<Range> ranges[2];  // of this product's threads, and of the next one's
    std::atomic<int> come{0}, round{0};

    explicit Team(int num) : num(num), ranges{std::vector<Range>(num), std::vector<Range>(num)} {}
};

thread_local Team* team = nullptr;
thread_local int turn = 0;  // which of the ranges are this product's

// What a thread reads next, stream by stream. It asks for that while it waits and while it computes, and the memory is
// never idle.
struct Next {
    const char* at[MOST_STREAMS] = {};
    int num = 0;
    int64_t left = 0;  // bytes of each
};

thread_local Next next;

// Asks for as many lines of each stream, into the second cache.
inline void ask_ahead(Next& ahead, int64_t lines) {
    for (; lines > 0 && ahead.left > 0; lines--, ahead.left -= 64)
        for (int i = 0; i < ahead.num; i++) {
            __builtin_prefetch(ahead.at[i], 0, 2);
            ahead.at[i] += 64;
        }
}

inline void meet() {
    const int round = team->round.load(std::memory_order_relaxed);
    if (team->come.fetch_add(1, std::memory_order_acq_rel) == team->num - 1) {
        team->come.store(0, std::memory_order_relaxed);
        team->round.store(round + 1, std::memory_order_release);
        return;
    }
    Next& ahead = next;
    for (int spins = 0; team->round.load(std::memory_order_acquire) == round; spins++) {
        if (ahead.left > 0)
            ask_ahead(ahead, 1);
        else if (spins > 20000)
            std::this_thread::yield();
#ifdef __x86_64__
        else
            __builtin_ia32_pause();
#endif
    }
}

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
    } else if constexpr (KIND == BF16) {
        const uint16_t* at = static_cast<const uint16_t*>(data) + i;
#ifdef __AVX512F__  // GCC 12 makes the conversions in the other branches from halves and inserts
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
    } else {
        const int8_t* at = static_cast<const int8_t*>(data) + i;
#ifdef __AVX512F__
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        return vf(_mm512_cvtepi32_ps(wide));
#else
        vb raw;
        std::memcpy(&raw, at, sizeof raw);
        return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(raw, vs), vi), vf);
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
    if constexpr (KIND == BF16) return from_bf16(static_cast<const uint16_t*>(data)[i]);
    return static_cast<const int8_t*>(data)[i];
}

// e^x to about 1e-7, 0 below -87.
inline vf exp16(vf x) {
    const vf low = spread(-87.0f);
    vi under = x < low;
    x = under ? low : x;
    vf n = x * 1.44269504f;
    const vf magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    n = (n + magic) - magic;
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

inline void ask(const char* at) {
    __builtin_prefetch(at + FAR, 0, 2);
    __builtin_prefetch(at + NEAR, 0, 3);
}

// Sums that a weight row is added up in, so that adds do not wait for each other. As many in every tile, or a row's bits
// would depend on its batch.
constexpr int SUMS = 2;

// Rows of x that one pass multiplies: they stay in the first cache.
constexpr int TILE = 4;

// Rows of weights that one pass multiplies, each of a part of the matrix of its own: streams that the processor fetches
// side by side, while x is read once for all of them. With a tile of x, as many as their sums leave registers for.
// A step of one row of bf16, 2 cores of an AMD EPYC, share of the speed at which the machine reads: 0.91 with one stream
// and 0.97 with four where it reads 35 GB/s; at 55 GB/s, with `load_part` too, 0.75 and 0.89. int8 and int4 have more to
// compute than to wait for: two rows of int4 take 0.74 of the time of one at a time (16 rows of x), and of int8 a row of
// x is as fast with two as with four.
constexpr int streams_of(int kind, bool is_alone) {
    if (kind == I4) return 2;
    return !is_alone ? 3 : kind == I8 ? 2 : 4;
}

// Columns up to which a row of x stays in the first cache, however much streams through it. Behind that, and with more
// rows of x, weights have to be asked for in time (53 GB/s against 42 on that EPYC, 4,864 columns); before it the
// processor does better alone (57 against 54, 896 columns), with fp32 and bf16.
constexpr int64_t FEW_COLS = 2048;

// With AVX512, leaves a number in its register: GCC reads it again for every product, and a step of 16 rows of bf16 took
// 170 ms instead of 98.
inline void hold([[maybe_unused]] vf& x) {
#ifdef __AVX512F__
    asm("" : "+v"(x));
#endif
}

// out[r][b] of the NR weight rows row + r * apart times NB rows of x, which for bf16 are as `unzip` makes them.
template <int KIND, int NR, int NB, bool ASK>
inline void dot(const Matrix& m, int64_t row, int64_t apart, const float* x, int64_t ldx, float (&out)[NR][NB]) {
    constexpr int64_t BYTES = KIND == F32 ? 4 : KIND == BF16 ? 2 : 1;
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

const vf NIBBLES = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// As above with int4. x is padded with zeros to whole blocks. Scales are widened sixteen at once and then read as floats,
// which the multiplying instruction spreads itself.
template <int NR, int NB>
inline void dot4(const Matrix& m, int64_t row, int64_t apart, const float* x, int64_t ldx, float (&out)[NR][NB]) {
    constexpr int64_t GROUPS = BLOCK / GROUP;
    const int64_t blocks = (m.cols + BLOCK - 1) / BLOCK;
    const char* data[NR];
    const uint16_t* scale[NR];
    float scales[NR][LANES];
    vf sums[NR][NB][SUMS];
    for (int r = 0; r < NR; r++) {
        data[r] = static_cast<const char*>(m.data) + (row + r * apart) * blocks * 64;
        scale[r] = static_cast<const uint16_t*>(m.scale) + (row + r * apart) * blocks * GROUPS;
        for (int b = 0; b < NB; b++)
            for (int n = 0; n < SUMS; n++) sums[r][b][n] = vf{};
    }
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t at_scale = i * GROUPS % LANES;
        if (at_scale == 0) {
            const int64_t left = blocks * GROUPS - i * GROUPS;
            for (int r = 0; r < NR; r++)
                if (left >= LANES)
                    store(scales[r], load16<BF16>(scale[r], i * GROUPS));
                else
                    for (int64_t j = 0; j < left; j++) scales[r][j] = from_bf16(scale[r][i * GROUPS + j]);
        }
        vu packed[NR];
        for (int r = 0; r < NR; r++) {
            std::memcpy(&packed[r], data[r] + i * 64, sizeof packed[r]);
            ask(data[r] + i * 64);
        }
        for (int group = 0; group < GROUPS; group++)
            for (int n = 0; n < SUMS; n++) {  // half the group's weights a sum
                vf w[NR];
                for (int r = 0; r < NR; r++) {
                    const vf levels = NIBBLES * spread(scales[r][at_scale + group]);
                    w[r] = pick(levels, vi(packed[r] >> (8 * group + 4 * n)));
                }
                for (int b = 0; b < NB; b++) {
                    vf at = load(x + b * ldx + i * BLOCK + group * GROUP + n * LANES);
                    hold(at);
                    for (int r = 0; r < NR; r++) sums[r][b][n] += w[r] * at;
                }
            }
    }
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) out[r][b] = sum(sums[r][b][0] + sums[r][b][1]);
}

// The row's sum with its scale and bias. fma is named: left to itself, the compiler would fuse in some batches only.
template <int KIND>
inline float finish(const Matrix& m, int64_t row, float total) {
    const float bias = m.bias ? m.bias[row] : 0.0f;
    if constexpr (KIND == I8) return std::fma(total, static_cast<const float*>(m.scale)[row], bias);
    return total + bias;
}

template <int KIND, int NR, int NB, bool ASK>
inline void product(const Matrix& m, int64_t row, int64_t apart, const float* x, int64_t ldx, float* y, int64_t ldy) {
    float out[NR][NB];
    if constexpr (KIND == I4)
        dot4<NR, NB>(m, row, apart, x, ldx, out);
    else
        dot<KIND, NR, NB, ASK>(m, row, apart, x, ldx, out);
    for (int r = 0; r < NR; r++)
        for (int b = 0; b < NB; b++) y[b * ldy + row + r * apart] = finish<KIND>(m, row + r * apart, out[r][b]);
}

// The NR weight rows row + r * apart times all rows of x, of which there is one where IS_ALONE.
template <int KIND, int NR, bool IS_ALONE, bool ASK>
inline void products(const Matrix& m, int64_t row, int64_t apart, int64_t B, const float* x, int64_t ldx, float* y,
                     int64_t ldy) {
    if constexpr (IS_ALONE) {
        product<KIND, NR, 1, ASK>(m, row, apart, x, ldx, y, ldy);
    } else {
        static_assert(TILE == 4, "the switch below has the sizes under it");
        int64_t b = 0;
        for (; b + TILE <= B; b += TILE)
            product<KIND, NR, TILE, ASK>(m, row, apart, x + b * ldx, ldx, y + b * ldy, ldy);
        switch (B - b) {
            case 3: return product<KIND, NR, 3, ASK>(m, row, apart, x + b * ldx, ldx, y + b * ldy, ldy);
            case 2: return product<KIND, NR, 2, ASK>(m, row, apart, x + b * ldx, ldx, y + b * ldy, ldy);
            case 1: return product<KIND, NR, 1, ASK>(m, row, apart, x + b * ldx, ldx, y + b * ldy, ldy);
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
template <int KIND, bool IS_ALONE, bool ASK>
void share(const Matrix& m, int64_t B, const float* x, int64_t ldx, float* y, int64_t ldy) {
    constexpr int NR = streams_of(KIND, IS_ALONE);
    static_assert(NR <= MOST_STREAMS, "Next has room for as many");
    const int64_t piece = std::max<int64_t>(1, PIECE / (NR * row_bytes(m)));  // rows of a stream
    const int me = omp_get_thread_num();
    std::vector<Team::Range>& ranges = team->ranges[turn];
    turn ^= 1;
    team->ranges[turn][me].taken.store(0, std::memory_order_relaxed);
    team->ranges[turn][me].stolen.store(0, std::memory_order_relaxed);
    for (int ahead = 0; ahead < team->num; ahead++) {
        const int owner = (me + ahead) % team->num;
        Team::Range& range = ranges[owner];
        const auto [first, last, apart] = share_of(m, NR, owner);
        const int64_t pieces = (apart + piece - 1) / piece;
        for (int64_t row = first + NR * apart; row < last && owner == me; row++)
            products<KIND, 1, IS_ALONE, ASK>(m, row, 0, B, x, ldx, y, ldy);
        for (int64_t mine = 0; range.taken.fetch_add(1, std::memory_order_relaxed) < pieces; mine++) {
            const int64_t i = owner == me ? mine : pieces - 1 - range.stolen.fetch_add(1, std::memory_order_relaxed);
            const int64_t end = first + std::min((i + 1) * piece, apart);
            for (int64_t row = first + i * piece; row < end; row++)
                products<KIND, NR, IS_ALONE, ASK>(m, row, apart, B, x, ldx, y, ldy);
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

template <int KIND>
void linear_of(const Matrix& m, int64_t B, const float* x, int64_t ldx, float* y, int64_t ldy, const Next& then) {
    if (KIND == BF16) x = unzip(x, B, ldx, m.cols);
    if (B > 1)
        share<KIND, false, true>(m, B, x, ldx, y, ldy);
    else if (KIND == I8 || KIND == I4 || m.cols > FEW_COLS)
        share<KIND, true, true>(m, B, x, ldx, y, ldy);
    else if constexpr (KIND == F32 || KIND == BF16)
        share<KIND, true, false>(m, B, x, ldx, y, ldy);
    next = then;
    meet();
}

// y [B, rows] = x [B, cols] W^T + bias, by all threads, which wait for each other at the end. then: what is read next.
void linear(const Matrix& m, int64_t B, const float* x, int64_t ldx, float* y, int64_t ldy, const Next& then) {
    switch (m.kind) {
        case F32: return linear_of<F32>(m, B, x, ldx, y, ldy, then);
        case BF16: return linear_of<BF16>(m, B, x, ldx, y, ldy, then);
        case I8: return linear_of<I8>(m, B, x, ldx, y, ldy, then);
        case I4: return linear_of<I4>(m, B, x, ldx, y, ldy, then);
    }
}

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

// total [G][SPLIT] += q[g D + j] times number j of sixteen keys, j < width. keys: transposed, a lane of 32 bits holds one
// fp32 number or two of bf16.
template <int KIND, int G, int SPLIT>
inline void add_products(const float* q, int64_t D, const vf (&keys)[LANES], int64_t width, vf (&total)[G][SPLIT]) {
#pragma GCC unroll 32
    for (int64_t j = 0; j < width; j++) {
        const vf key = KIND == F32 ? keys[j] : vf(j % 2 ? vu(keys[j / 2]) & 0xffff0000u : vu(keys[j / 2]) << 16);
        for (int g = 0; g < G; g++) total[g][j % SPLIT] += spread(q[g * D + j]) * key;
    }
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
                add_products<KIND, G, SPLIT>(q + d, D, keys, WIDTH, total);
            } else {
                const int64_t width = std::min(D - d, WIDTH);
                for (int64_t i = 0; i < num; i++) std::memcpy(&keys[i], at + i * stride * BYTES, width * BYTES);
                transpose(keys);
                add_products<KIND, G, SPLIT>(q + d, D, keys, width, total);
            }
        }
        for (int g = 0; g < G; g++) {
            vf out = (SPLIT == 2 ? total[g][0] + total[g][SPLIT - 1] : total[g][0]) * scale;
            for (int64_t i = num; i < LANES; i++) out[i] = -INFINITY;
            store(scores + g * CHUNK + s, out);
        }
    }
}

// acc [G][2 LANES], rows `ld` apart: the values of n keys times G heads' weights, 2 LANES of their D.
template <int KIND, int G>
inline void weigh(const float* weights, const void* v, int64_t base, int64_t stride, int64_t n, float* acc, int64_t ld) {
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
        for (int64_t s = LANES; s < n; s += LANES) {
            const vf x = load(row + s);
            most = (x > most) | (x != x) ? x : most;  // NaN wins
        }
        float peak = most[0];
        for (int i = 1; i < LANES; i++) peak = most[i] > peak || most[i] != most[i] ? most[i] : peak;
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
    const int64_t stride = cache.stride_slot;
    for (; G >= HEADS; G -= HEADS, q += HEADS * D, part += HEADS * (D + 2))
        attend_some<KIND, HEADS>(q, k, v, base, stride, n, D, scale, part, ahead);
    static_assert(HEADS == 8, "the switch below has the sizes under it");
    switch (G) {
        case 7: return attend_some<KIND, 7>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 6: return attend_some<KIND, 6>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 5: return attend_some<KIND, 5>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 4: return attend_some<KIND, 4>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 3: return attend_some<KIND, 3>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 2: return attend_some<KIND, 2>(q, k, v, base, stride, n, D, scale, part, ahead);
        case 1: return attend_some<KIND, 1>(q, k, v, base, stride, n, D, scale, part, ahead);
    }
}

// The keys [start, end) that each of B rows sees in a layer of a cache, in chunks. A task is a chunk of a kv head; a thread
// has tasks that follow each other, all heads of a chunk before the next chunk.
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
        return layer * cache.stride_layer + slice / chunks() * cache.stride_row + start(slice) * cache.stride_slot;
    }
    // The keys and values of a chunk, of all heads.
    Next memory(int64_t slice) const {
        const int64_t bytes = cache.kind == F32 ? 4 : 2;
        Next out;
        out.num = 2;
        out.at[0] = static_cast<const char*>(cache.k) + base(slice) * bytes;
        out.at[1] = static_cast<const char*>(cache.v) + base(slice) * bytes;
        out.left = num(slice) * cache.stride_slot * bytes;
        return out;
    }
    // Those of this thread's first chunk.
    Next first() const {
        const int64_t task = first_task(omp_get_thread_num());
        return task < first_task(omp_get_thread_num() + 1) ? memory(task / kv_heads) : Next{};
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
        if (task == first || h == 0) ahead = (slice + 1) * m.kv_heads < last ? seen.memory(slice + 1) : then;
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
        const int64_t slot = layer * cache.stride_layer + b * cache.stride_row + step.position[b] * cache.stride_slot;
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

inline int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Zeros behind the rows of what a matrix of n columns is multiplied with, where the last one was wider.
void clear_behind(float* x, int64_t B, int64_t n, int64_t ld) {
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = n; i < padded(n); i++) x[b * ld + i] = 0;
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

// Widths of the scratch arrays, whole blocks each, so that int4 finds zeros behind a row's end.
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
    return {padded(m.hidden), padded(qkv), padded(m.heads * m.head_dim), padded(wide), padded(act)};
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
        clear_behind(act, B, n, w.act);
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
        clear_behind(act, B, l.down.cols, w.act);
        const Matrix& after = i + 1 < m.num_layers ? m.layers[i + 1].qkv : m.head;
        linear(l.down, B, act, w.act, branch, w.x, weights(after));
        add(x, branch, 1.0f, nullptr, B, C, w.x);
    }
    rms_norm(x, m.norm, m.eps, B, C, w.x, normed);
    linear(m.head, B, normed, w.x, step.logits, m.vocab, Next{});
}

// Runs fn on every thread of a team.
template <typename Fn>
void together(int64_t threads, const Fn& fn) {
    Team* shared = nullptr;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp single
        shared = new Team(omp_get_num_threads());
        team = shared;
        turn = 0;
        next = Next{};
        fn();
    }
    delete shared;
}

}  // namespace

extern "C" {

// Floats of scratch that a step of `rows` rows needs, none of them attending to more than `longest` keys.
int64_t nvlm_scratch(const Model* model, int64_t rows, int64_t longest) {
    return scratch_floats(*model, rows, longest);
}

// longest: slots that any row attends to, at most. scratch: zeros at first, then left alone between steps.
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

// y [B, rows] = x [B, cols] W^T + bias. x has rows of `ldx` floats, whole blocks of zeros behind them for int4.
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
