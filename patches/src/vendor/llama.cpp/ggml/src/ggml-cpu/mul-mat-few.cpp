// Matrix products of quantized weights, a few columns at a time: drafted tokens, sequences that decode at once, and prompts
//
// With one column the product is bound by the memory that the weights are read from. With several it need not take longer,
// if a block of weights is unpacked once for all of them and what is left for a column is a load, a dot product of bytes and
// two products with scales.
//
// The columns are laid out anew, block by block, so that they are read in memory order and with their scales beside them. So
// they may lie anywhere: an expert of a mixture is a product of its own, by the columns of the tokens that chose it.
// What makes the weights' bytes signed again is a sum over the column's bytes alone and is where a dot product begins.
//
// Relies on, of ggml:
//   - ggml-cpu.c's mmid_row_mapping: the place of a column in dst, of which dimension 1 modulo src1's is its place in src1
//   - the blocks of ggml-common.h, and that the columns come as the vec_dot_type of the weights: Q8_1 for Q4_1 and Q5_1, Q8_K for
//     Q4_K and Q6_K, else Q8_0

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "mul-mat-few.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)

// columns that are computed together
static constexpr int MMF_TILE_COLS = 8;

// blocks of a column that stay in L1 while the rows go by
static constexpr int64_t MMF_TILE_BLOCKS = 32;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define MMF_DPBUSD(acc, u, s) _mm256_dpbusd_epi32(acc, u, s)
#elif defined(__AVXVNNI__)
#define MMF_DPBUSD(acc, u, s) _mm256_dpbusd_avx_epi32(acc, u, s)
#endif

// to L2: what is needed next and what is fetched would wait for each other in L1
#if defined(__GNUC__)
#define MMF_PREFETCH(addr) __builtin_prefetch(addr, 0, 2)
#define MMF_INLINE         inline __attribute__((always_inline)) // or what is the same for all rows is made for each
#else
#define MMF_PREFETCH(addr) GGML_UNUSED(addr)
#define MMF_INLINE         inline
#endif

// bytes from what is read to what is fetched: the hardware alone gets a third of the memory's speed here
static constexpr size_t MMF_AHEAD = 4096;
static constexpr size_t MMF_LINE  = 64; // that one fetch brings

// bytes of all blocks of columns for which rows are read whole: what of L1 the weights do not need
static constexpr size_t MMF_WHOLE = 36*1024;

// columns from which on rows are computed together, where they are at all
static constexpr int MMF_COLS_OF_ROWS = 4;

// for more of them, tiled.cpp unpacks to tiles
static constexpr int64_t MMF_MAX_COLS_Q4_K = 12;
static constexpr int64_t MMF_MAX_COLS_Q6_K = 32;

static inline float mmf_half(ggml_half x) {
    return GGML_CPU_COMPUTE_FP16_TO_FP32(x);
}

// AVX512 takes two blocks at a time
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MMF_PAIRS
#endif

// 32 values of a row: value = scale*(u - OFFSET) + min
struct mmf_block {
    __m256i u;     // bytes
    __m256  scale; // of 4 values each
    float   min;
};

static inline __m256i mmf_nibbles(const uint8_t * qs) {
    const __m128i x = _mm_loadu_si128((const __m128i *) qs);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set1_epi8(0x0F));
}

// the bytes whose bit is set get 16 more
static inline __m256i mmf_fifth_bits(__m256i u, const uint8_t * qh) {
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return _mm256_mask_add_epi8(u, bits, u, _mm256_set1_epi8(16));
#else
    const __m256i byte = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), _mm256_set_epi64x(
            0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0x0000000000000000));
    const __m256i bit  = _mm256_set1_epi64x(0x8040201008040201);
    return _mm256_or_si256(u, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit), _mm256_set1_epi8(16)));
#endif
}

#if defined(MMF_PAIRS)
// two blocks of a row
struct mmf_pair {
    __m512i u;
    __m512  scale;
    __m256  min[2];
};

static constexpr __mmask16 MMF_SECOND = 0xFF00; // lanes of 32 bits

static inline __m512i mmf_nibbles(const uint8_t * a, const uint8_t * b) {
    __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) a));
    x = _mm512_mask_broadcast_i32x4(x, MMF_SECOND, _mm_loadu_si128((const __m128i *) b));
    const __m512i shift = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi16(x, shift), _mm512_set1_epi8(0x0F));
}

static inline __m512i mmf_fifth_bits(__m512i u, const uint8_t * a, const uint8_t * b) {
    uint32_t bits_a, bits_b;
    memcpy(&bits_a, a, sizeof(bits_a));
    memcpy(&bits_b, b, sizeof(bits_b));
    return _mm512_mask_add_epi8(u, bits_a | (uint64_t) bits_b << 32, u, _mm512_set1_epi8(16));
}

static inline __m256 mmf_halves(ggml_half x) {
    return _mm256_cvtph_ps(_mm_set1_epi16(x));
}

static inline __m512 mmf_scales(ggml_half a, ggml_half b) {
    return _mm512_cvtph_ps(_mm256_mask_set1_epi16(_mm256_set1_epi16(a), MMF_SECOND, b));
}
#endif

template <ggml_type TYPE> struct mmf_weights;

template <> struct mmf_weights<GGML_TYPE_Q4_0> {
    using block = block_q4_0;
    static constexpr int  OFFSET  = 8;
    static constexpr bool HAS_MIN = false;
    static inline mmf_block load(const block & b) {
        return { mmf_nibbles(b.qs), _mm256_set1_ps(mmf_half(b.d)), 0.0f };
    }
#if defined(MMF_PAIRS)
    static inline mmf_pair load(const block & a, const block & b) {
        return { mmf_nibbles(a.qs, b.qs), mmf_scales(a.d, b.d), {} };
    }
#endif
};

template <> struct mmf_weights<GGML_TYPE_Q4_1> {
    using block = block_q4_1;
    static constexpr int  OFFSET  = 0;
    static constexpr bool HAS_MIN = true;
    static inline mmf_block load(const block & b) {
        return { mmf_nibbles(b.qs), _mm256_set1_ps(mmf_half(b.data.data.d)), mmf_half(b.data.data.m) };
    }
#if defined(MMF_PAIRS)
    static inline mmf_pair load(const block & a, const block & b) {
        return { mmf_nibbles(a.qs, b.qs), mmf_scales(a.data.data.d, b.data.data.d), { mmf_halves(a.data.data.m), mmf_halves(b.data.data.m) } };
    }
#endif
};

template <> struct mmf_weights<GGML_TYPE_Q5_0> {
    using block = block_q5_0;
    static constexpr int  OFFSET  = 16;
    static constexpr bool HAS_MIN = false;
    static inline mmf_block load(const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(b.qs), b.qh), _mm256_set1_ps(mmf_half(b.d)), 0.0f };
    }
#if defined(MMF_PAIRS)
    static inline mmf_pair load(const block & a, const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(a.qs, b.qs), a.qh, b.qh), mmf_scales(a.d, b.d), {} };
    }
#endif
};

template <> struct mmf_weights<GGML_TYPE_Q5_1> {
    using block = block_q5_1;
    static constexpr int  OFFSET  = 0;
    static constexpr bool HAS_MIN = true;
    static inline mmf_block load(const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(b.qs), b.qh), _mm256_set1_ps(mmf_half(b.data.data.d)), mmf_half(b.data.data.m) };
    }
#if defined(MMF_PAIRS)
    static inline mmf_pair load(const block & a, const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(a.qs, b.qs), a.qh, b.qh), mmf_scales(a.data.data.d, b.data.data.d), { mmf_halves(a.data.data.m), mmf_halves(b.data.data.m) } };
    }
#endif
};

template <> struct mmf_weights<GGML_TYPE_Q8_0> {
    using block = block_q8_0;
#if defined(MMF_DPBUSD)
    static constexpr int  OFFSET  = 128;
#else
    static constexpr int  OFFSET  = 0; // signed
#endif
    static constexpr bool HAS_MIN = false;
    static inline mmf_block load(const block & b) {
        const __m256i x = _mm256_loadu_si256((const __m256i *) b.qs);
        return { _mm256_xor_si256(x, _mm256_set1_epi8((char) OFFSET)), _mm256_set1_ps(mmf_half(b.d)), 0.0f };
    }
#if defined(MMF_PAIRS)
    static inline mmf_pair load(const block & a, const block & b) {
        const __m256i x = _mm256_loadu_si256((const __m256i *) a.qs);
        const __m256i y = _mm256_loadu_si256((const __m256i *) b.qs);
        const __m512i u = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
        return { _mm512_xor_si512(u, _mm512_set1_epi8((char) OFFSET)), mmf_scales(a.d, b.d), {} };
    }
#endif
};

// sums of 4 products each, and begin
template <ggml_type TYPE>
static inline __m256i mmf_dot(__m256i begin, __m256i u, __m256i q) {
#if defined(MMF_DPBUSD)
    return MMF_DPBUSD(begin, u, q);
#else
    if (TYPE == GGML_TYPE_Q8_0) {
        q = _mm256_sign_epi8(q, u);
        u = _mm256_abs_epi8(u);
    }
    return _mm256_add_epi32(begin, _mm256_madd_epi16(_mm256_maddubs_epi16(u, q), _mm256_set1_epi16(1)));
#endif
}

static inline float mmf_sum(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#if defined(MMF_PAIRS)

// one pair of blocks of each column of a tile
struct alignas(64) mmf_cols {
    static constexpr int64_t BLOCKS = 2;

    int8_t  q    [MMF_TILE_COLS][64];
    int32_t begin[MMF_TILE_COLS][16]; // -OFFSET times the sum of 4 bytes each
    float   d    [MMF_TILE_COLS][16];
    float   s    [2][MMF_TILE_COLS];  // d times the sum of all bytes of a block
};

template <ggml_type TYPE>
static void mmf_lay_out(mmf_cols * dst, const char * const * cols, int n_cols, int64_t ib0, int64_t ib1) {
    constexpr int OFFSET = mmf_weights<TYPE>::OFFSET;

    for (int64_t ib = ib0; ib < GGML_PAD(ib1, 2); ++ib) {
        mmf_cols & to = dst[(ib - ib0)/2];
        const int  i  = (ib - ib0)%2;

        for (int c = 0; c < n_cols; ++c) {
            __m256i q = _mm256_setzero_si256();
            float   d = 0.0f; // of a block that there is not
            float   s = 0.0f;

            if (ib == ib1) {
                // nothing
            } else if (mmf_weights<TYPE>::HAS_MIN) {
                const auto & b = ((const block_q8_1 *) cols[c])[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                d = mmf_half(b.data.data.d);
                s = mmf_half(b.data.data.s);
            } else {
                const auto & b = ((const block_q8_0 *) cols[c])[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                d = mmf_half(b.d);
            }

            _mm256_store_si256((__m256i *) (to.q[c] + 32*i), q);
            _mm256_store_ps(to.d[c] + 8*i, _mm256_set1_ps(d));
            to.s[i][c] = s;

            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(OFFSET));
            _mm256_store_si256((__m256i *) (to.begin[c] + 8*i), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
        }
    }
}

// N_ROWS rows that lie nb01 apart: what a column has is read once for them, and with one column no sum waits for itself.
// dst: column c of the first row is at dst[c][ir]
template <ggml_type TYPE, int N_COLS, int N_ROWS>
static MMF_INLINE void mmf_row(float * const * dst, int64_t ir, const char * rows, size_t nb01, const char * const * ahead, const mmf_cols * cols, int64_t ib0, int64_t ib1) {
    using weights = mmf_weights<TYPE>;
    using block   = typename weights::block;

    __m512 acc[N_ROWS][N_COLS];
    __m256 min[N_ROWS][2];

    for (int r = 0; r < N_ROWS; ++r) {
        for (int c = 0; c < N_COLS; ++c) {
            acc[r][c] = _mm512_setzero_ps();
        }
        min[r][0] = _mm256_setzero_ps();
        min[r][1] = _mm256_setzero_ps();
    }

    for (int64_t ib = ib0; ib < ib1; ib += 2) {
        const mmf_cols & col = cols[(ib - ib0)/2];

        mmf_pair w[N_ROWS];
        for (int r = 0; r < N_ROWS; ++r) {
            const block * b = (const block *) (rows + r*nb01) + (ib - ib0);
            MMF_PREFETCH(ahead[r] + (ib - ib0)*sizeof(block));
            MMF_PREFETCH(ahead[r] + (ib - ib0 + 1)*sizeof(block));
            // the last one twice if they are odd: the columns have none beside it
            w[r] = weights::load(b[0], b[ib + 1 < ib1]);
        }

        for (int c = 0; c < N_COLS; ++c) {
            __m512i q     = _mm512_load_si512(col.q[c]);
            __m512i begin = weights::OFFSET ? _mm512_load_si512(col.begin[c]) : _mm512_setzero_si512();
            __m512  d     = _mm512_load_ps(col.d[c]);
#if defined(__GNUC__)
            if (N_ROWS > 1) {
                // or it is read anew for each row: more than can be read in the time
                __asm__("" : "+v"(q), "+v"(begin), "+v"(d));
            }
#endif

            for (int r = 0; r < N_ROWS; ++r) {
                const __m512 x = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(begin, w[r].u, q));
                acc[r][c] = _mm512_fmadd_ps(_mm512_mul_ps(x, d), w[r].scale, acc[r][c]);
            }
        }

        if (weights::HAS_MIN) {
            for (int r = 0; r < N_ROWS; ++r) {
                for (int i = 0; i < 2; ++i) {
                    min[r][i] = _mm256_fmadd_ps(w[r].min[i], _mm256_load_ps(col.s[i]), min[r][i]);
                }
            }
        }
    }

    for (int r = 0; r < N_ROWS; ++r) {
        alignas(32) float m[MMF_TILE_COLS];
        _mm256_store_ps(m, _mm256_add_ps(min[r][0], min[r][1]));

        for (int c = 0; c < N_COLS; ++c) {
            const __m512  x   = acc[r][c];
            const float   sum = mmf_sum(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))) + m[c];
            float & to = dst[c][ir + r];
            to = ib0 == 0 ? sum : to + sum;
        }
    }
}

#else

// one block of each column of a tile
struct alignas(64) mmf_cols {
    static constexpr int64_t BLOCKS = 1;

    int8_t  q    [MMF_TILE_COLS][32];
    int32_t begin[MMF_TILE_COLS][8]; // -OFFSET times the sum of 4 bytes each
    float   d    [MMF_TILE_COLS];
    float   s    [MMF_TILE_COLS];    // d times the sum of all bytes
};

template <ggml_type TYPE>
static void mmf_lay_out(mmf_cols * dst, const char * const * cols, int n_cols, int64_t ib0, int64_t ib1) {
    constexpr int OFFSET = mmf_weights<TYPE>::OFFSET;

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        mmf_cols & to = dst[ib - ib0];

        for (int c = 0; c < n_cols; ++c) {
            __m256i q;

            if (mmf_weights<TYPE>::HAS_MIN) {
                const auto & b = ((const block_q8_1 *) cols[c])[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                to.d[c] = mmf_half(b.data.data.d);
                to.s[c] = mmf_half(b.data.data.s);
            } else {
                const auto & b = ((const block_q8_0 *) cols[c])[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                to.d[c] = mmf_half(b.d);
            }

            _mm256_store_si256((__m256i *) to.q[c], q);

            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(OFFSET));
            _mm256_store_si256((__m256i *) to.begin[c], _mm256_sub_epi32(_mm256_setzero_si256(), sum));
        }
    }
}

// dst: column c of the first row is at dst[c][ir]
template <ggml_type TYPE, int N_COLS, int N_ROWS>
static MMF_INLINE void mmf_row(float * const * dst, int64_t ir, const char * rows, size_t nb01, const char * const * ahead, const mmf_cols * cols, int64_t ib0, int64_t ib1) {
    using weights = mmf_weights<TYPE>;

    static_assert(N_ROWS == 1, "");
    GGML_UNUSED(nb01);

    const auto * row = (const typename weights::block *) rows;

    __m256 acc[N_COLS];
    __m256 min = _mm256_setzero_ps();

    for (int c = 0; c < N_COLS; ++c) {
        acc[c] = _mm256_setzero_ps();
    }

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        const mmf_cols & col = cols[ib - ib0];

        MMF_PREFETCH(ahead[0] + (ib - ib0)*sizeof(row[0]));

        const mmf_block w = weights::load(row[ib - ib0]);

        for (int c = 0; c < N_COLS; ++c) {
            const __m256i q     = _mm256_load_si256((const __m256i *) col.q[c]);
            const __m256i begin = weights::OFFSET ? _mm256_load_si256((const __m256i *) col.begin[c]) : _mm256_setzero_si256();
            const __m256  x     = _mm256_cvtepi32_ps(mmf_dot<TYPE>(begin, w.u, q));

            acc[c] = _mm256_fmadd_ps(_mm256_mul_ps(x, _mm256_broadcast_ss(&col.d[c])), w.scale, acc[c]);
        }

        if (weights::HAS_MIN) {
            min = _mm256_fmadd_ps(_mm256_set1_ps(w.min), _mm256_load_ps(col.s), min);
        }
    }

    alignas(32) float m[MMF_TILE_COLS];
    _mm256_store_ps(m, min);

    for (int c = 0; c < N_COLS; ++c) {
        const float sum = mmf_sum(acc[c]) + m[c];
        float & to = dst[c][ir];
        to = ib0 == 0 ? sum : to + sum;
    }
}

#endif

//
// blocks of 256 values with scales of their parts: all in integers up to the end of a block
//

#if defined(MMF_PAIRS)
using mmf_ints = __m512i;
#else
using mmf_ints = __m256i;
#endif

static constexpr int MMF_PART  = sizeof(mmf_ints); // values that are computed together
static constexpr int MMF_PARTS = QK_K/MMF_PART;

// a block of a row: value = d*scale*u plus what is the same for all 16 values of a group (a min, or the offset of u)
struct mmf_block_K {
    mmf_ints u    [MMF_PARTS]; // bytes
    mmf_ints scale[MMF_PARTS]; // of 2 values each
    __m256i  sums;             // of each group: what the sum of the column's 16 values is multiplied by
    __m128   d;                // and, of weights with a min, what the sums are scaled by
};

static inline __m128 mmf_two_halves(const void * x) {
    int32_t bits;
    memcpy(&bits, x, sizeof(bits));
    return _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
}

// the 8 scales and then the 8 mins: 6 bits each in 12 bytes, the first 4 of both whole, the others in two pieces
static inline __m256i mmf_scales_and_mins(const block_q4_K & b) {
    const __m128i x     = _mm_loadu_si128((const __m128i *) b.scales); // and 4 bytes of what follows
    const __m128i whole = _mm_srlv_epi32(_mm_shuffle_epi32(x, _MM_SHUFFLE(2, 1, 2, 0)), _mm_set_epi32(4, 0, 0, 0));
    const __m128i high  = _mm_srli_epi32(_mm_shuffle_epi32(x, _MM_SHUFFLE(1, 1, 0, 0)), 2);
    return _mm256_cvtepu8_epi16(_mm_or_si128(
            _mm_and_si128(whole, _mm_set_epi32(0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F)),
            _mm_and_si128(high,  _mm_set_epi32(0x30303030, 0, 0x30303030, 0))));
}

#if defined(MMF_PAIRS)

// a low half and a high one
static inline __m512i mmf_shifts(int low, int high) {
    return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}

// of 16 numbers x those at `at`, from number i on
static inline __m512i mmf_spread(__m256i x, const uint8_t * at, int i) {
    const __m512i from = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *) at));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(from, _mm512_set1_epi16(i)), _mm512_castsi256_si512(x));
}

static inline void mmf_load(mmf_block_K & w, const block_q4_K & b) {
    alignas(32) static constexpr uint8_t at[32] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2 };
    alignas(32) static constexpr uint8_t mins[16] = { 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15 };

    const __m256i s = mmf_scales_and_mins(b);

    // the low nibbles of 32 bytes are 32 values, and the high ones are the next
    for (int i = 0; i < MMF_PARTS; i += 2) {
        const __m512i q = _mm512_loadu_si512(b.qs + 32*i);
        w.u[i]     = _mm512_and_si512(q, _mm512_set1_epi8(0x0F));
        w.u[i + 1] = _mm512_and_si512(_mm512_srli_epi16(q, 4), _mm512_set1_epi8(0x0F));
        w.scale[i]     = mmf_spread(s, at, 2*i);
        w.scale[i + 1] = mmf_spread(s, at, 2*i + 1);
    }

    w.sums = _mm256_permutexvar_epi16(_mm256_cvtepu8_epi16(_mm_load_si128((const __m128i *) mins)), s);
    w.d    = mmf_two_halves(&b.data);
}

static inline void mmf_load(mmf_block_K & w, const block_q6_K & b) {
    alignas(32) static constexpr uint8_t at[32] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3 };

    w.sums = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) b.scales));

    // each half: 64 bytes of low bits, whose low nibbles are a part and whose high ones the next, and 32 bytes of high bits,
    // two for each 32 values
    for (int i = 0; i < MMF_PARTS; i += 2) {
        const __m512i h = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (b.qh + i*16)));
        const __m512i l = _mm512_loadu_si512(b.ql + i*32);

        const __m512i low  = _mm512_set1_epi8(0x0F);
        const __m512i high = _mm512_set1_epi8(0x30);

        w.u[i]     = _mm512_or_si512(_mm512_and_si512(l, low),                       _mm512_and_si512(_mm512_sllv_epi16(h, mmf_shifts(4, 2)), high));
        w.u[i + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(l, 4), low), _mm512_and_si512(_mm512_srlv_epi16(h, mmf_shifts(0, 2)), high));
        w.scale[i]     = mmf_spread(w.sums, at, 4*i);
        w.scale[i + 1] = mmf_spread(w.sums, at, 4*i + 4);
    }

    w.d    = _mm_set1_ps(mmf_half(b.d));
    w.sums = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), w.sums), 5); // u is 32 too large
}

// acc + the products of bytes, in pairs that share a scale
static inline __m512i mmf_dot_scaled(__m512i acc, __m512i u, const int8_t * q, __m512i scale) {
    return _mm512_dpwssd_epi32(acc, _mm512_maddubs_epi16(u, _mm512_load_si512(q)), scale);
}

static inline __m256i mmf_fold(__m512i x) {
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}

static inline __m512i mmf_ints_of(__m256i x) {
    return _mm512_zextsi256_si512(x);
}

#else

static inline __m256i mmf_pairs(__m128i x) {
    return _mm256_set_m128i(_mm_unpackhi_epi16(x, x), _mm_unpacklo_epi16(x, x));
}

static inline void mmf_load(mmf_block_K & w, const block_q4_K & b) {
    const __m256i x = mmf_scales_and_mins(b);

    alignas(16) int16_t s[8];
    _mm_store_si128((__m128i *) s, _mm256_castsi256_si128(x));

    // the low nibbles of 32 bytes are a part, and the high ones are the next
    for (int i = 0; i < MMF_PARTS; i += 2) {
        const __m256i q = _mm256_loadu_si256((const __m256i *) (b.qs + i*16));
        w.u[i]     = _mm256_and_si256(q, _mm256_set1_epi8(0x0F));
        w.u[i + 1] = _mm256_and_si256(_mm256_srli_epi16(q, 4), _mm256_set1_epi8(0x0F));
        w.scale[i]     = _mm256_set1_epi16(s[i]);
        w.scale[i + 1] = _mm256_set1_epi16(s[i + 1]);
    }

    w.sums = mmf_pairs(_mm256_extracti128_si256(x, 1));
    w.d    = mmf_two_halves(&b.data);
}

static inline void mmf_load(mmf_block_K & w, const block_q6_K & b) {
    alignas(32) int16_t s[16];
    w.sums = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) b.scales));
    _mm256_store_si256((__m256i *) s, w.sums);

    // each half: 64 bytes of low bits, whose low nibbles are two parts and whose high ones the next two, and 32 bytes of high
    // bits, two for each part
    for (int i = 0; i < MMF_PARTS; i += 4) {
        const __m256i h  = _mm256_loadu_si256((const __m256i *) (b.qh + i*8));
        const __m256i l0 = _mm256_loadu_si256((const __m256i *) (b.ql + i*16));
        const __m256i l1 = _mm256_loadu_si256((const __m256i *) (b.ql + i*16 + 32));

        const __m256i low  = _mm256_set1_epi8(0x0F);
        const __m256i high = _mm256_set1_epi8(0x30);

        w.u[i]     = _mm256_or_si256(_mm256_and_si256(l0, low),                       _mm256_and_si256(_mm256_slli_epi16(h, 4), high));
        w.u[i + 1] = _mm256_or_si256(_mm256_and_si256(l1, low),                       _mm256_and_si256(_mm256_slli_epi16(h, 2), high));
        w.u[i + 2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(l0, 4), low), _mm256_and_si256(h, high));
        w.u[i + 3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(l1, 4), low), _mm256_and_si256(_mm256_srli_epi16(h, 2), high));
    }
    for (int i = 0; i < MMF_PARTS; ++i) {
        w.scale[i] = _mm256_set_m128i(_mm_set1_epi16(s[2*i + 1]), _mm_set1_epi16(s[2*i]));
    }

    w.d    = _mm_set1_ps(mmf_half(b.d));
    w.sums = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), w.sums), 5); // u is 32 too large
}

// acc + the products of bytes, in pairs that share a scale
static inline __m256i mmf_dot_scaled(__m256i acc, __m256i u, const int8_t * q, __m256i scale) {
    const __m256i x = _mm256_maddubs_epi16(u, _mm256_load_si256((const __m256i *) q)); // at most 2*63*127, which 16 bits hold
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(acc, x, scale);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, x, scale);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x, scale));
#endif
}

static inline __m256i mmf_fold(__m256i x) {
    return x;
}

static inline __m256i mmf_ints_of(__m256i x) {
    return x;
}

#endif

// one block of each column of a tile
struct alignas(64) mmf_cols_K {
    static constexpr int64_t BLOCKS = 1;

    int8_t  q   [MMF_PARTS][MMF_TILE_COLS][MMF_PART];
    int16_t sums[MMF_TILE_COLS][16];
    float   d   [MMF_TILE_COLS];
};

// 32 values of a block: their number where it is laid out. 64 bytes of Q4_K are the first and the third of four, or the others
template <typename block>
static inline int mmf_place(int i) {
    return std::is_same<block, block_q4_K>::value && MMF_PART == 64 ? i/4*4 + i%2*2 + i/2%2 : i;
}

template <typename block>
static void mmf_lay_out(mmf_cols_K * dst, const char * const * cols, int n_cols, int64_t ib0, int64_t ib1) {
    for (int64_t ib = ib0; ib < ib1; ++ib) {
        mmf_cols_K & to = dst[ib - ib0];

        for (int c = 0; c < n_cols; ++c) {
            const auto & b = ((const block_q8_K *) cols[c])[ib];
            for (int i = 0; i < QK_K/32; ++i) {
                const int at = 32*mmf_place<block>(i);
                memcpy(to.q[at/MMF_PART][c] + at%MMF_PART, b.qs + 32*i, 32);
            }
            memcpy(to.sums[c], b.bsums, sizeof(b.bsums));
            to.d[c] = b.d;
        }
    }
}

// dst: column c of the first row is at dst[c][ir]
template <typename block, int N_COLS>
static MMF_INLINE void mmf_row(float * const * dst, int64_t ir, const block * row, const char * ahead, const mmf_cols_K * cols, int64_t ib0, int64_t ib1) {
    constexpr bool HAS_MIN = std::is_same<block, block_q4_K>::value;

    __m256 acc[N_COLS] = {};

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        const mmf_cols_K & col = cols[ib - ib0];

        for (size_t i = 0; i < sizeof(block); i += MMF_LINE) {
            MMF_PREFETCH(ahead + (ib - ib0)*sizeof(block) + i);
        }

        mmf_block_K w;
        mmf_load(w, row[ib - ib0]);

        mmf_ints sum [N_COLS];
        __m256i  sums[N_COLS];
        for (int c = 0; c < N_COLS; ++c) {
            sums[c] = _mm256_madd_epi16(w.sums, _mm256_load_si256((const __m256i *) col.sums[c]));
            sum [c] = mmf_ints_of(HAS_MIN ? _mm256_setzero_si256() : sums[c]);
        }
        for (int i = 0; i < MMF_PARTS; ++i) {
            for (int c = 0; c < N_COLS; ++c) {
                sum[c] = mmf_dot_scaled(sum[c], w.u[i], col.q[i][c], w.scale[i]);
            }
        }
        for (int c = 0; c < N_COLS; ++c) {
            const __m128 d = _mm_mul_ps(w.d, _mm_set1_ps(col.d[c]));

            acc[c] = _mm256_fmadd_ps(_mm256_broadcastss_ps(d), _mm256_cvtepi32_ps(mmf_fold(sum[c])), acc[c]);
            if (HAS_MIN) {
                const __m256 d_sums = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(d), _mm256_set1_epi32(1));
                acc[c] = _mm256_fnmadd_ps(d_sums, _mm256_cvtepi32_ps(sums[c]), acc[c]);
            }
        }
    }

    for (int c = 0; c < N_COLS; ++c) {
        float & to = dst[c][ir];
        to = ib0 == 0 ? mmf_sum(acc[c]) : to + mmf_sum(acc[c]);
    }
}

//
// types of weights by the size of their blocks
//

template <ggml_type TYPE> struct mmf_type {
    using block = typename mmf_weights<TYPE>::block;
    using cols  = mmf_cols;
    static constexpr int64_t SIZE = 32;
    static void lay_out(cols * dst, const char * const * c, int n, int64_t ib0, int64_t ib1) {
        mmf_lay_out<TYPE>(dst, c, n, ib0, ib1);
    }
    static constexpr int ROWS = cols::BLOCKS; // that are computed together
    template <int N_COLS, int N_ROWS>
    static MMF_INLINE void row(float * const * dst, int64_t ir, const char * r, size_t nb01, const char * const * ahead, const cols * c, int64_t ib0, int64_t ib1) {
        mmf_row<TYPE, N_COLS, N_ROWS>(dst, ir, r, nb01, ahead, c, ib0, ib1);
    }
};

template <typename B> struct mmf_type_K {
    using block = B;
    using cols  = mmf_cols_K;
    static constexpr int64_t SIZE = QK_K;
    static void lay_out(cols * dst, const char * const * c, int n, int64_t ib0, int64_t ib1) {
        mmf_lay_out<block>(dst, c, n, ib0, ib1);
    }
    static constexpr int ROWS = 1;
    template <int N_COLS, int N_ROWS>
    static MMF_INLINE void row(float * const * dst, int64_t ir, const char * r, size_t nb01, const char * const * ahead, const cols * c, int64_t ib0, int64_t ib1) {
        static_assert(N_ROWS == 1, "");
        GGML_UNUSED(nb01);
        mmf_row<block, N_COLS>(dst, ir, (const block *) r, ahead[0], c, ib0, ib1);
    }
};

template <> struct mmf_type<GGML_TYPE_Q4_K> : mmf_type_K<block_q4_K> {};
template <> struct mmf_type<GGML_TYPE_Q6_K> : mmf_type_K<block_q6_K> {};

// the blocks [ib0, ib1) of rows
template <ggml_type TYPE>
struct mmf_tile {
    const char * rows; // at block 0
    size_t       nb01;
    int64_t      n_rows;

    int64_t ib0, ib1;
    int64_t n_block; // of a row

    static constexpr size_t SIZE = sizeof(typename mmf_type<TYPE>::block);

    inline const char * at(int64_t r) const {
        return rows + r*nb01 + ib0*SIZE;
    }

    // what is read about MMF_AHEAD bytes after this part of row r: of rows that follow, first in this tile, then in the next
    inline const char * ahead(int64_t r) const {
        const size_t  size = (ib1 - ib0)*SIZE;
        const int64_t next = r + (MMF_AHEAD + size - 1)/size;
        return next < n_rows ? at(next) : ib1 < n_block ? at(next - n_rows) + size : rows + next*nb01;
    }
};

// rows from r on, N_ROWS at a time; the first that is left
template <ggml_type TYPE, int N_COLS, int N_ROWS>
static int64_t mmf_rows(float * const * dst, const mmf_tile<TYPE> & tile, const typename mmf_type<TYPE>::cols * cols, int64_t r) {
    for (; r + N_ROWS <= tile.n_rows; r += N_ROWS) {
        const char * ahead[N_ROWS];
        for (int i = 0; i < N_ROWS; ++i) {
            ahead[i] = tile.ahead(r + i);
        }
        mmf_type<TYPE>::template row<N_COLS, N_ROWS>(dst, r, tile.at(r), tile.nb01, ahead, cols, tile.ib0, tile.ib1);
    }
    return r;
}

template <ggml_type TYPE, int N_COLS>
static void mmf_rows(float * const * dst, const mmf_tile<TYPE> & tile, const typename mmf_type<TYPE>::cols * cols) {
    const int64_t r = mmf_rows<TYPE, N_COLS, mmf_type<TYPE>::ROWS>(dst, tile, cols, 0);
    mmf_rows<TYPE, N_COLS, 1>(dst, tile, cols, r);
}

// rows from r on, N_ROWS at a time, as they lie in memory; the first that is left. cols: of all blocks
template <ggml_type TYPE, int N_COLS, int N_ROWS>
static int64_t mmf_whole_rows(float * const * dst, const char * rows, size_t nb01, int64_t n_rows, const typename mmf_type<TYPE>::cols * cols, int64_t n_block, int64_t r) {
    using type = mmf_type<TYPE>;
    constexpr int64_t n_part = 32*MMF_TILE_BLOCKS/type::SIZE;

    for (; r + N_ROWS <= n_rows; r += N_ROWS) {
        for (int64_t ib0 = 0; ib0 < n_block; ib0 += n_part) {
            const char * row = rows + r*nb01 + ib0*sizeof(typename type::block);
            const char * ahead[N_ROWS];
            for (int i = 0; i < N_ROWS; ++i) {
                ahead[i] = row + i*nb01 + MMF_AHEAD;
            }
            type::template row<N_COLS, N_ROWS>(dst, r, row, nb01, ahead, cols + ib0/type::cols::BLOCKS, ib0, std::min(ib0 + n_part, n_block));
        }
    }
    return r;
}

template <ggml_type TYPE, int N_COLS>
static void mmf_whole_rows(float * const * dst, const char * rows, size_t nb01, int64_t n_rows, const typename mmf_type<TYPE>::cols * cols, int64_t n_block) {
    // with few columns the product waits for the memory, which gives most where it is read in order
    constexpr int N_ROWS = N_COLS < MMF_COLS_OF_ROWS ? 1 : mmf_type<TYPE>::ROWS;

    const int64_t r = mmf_whole_rows<TYPE, N_COLS, N_ROWS>(dst, rows, nb01, n_rows, cols, n_block, 0);
    mmf_whole_rows<TYPE, N_COLS, 1>(dst, rows, nb01, n_rows, cols, n_block, r);
}

// calls f with the number of columns of a tile, known when it is compiled
template <typename F>
static void mmf_for_cols(int n, F && f) {
    switch (n) {
        case 1: f(std::integral_constant<int, 1>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 5: f(std::integral_constant<int, 5>()); break;
        case 6: f(std::integral_constant<int, 6>()); break;
        case 7: f(std::integral_constant<int, 7>()); break;
        case 8: f(std::integral_constant<int, 8>()); break;
        default: GGML_ABORT("%d columns in a tile", n);
    }
}

template <ggml_type TYPE>
static void mmf_chunk(ggml_tensor * dst, const char * cols, size_t row_size, int64_t expert, const int32_t * expert_cols, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    using type = mmf_type<TYPE>;

    const ggml_tensor * src0 = dst->src[0];

    const int64_t ne11    = dst->src[1]->ne[1];
    const int64_t n_cols  = ic1 - ic0;
    const int64_t n_block = src0->ne[0]/type::SIZE;
    const size_t  nb01    = src0->nb[1];

    const char * rows = (const char *) src0->data + expert*src0->nb[2] + ir0*nb01;

    constexpr int64_t n_part = 32*MMF_TILE_BLOCKS/type::SIZE;
    constexpr size_t  size   = sizeof(typename type::cols)/(MMF_TILE_COLS*type::cols::BLOCKS); // of a block of a column

    static thread_local std::vector<typename type::cols> laid_out(n_part);

    // tiles of about the same size
    const int64_t n_tile = (n_cols + MMF_TILE_COLS - 1)/MMF_TILE_COLS;

    for (int64_t it = 0, c0 = 0; it < n_tile; ++it) {
        const int n = (n_cols - c0)/(n_tile - it);

        const char * from[MMF_TILE_COLS];
        float      * to  [MMF_TILE_COLS];

        for (int c = 0; c < n; ++c) {
            const int64_t ic = ic0 + c0 + c;
            const int64_t i1 = expert_cols ? expert_cols[2*ic]     : ic;
            const int64_t i2 = expert_cols ? expert_cols[2*ic + 1] : 0;

            from[c] = cols + (i1 % ne11 + i2*ne11)*row_size;
            to  [c] = (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2]) + ir0;
        }

        // the sums of both ways are the same
        if (n == 1 || n*n_block*size <= MMF_WHOLE) {
            laid_out.resize(std::max<size_t>(laid_out.size(), n_block));
            type::lay_out(laid_out.data(), from, n, 0, n_block);

            mmf_for_cols(n, [&](auto n_c) {
                mmf_whole_rows<TYPE, decltype(n_c)::value>(to, rows, nb01, ir1 - ir0, laid_out.data(), n_block);
            });
        } else {
            for (int64_t ib0 = 0; ib0 < n_block; ib0 += n_part) {
                const mmf_tile<TYPE> tile = { rows, nb01, ir1 - ir0, ib0, std::min(ib0 + n_part, n_block), n_block };
                type::lay_out(laid_out.data(), from, n, tile.ib0, tile.ib1);

                mmf_for_cols(n, [&](auto n_c) {
                    mmf_rows<TYPE, decltype(n_c)::value>(to, tile, laid_out.data());
                });
            }
        }

        c0 += n;
    }
}

bool ggml_mul_mat_few_serves(const ggml_tensor * dst, int64_t n_cols) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    int64_t max_cols = INT64_MAX;

    switch (src0->type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            break;
        case GGML_TYPE_Q4_K:
            max_cols = MMF_MAX_COLS_Q4_K;
            break;
        case GGML_TYPE_Q6_K:
            max_cols = MMF_MAX_COLS_Q6_K;
            break;
        default:
            return false;
    }

    const bool is_batch = dst->op == GGML_OP_MUL_MAT && src1->ne[2]*src1->ne[3] > 1;

    return src1->type == GGML_TYPE_F32 && n_cols <= max_cols && !is_batch;
}

void ggml_mul_mat_few_rows(ggml_tensor * dst, const void * cols, size_t row_size, int64_t expert, const int32_t * expert_cols, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    const char * c = (const char *) cols;

    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: mmf_chunk<GGML_TYPE_Q4_0>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q4_1: mmf_chunk<GGML_TYPE_Q4_1>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_0: mmf_chunk<GGML_TYPE_Q5_0>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_1: mmf_chunk<GGML_TYPE_Q5_1>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q8_0: mmf_chunk<GGML_TYPE_Q8_0>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q4_K: mmf_chunk<GGML_TYPE_Q4_K>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q6_K: mmf_chunk<GGML_TYPE_Q6_K>(dst, c, row_size, expert, expert_cols, ir0, ir1, ic0, ic1); break;
        default: GGML_ABORT("type %s is not served", ggml_type_name(dst->src[0]->type));
    }
}

#else

bool ggml_mul_mat_few_serves(const ggml_tensor * dst, int64_t n_cols) {
    GGML_UNUSED(dst);
    GGML_UNUSED(n_cols);
    return false;
}

void ggml_mul_mat_few_rows(ggml_tensor * dst, const void * cols, size_t row_size, int64_t expert, const int32_t * expert_cols, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    GGML_UNUSED(dst);
    GGML_UNUSED(cols);
    GGML_UNUSED(row_size);
    GGML_UNUSED(expert);
    GGML_UNUSED(expert_cols);
    GGML_UNUSED(ir0);
    GGML_UNUSED(ir1);
    GGML_UNUSED(ic0);
    GGML_UNUSED(ic1);
    GGML_ABORT("no kernel for this CPU");
}

#endif
