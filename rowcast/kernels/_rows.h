// The kernels of _rows.cpp for one instruction set. Included once for each, inside a namespace of its own, with LANES floats to a
// vector and VNNI set where 8-bit dot products exist. Shapes are [T, D] for inputs and [R, D] for tables, as in rows.py.

constexpr int64_t L = LANES;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline Floats load(const float* p) { return *(const Floats*)p; }
static inline Floats load(const BFloat16* p) { return (Floats)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }

static inline float sum(Floats v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

template <class E>
static inline void prefetch(const E* row, int64_t n) {
    for (int64_t b = 0; b < n * (int64_t)sizeof(E); b += 64) __builtin_prefetch((const char*)row + b);
}

// out[t * stride] = row . x[t]. The order of addition does not depend on the number of tokens.
template <int TOKENS, class E>
static inline void dot_tile(const E* row, const E* next, const float* x, int64_t D, float* out, int64_t stride) {
    Floats part[TOKENS][4] = {};
    int64_t d = 0;
    for (; d + 4 * L <= D; d += 4 * L) {
        prefetch(next + d, 4 * L);
        for (int k = 0; k < 4; k++) {
            Floats w = load(row + d + k * L);
            for (int t = 0; t < TOKENS; t++) part[t][k] += w * load(x + t * D + d + k * L);
        }
    }
    for (; d + L <= D; d += L)
        for (int t = 0; t < TOKENS; t++) part[t][0] += load(row + d) * load(x + t * D + d);
    for (int t = 0; t < TOKENS; t++) {
        float total = sum((part[t][0] + part[t][1]) + (part[t][2] + part[t][3]));
        for (int64_t e = d; e < D; e++) total += to_float(row[e]) * x[t * D + e];
        out[t * stride] = total;
    }
}

template <class E>
static inline void dot(const E* row, const E* next, const float* x, int64_t T, int64_t D, float* out, int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= T; t += 4) dot_tile<4>(row, next, x + t * D, D, out + t * stride, stride);
    for (; t < T; t++) dot_tile<1>(row, next, x + t * D, D, out + t * stride, stride);
}

template <class E>
static inline void add_row(const E* row, const E* next, float by, int64_t D, float* out) {
    int64_t d = 0;
    for (; d + 4 * L <= D; d += 4 * L) {
        prefetch(next + d, 4 * L);
        for (int k = 0; k < 4; k++) *(Floats*)(out + d + k * L) += load(row + d + k * L) * by;
    }
    for (; d < D; d++) out[d] += to_float(row[d]) * by;
}

// Cephes' expf, on [-87, 88]: 2 units in the last place.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

static inline void activate(float* x, int64_t n, int activation) {
    switch (activation) {
        case IDENTITY: break;
        case RELU:
            for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i];
            break;
        case SILU:
            for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exponential(-x[i]));
            break;
        case GELU:
            for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
            break;
        case GELU_TANH:  // (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
            for (int64_t i = 0; i < n; i++)
                x[i] = x[i] / (1.0f + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
            break;
    }
}

template <class E>
static void rows(const Rows<E>& a) {
    const int64_t T = a.T, D = a.D;
    float* const scratch = scratch_floats((a.threads + 1) * T * D);
    const float* const x = a.up ? floats(a.x, T * D, scratch + a.threads * T * D) : nullptr;
    auto id = [&](int64_t c) { return a.ids ? a.ids[c] : c; };
#pragma omp parallel num_threads(a.threads)
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = a.C * me / team, end = a.C * (me + 1) / team;
        float* const part = scratch + me * T * D;
        if (a.down) std::memset(part, 0, sizeof(float) * T * D);
        float gate[MOST_TOKENS][ROW_BLOCK], hidden[MOST_TOKENS][ROW_BLOCK];
        for (int64_t begin = first; begin < end; begin += ROW_BLOCK) {
            const int64_t n = end - begin < ROW_BLOCK ? end - begin : ROW_BLOCK;
            for (int64_t i = 0; i < n && a.up; i++) {
                const int64_t row = id(begin + i), next = id(std::min(begin + i + AHEAD, end - 1));
                if (a.gate) dot(a.gate + row * a.gate_stride, a.gate + next * a.gate_stride, x, T, D, &gate[0][i], ROW_BLOCK);
                dot(a.up + row * a.up_stride, a.up + next * a.up_stride, x, T, D, &hidden[0][i], ROW_BLOCK);
                for (int64_t t = 0; t < T && a.bias; t++) hidden[t][i] += to_float(a.bias[row]);
            }
            for (int64_t t = 0; t < T; t++) {
                if (!a.up)
                    for (int64_t i = 0; i < n; i++) hidden[t][i] = to_float(a.hidden[t * a.C + begin + i]);
                else if (a.gate) {
                    activate(gate[t], n, a.activation);
                    for (int64_t i = 0; i < n; i++) hidden[t][i] *= gate[t][i];
                } else
                    activate(hidden[t], n, a.activation);
                if (a.own)
                    for (int64_t i = 0; i < n; i++) hidden[t][i] = a.own[t * a.C + begin + i] ? hidden[t][i] : 0;
                if (!a.down)
                    for (int64_t i = 0; i < n; i++) store(a.hidden + t * a.C + begin + i, hidden[t][i]);
            }
            for (int64_t i = 0; i < n && a.down; i++) {
                const E* const row = a.down + id(begin + i) * a.down_stride;
                const E* const next = a.down + id(std::min(begin + i + AHEAD, end - 1)) * a.down_stride;
                for (int64_t t = 0; t < T; t++)
                    if (hidden[t][i] != 0) add_row(row, next, hidden[t][i], D, part + t * D);
            }
        }
        if (a.down) {
#pragma omp barrier
            for (int64_t i = T * D * me / team; i < T * D * (me + 1) / team; i++) {
                float total = scratch[i];
                for (int64_t other = 1; other < team; other++) total += scratch[other * T * D + i];
                store(a.out + i, total);
            }
        }
    }
}

// The largest value with at least `keep` scores at or above it, by bits from the highest; scores in an order-preserving integer form.
static inline int32_t ordered(float score) {
    float plus_zero = score + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &plus_zero, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline int32_t nth_largest(const float* scores, int64_t n, int64_t keep) {
    uint32_t found = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const uint32_t candidate = found | (1u << bit);
        const int32_t bound = (int32_t)(candidate ^ 0x80000000u);
        int32_t reached = 0;
        for (int64_t i = 0; i < n; i++) reached += ordered(scores[i]) >= bound;
        if (reached >= keep) found = candidate;
    }
    return (int32_t)(found ^ 0x80000000u);
}

static void top(const Top& a) {
    if (!a.N) return;
    const bool wide = a.T * a.N > (1 << 15);
#pragma omp parallel for num_threads(a.threads) if (wide)
    for (int64_t task = 0; task < a.T * a.shards; task++) {
        const int64_t t = task / a.shards, shard = task % a.shards;
        const int64_t begin = a.N * shard / a.shards, end = a.N * (shard + 1) / a.shards;
        const int64_t kept = begin * a.keep / a.N, keep = end * a.keep / a.N - kept;
        const float* const scores = a.scores + t * a.N;
        uint8_t* const mask = a.mask + t * a.N;
        std::memset(mask + begin, 0, end - begin);
        if (keep == 0) continue;
        const int32_t bound = nth_largest(scores + begin, end - begin, keep);
        int64_t above = 0, reached = 0;
        for (int64_t i = begin; i < end; i++) {
            const int32_t key = ordered(scores[i]);
            above += key > bound;
            reached += key >= bound;
            mask[i] = key >= bound;
        }
        for (int64_t i = begin, ties = keep - above; i < end && reached > keep; i++)
            if (ordered(scores[i]) == bound) mask[i] = ties-- > 0;
    }
}

// Inputs of the few-bit products, one scale for each block of 64: 16-bit fixed point split into two signed bytes with VNNI, else floats.
struct Block {
#if VNNI
    int8_t high[64], low[64];
#else
    float values[64];
#endif
};

struct Inputs {
    const Block* values;    // [T, blocks]
    const float* scales;    // [T, padded16(blocks)]
    const float* offsets;   // the same: what the middle of the codes adds, to be multiplied by the weight's scale
};

static void prepare(const float* x, int64_t D, int64_t blocks, float middle, Block* to, float* scales, float* offsets) {
    for (int64_t b = 0; b < blocks; b++) {
        float padded[64] = {};
        const int64_t n = D - b * 64 < 64 ? D - b * 64 : 64;
        for (int64_t i = 0; i < n; i++) padded[i] = x[b * 64 + i];
#if VNNI
        float largest = 0;
        for (int i = 0; i < 64; i++) largest = largest < fabsf(padded[i]) ? fabsf(padded[i]) : largest;
        const bool counts = largest > 1e-33f;  // less is 0: its scale, or the inverse, would leave the range of floats
        scales[b] = counts ? largest / 32512 : 0;
        const float inverse = counts ? 32512 / largest : 0;
        int32_t total = 0;
        for (int i = 0; i < 64; i++) {
            const int32_t fixed = (int32_t)__builtin_rintf(padded[i] * inverse), high = (fixed + 128) >> 8;
            to[b].high[i] = (int8_t)high;
            to[b].low[i] = (int8_t)(fixed - 256 * high);
            total += fixed;
        }
        offsets[b] = -middle * scales[b] * (float)total;
#else
        scales[b] = 1;
        float total = 0;
        for (int i = 0; i < 64; i++) total += to[b].values[i] = padded[i];
        offsets[b] = -middle * total;
#endif
    }
}

#if VNNI
template <int BITS>
static inline __m512i unpack(const uint8_t* codes) {
    if (BITS == 8) return _mm512_loadu_si512(codes);
    if (BITS == 4) {
        const __m256i packed = _mm256_loadu_si256((const __m256i*)codes);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
        return _mm512_and_si512(both, _mm512_set1_epi8(15));
    }
    const __m512i copies = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
    const __m512i shifts = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
    const __m512i low = _mm512_and_si512(_mm512_srlv_epi64(copies, shifts), _mm512_set1_epi8(3));
    if (BITS == 2) return low;
    uint64_t high;
    std::memcpy(&high, codes + 16, 8);
    return _mm512_mask_add_epi8(low, high, low, _mm512_set1_epi8(4));
}
#else
template <int BITS>
static inline void unpack(const uint8_t* codes, uint8_t* to) {
    constexpr int low_bits = BITS == 3 ? 2 : BITS, each = 8 * low_bits;
    for (int part = 0; part < 8 / low_bits; part++)
        for (int i = 0; i < each; i++) to[part * each + i] = (codes[i] >> (part * low_bits)) & ((1 << low_bits) - 1);
    if (BITS == 3)
        for (int i = 0; i < 64; i++) to[i] |= ((codes[16 + i / 8] >> (i % 8)) & 1) << 2;
}
#endif

#if !VNNI
static inline Floats widened(const uint8_t* code) {
#if LANES == 8
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)code)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const Bytes*)code, Ints), Floats);
#endif
}
#endif

// The scales of a row, one for each block; zeros behind them up to a multiple of 16.
static inline void widen_scales(const uint16_t* halves, int64_t blocks, int64_t group_blocks, float* scales) {
#if VNNI
    if (group_blocks == 1) {
        for (int64_t b = 0; b < blocks; b += 16) {
            const __mmask16 some = blocks - b < 16 ? (1u << (blocks - b)) - 1 : 0xffff;
            _mm512_storeu_ps(scales + b, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, halves + b)));
        }
        return;
    }
#endif
    for (int64_t b = 0; b < padded16(blocks); b++) scales[b] = b < blocks ? half_to_float(halves[b / group_blocks]) : 0;
}

#if !VNNI
// Rows one by one; a block of codes is unpacked once for all tokens, MOST of them at most.
template <int BITS, int MOST>
static inline void few_bits_each(const LowBit& a, const Inputs& x, int rows, const uint8_t* codes, const float* scales, float* out,
                                 int64_t stride) {
    const int64_t blocks = a.blocks, padded = padded16(blocks), tokens = MOST == 1 ? 1 : a.T;
    for (int k = 0; k < rows; k++, codes += blocks * 8 * BITS, scales += MOST_BLOCKS) {
        Floats part[MOST] = {};
        float total[MOST] = {};
        for (int64_t b = 0; b < blocks; b++) {
            uint8_t code[64];
            unpack<BITS>(codes + b * 8 * BITS, code);
            Floats levels[64 / LANES];
            for (int i = 0; i < 64 / LANES; i++) levels[i] = widened(code + i * LANES);
            for (int64_t t = 0; t < tokens; t++) {
                const float* const values = x.values[t * blocks + b].values;
                Floats block = {};
                for (int i = 0; i < 64 / LANES; i++) block += levels[i] * load(values + i * LANES);
                part[t] += block * (scales[b] * x.scales[t * padded + b]);
                total[t] += scales[b] * x.offsets[t * padded + b];
            }
        }
        for (int64_t t = 0; t < tokens; t++) out[t * stride + k] = total[t] + sum(part[t]);
    }
}
#endif

// out[t * stride + k] = row k of ROWS rows from `first` times token t.
template <int BITS, int ROWS>
static inline void few_bits_rows(const LowBit& a, const Inputs& x, int64_t first, float* out, int64_t stride) {
    const int64_t blocks = a.blocks, padded = padded16(blocks), row_bytes = blocks * 8 * BITS;
    const uint8_t* const codes = a.codes + first * row_bytes;
    float scales[ROWS][MOST_BLOCKS];
    for (int k = 0; k < ROWS; k++)
        widen_scales(a.scales + (first + k) * (blocks / a.group_blocks), blocks, a.group_blocks, scales[k]);
#if VNNI
    for (int64_t t = 0; t < a.T; t++) {
        const Block* const values = x.values + t * blocks;
        const float *const xscales = x.scales + t * padded, *const offsets = x.offsets + t * padded;
        __m512 part[ROWS];
        for (int k = 0; k < ROWS; k++) part[k] = _mm512_setzero_ps();
        for (int64_t chunk = 0; chunk < blocks; chunk += 16) {
            alignas(64) float by[ROWS][16];
            for (int k = 0; k < ROWS; k++) {
                const __m512 chunk_scales = _mm512_loadu_ps(scales[k] + chunk);
                part[k] = _mm512_fmadd_ps(chunk_scales, _mm512_loadu_ps(offsets + chunk), part[k]);
                _mm512_store_ps(by[k], _mm512_mul_ps(chunk_scales, _mm512_loadu_ps(xscales + chunk)));
            }
            for (int64_t b = chunk; b < blocks && b < chunk + 16; b++) {
                const __m512i x_high = _mm512_loadu_si512(values[b].high), x_low = _mm512_loadu_si512(values[b].low);
                for (int k = 0; k < ROWS; k++) {
                    const __m512i code = unpack<BITS>(codes + k * row_bytes + b * 8 * BITS);
                    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), code, x_high);
                    const __m512i sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), code, x_low);
                    part[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(by[k][b - chunk]), part[k]);
                }
            }
        }
        for (int k = 0; k < ROWS; k++) out[t * stride + k] = _mm512_reduce_add_ps(part[k]);
    }
#else
    if (a.T == 1) return few_bits_each<BITS, 1>(a, x, ROWS, codes, scales[0], out, stride);
    few_bits_each<BITS, MOST_TOKENS>(a, x, ROWS, codes, scales[0], out, stride);
#endif
}

template <int BITS>
static void few_bits(const LowBit& a, const Inputs& x, int64_t first, int64_t end, float* out, int64_t stride) {
    int64_t r = first;
    for (; r + 4 <= end; r += 4) few_bits_rows<BITS, 4>(a, x, r, out + r - first, stride);
    for (; r < end; r++) few_bits_rows<BITS, 1>(a, x, r, out + r - first, stride);
}

static inline void few_bits_any(const LowBit& a, const Inputs& x, int64_t first, int64_t end, float* out, int64_t stride) {
    switch (a.bits) {
        case 2: return few_bits<2>(a, x, first, end, out, stride);
        case 3: return few_bits<3>(a, x, first, end, out, stride);
        case 4: return few_bits<4>(a, x, first, end, out, stride);
        case 8: return few_bits<8>(a, x, first, end, out, stride);
    }
}

static void lowbit(const LowBit& a) {
    const int64_t T = a.T, blocks = a.blocks, padded = padded16(blocks);
    Block* const values = (Block*)scratch_floats(T * (blocks * (int64_t)(sizeof(Block) / 4) + 2 * padded));
    float *const scales = (float*)(values + T * blocks), *const offsets = scales + T * padded;
    const float middle = ((1 << a.bits) - 1) * 0.5f;
    std::memset(scales, 0, sizeof(float) * 2 * T * padded);
    for (int64_t t = 0; t < T; t++)
        prepare(a.x + t * a.D, a.D, blocks, middle, values + t * blocks, scales + t * padded, offsets + t * padded);
    const Inputs x = {values, scales, offsets};
    const int64_t N = a.norms ? a.R / 2 : a.R;
#pragma omp parallel num_threads(a.threads)
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = N * me / team, end = N * (me + 1) / team;
        if (!a.norms) few_bits_any(a, x, first, end, a.out + first, N);
        float gate[MOST_TOKENS][ROW_BLOCK];
        for (int64_t begin = first; begin < end && a.norms; begin += ROW_BLOCK) {
            const int64_t stop = end < begin + ROW_BLOCK ? end : begin + ROW_BLOCK;
            few_bits_any(a, x, begin, stop, gate[0], ROW_BLOCK);
            few_bits_any(a, x, N + begin, N + stop, a.out + begin, N);
            for (int64_t t = 0; t < T; t++) {
                float* const out = a.out + t * N + begin;
                activate(gate[t], stop - begin, a.activation);
                for (int64_t i = 0; i < stop - begin; i++) out[i] = fabsf(gate[t][i] * out[i]) * a.norms[begin + i];
            }
        }
    }
}

constexpr Kernels kernels = {rows<float>, rows<BFloat16>, top, lowbit};
