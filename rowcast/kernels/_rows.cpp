// CPU kernels for a few tokens: products with chosen rows, few-bit products, top-k by shards. The contracts are in rows.py, lowbit.py
// and select.py. Plain C++ without torch or Python, called through ctypes; its OpenMP runtime is the one that torch has loaded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MOST_TOKENS = 16, ROW_BLOCK = 32, AHEAD = 4, MOST_BLOCKS = 512;
enum Activation { IDENTITY, RELU, GELU, GELU_TANH, SILU };

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void store(float* to, float value) { *to = value; }
inline void store(BFloat16* to, float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

inline float half_to_float(uint16_t half) {  // finite, not negative: a scale
    const uint32_t bits = (uint32_t)half << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value * 0x1p112f;
}

inline const float* floats(const float* x, int64_t, float*) { return x; }
inline const float* floats(const BFloat16* x, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float(x[i]);
    return to;
}

// Of the calling thread; grows and is kept.
inline float* scratch_floats(int64_t n) {
    struct Scratch {
        float* at = nullptr;
        int64_t size = 0;
        ~Scratch() { std::free(at); }
    };
    static thread_local Scratch scratch;
    if (scratch.size < n) {
        std::free(scratch.at);
        scratch.at = (float*)std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
        scratch.size = n;
        if (!scratch.at) std::abort();
    }
    return scratch.at;
}

// Without `up` the hidden values are given, without `down` they are the result.
template <class E>
struct Rows {
    const E *gate, *up, *bias, *down, *x;
    int64_t gate_stride, up_stride, down_stride;
    E* hidden;
    const int64_t* ids;
    const bool* own;
    E* out;
    int64_t T, D, C;
    int activation, threads;
};

struct Top {
    const float* scores;
    int64_t T, N, keep, shards;
    uint8_t* mask;
    int threads;
};

// With `norms` the rows are those of the gate, then those of up, and the result is |act(g) u| norm.
struct LowBit {
    const uint8_t* codes;
    const uint16_t* scales;
    const float* x;
    const float* norms;
    float* out;
    int64_t T, D, R, blocks, group_blocks;
    int bits, activation, threads;
};

struct Kernels {
    void (*rows_float)(const Rows<float>&);
    void (*rows_bfloat16)(const Rows<BFloat16>&);
    void (*top)(const Top&);
    void (*lowbit)(const LowBit&);
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace avx512 {
#define LANES 16
#define VNNI 1
#include "_rows.h"
#undef LANES
#undef VNNI
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#define VNNI 0
#include "_rows.h"
#undef LANES
#undef VNNI
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace baseline {
#define LANES 4
#define VNNI 0
#include "_rows.h"
#undef LANES
#undef VNNI
}  // namespace baseline

const Kernels* found(int level) {
#if defined(__x86_64__)
    if (level == 2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512::kernels;
    if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernels;
#endif
    return level == 0 ? &baseline::kernels : nullptr;
}

int level = 0;
const Kernels* kernels = &baseline::kernels;

}  // namespace

extern "C" {

// Use the best instruction set up to `most` (2: AVX-512 with VNNI, 1: AVX2, 0: the compiler's default); returns which it is.
int rowcast_level(int most) {
    for (level = most; !(kernels = found(level)); level--) {
    }
    return level;
}

// The tables have R rows. Returns 0, or 1 without touching anything where an id is not one of them.
int rowcast_rows(int bfloat16, const void* gate, const void* up, const void* bias, const void* down, const void* x, void* hidden,
                 const int64_t* ids, const bool* own, void* out, int64_t gate_stride, int64_t up_stride, int64_t down_stride,
                 int64_t T, int64_t D, int64_t R, int64_t C, int activation, int threads) {
    bool outside = false;
    for (int64_t c = 0; c < C && ids; c++) outside |= (uint64_t)ids[c] >= (uint64_t)R;
    if (outside) return 1;
#define RUN(E, run)                                                                                                          \
    run({(const E*)gate, (const E*)up, (const E*)bias, (const E*)down, (const E*)x, gate_stride, up_stride, down_stride,     \
         (E*)hidden, ids, own, (E*)out, T, D, C, activation, threads})
    if (bfloat16)
        RUN(BFloat16, kernels->rows_bfloat16);
    else
        RUN(float, kernels->rows_float);
#undef RUN
    return 0;
}

// Writes the columns of mask [T, N] in which any row is set; returns how many.
int64_t rowcast_union(const uint8_t* mask, int64_t T, int64_t N, int64_t* ids) {
    int64_t count = 0;
    for (int64_t i = 0; i < N; i++) {
        uint8_t any = 0;
        for (int64_t t = 0; t < T; t++) any |= mask[t * N + i];
        ids[count] = i;
        count += any;
    }
    return count;
}

// With `ids` also the union of the masks, its size is returned.
int64_t rowcast_top(const float* scores, int64_t T, int64_t N, int64_t keep, int64_t shards, uint8_t* mask, int64_t* ids,
                    int threads) {
    kernels->top({scores, T, N, keep, shards, mask, threads});
    return ids ? rowcast_union(mask, T, N, ids) : 0;
}

void rowcast_lowbit(const uint8_t* codes, const uint16_t* scales, const float* x, const float* norms, float* out, int64_t T,
                    int64_t D, int64_t R, int64_t blocks, int64_t group_blocks, int bits, int activation, int threads) {
    kernels->lowbit({codes, scales, x, norms, out, T, D, R, blocks, group_blocks, bits, activation, threads});
}

// One token through a gated MLP: scores of all N neurons (codes hold N rows of the gate, then N of up), the best `keep` by shards, their
// rows. `work` has room for N floats, N ids and N bytes.
void rowcast_gated_ffn(int bfloat16, const uint8_t* codes, const uint16_t* scales, const float* norms, const void* gate, const void* up,
                       const void* down, const void* x, const float* wide_x, void* out, void* work, int64_t gate_stride,
                       int64_t up_stride, int64_t down_stride, int64_t D, int64_t N, int64_t keep, int64_t shards, int64_t blocks,
                       int64_t group_blocks, int bits, int activation, int threads) {
    int64_t* const ids = (int64_t*)work;
    float* const scores = (float*)(ids + N);
    uint8_t* const mask = (uint8_t*)(scores + N);
    rowcast_lowbit(codes, scales, wide_x, norms, scores, 1, D, 2 * N, blocks, group_blocks, bits, activation, threads);
    const int64_t count = rowcast_top(scores, 1, N, keep, shards, mask, ids, threads);
    rowcast_rows(bfloat16, gate, up, nullptr, down, x, nullptr, ids, nullptr, out, gate_stride, up_stride, down_stride, 1, D, N, count,
                 activation, threads);
}
}
