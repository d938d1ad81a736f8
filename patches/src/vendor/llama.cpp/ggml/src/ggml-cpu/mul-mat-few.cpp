// Matrix products of quantized weights, a few columns at a time: drafted tokens, sequences that decode at once, and prompts
//
// With one column the product is bound by the memory that the weights are read from. With several it need not take longer,
// if a block of weights is unpacked once for all of them and what is left for a column is a load, a dot product of bytes and
// two products with scales.
//
// The columns are laid out anew, block by block, so that they are read in memory order and with their scales beside them.
// What makes the weights' bytes signed again is a sum over the column's bytes alone and is where a dot product begins.
//
// Relies on, of ggml:
//   - the blocks of ggml-common.h, and that the columns come as the vec_dot_type of the weights: Q8_1 for Q4_1 and Q5_1, Q8_K for
//     Q4_K and Q6_K, else Q8_0

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "mul-mat-few.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
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

#if defined(__GNUC__)
#define MMF_PREFETCH(addr) __builtin_prefetch(addr)
#else
#define MMF_PREFETCH(addr) GGML_UNUSED(addr)
#endif

// bytes from what is read to what is fetched: the hardware alone gets a third of the memory's speed here
static constexpr size_t MMF_AHEAD = 4096;
static constexpr size_t MMF_LINE  = 64; // that one fetch brings

// of Q4_K and Q6_K: for more of them, tiled.cpp unpacks to tiles
static constexpr int64_t MMF_MAX_COLS_K = 10;

static inline float mmf_half(ggml_half x) {
    return _cvtsh_ss(x);
}

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

template <ggml_type TYPE> struct mmf_weights;

template <> struct mmf_weights<GGML_TYPE_Q4_0> {
    using block = block_q4_0;
    static constexpr int  OFFSET  = 8;
    static constexpr bool HAS_MIN = false;
    static inline mmf_block load(const block & b) {
        return { mmf_nibbles(b.qs), _mm256_set1_ps(mmf_half(b.d)), 0.0f };
    }
};

template <> struct mmf_weights<GGML_TYPE_Q4_1> {
    using block = block_q4_1;
    static constexpr int  OFFSET  = 0;
    static constexpr bool HAS_MIN = true;
    static inline mmf_block load(const block & b) {
        return { mmf_nibbles(b.qs), _mm256_set1_ps(mmf_half(b.data.data.d)), mmf_half(b.data.data.m) };
    }
};

template <> struct mmf_weights<GGML_TYPE_Q5_0> {
    using block = block_q5_0;
    static constexpr int  OFFSET  = 16;
    static constexpr bool HAS_MIN = false;
    static inline mmf_block load(const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(b.qs), b.qh), _mm256_set1_ps(mmf_half(b.d)), 0.0f };
    }
};

template <> struct mmf_weights<GGML_TYPE_Q5_1> {
    using block = block_q5_1;
    static constexpr int  OFFSET  = 0;
    static constexpr bool HAS_MIN = true;
    static inline mmf_block load(const block & b) {
        return { mmf_fifth_bits(mmf_nibbles(b.qs), b.qh), _mm256_set1_ps(mmf_half(b.data.data.d)), mmf_half(b.data.data.m) };
    }
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

// one block of each column of a tile
struct alignas(64) mmf_cols {
    int8_t  q    [MMF_TILE_COLS][32];
    int32_t begin[MMF_TILE_COLS][8]; // -OFFSET times the sum of 4 bytes each
    float   d    [MMF_TILE_COLS];
    float   s    [MMF_TILE_COLS];    // d times the sum of all bytes
};

template <ggml_type TYPE>
static void mmf_lay_out(mmf_cols * dst, const char * cols, size_t row_size, int n_cols, int64_t ib0, int64_t ib1) {
    constexpr int OFFSET = mmf_weights<TYPE>::OFFSET;

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        mmf_cols & to = dst[ib - ib0];

        for (int c = 0; c < n_cols; ++c) {
            __m256i q;

            if (mmf_weights<TYPE>::HAS_MIN) {
                const auto & b = ((const block_q8_1 *) (cols + c*row_size))[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                to.d[c] = mmf_half(b.data.data.d);
                to.s[c] = mmf_half(b.data.data.s);
            } else {
                const auto & b = ((const block_q8_0 *) (cols + c*row_size))[ib];
                q = _mm256_loadu_si256((const __m256i *) b.qs);
                to.d[c] = mmf_half(b.d);
            }

            _mm256_store_si256((__m256i *) to.q[c], q);

            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(OFFSET));
            _mm256_store_si256((__m256i *) to.begin[c], _mm256_sub_epi32(_mm256_setzero_si256(), sum));
        }
    }
}

// dst: column c is at dst[c*stride]
template <ggml_type TYPE, int N_COLS>
static inline void mmf_row(float * dst, size_t stride, const typename mmf_weights<TYPE>::block * row, const mmf_cols * cols, int64_t ib0, int64_t ib1) {
    using weights = mmf_weights<TYPE>;

    __m256 acc[N_COLS];
    __m256 min = _mm256_setzero_ps();

    for (int c = 0; c < N_COLS; ++c) {
        acc[c] = _mm256_setzero_ps();
    }

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        const mmf_cols & col = cols[ib - ib0];

        MMF_PREFETCH((const char *) (row + ib) + MMF_AHEAD);

        const mmf_block w = weights::load(row[ib]);

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
        float & to = dst[c*stride];
        to = ib0 == 0 ? sum : to + sum;
    }
}

//
// blocks of 256 values with scales of their parts: all in integers up to the end of a block
//

static constexpr int MMF_PARTS = QK_K/32;

// a block of a row: value = d*scale*u plus what is the same for all 16 values of a group (a min, or the offset of u)
struct mmf_block_K {
    __m256i u    [MMF_PARTS]; // bytes
    __m256i scale[MMF_PARTS]; // of 2 values each
    __m256i sums;             // of each group: what the sum of the column's 16 values is multiplied by
    float   d;
    float   d_sums;
};

static inline __m256i mmf_pairs(__m128i x) {
    return _mm256_set_m128i(_mm_unpackhi_epi16(x, x), _mm_unpacklo_epi16(x, x));
}

static inline void mmf_load(mmf_block_K & w, const block_q4_K & b) {
    // 8 scales and 8 mins of 6 bits each in 12 bytes: the first 4 of both are whole, the others in two pieces
    uint32_t x[3];
    memcpy(x, b.scales, sizeof(x));

    const uint32_t s0 = x[0] & 0x3F3F3F3F;
    const uint32_t m0 = x[1] & 0x3F3F3F3F;
    const uint32_t s1 = ( x[2]       & 0x0F0F0F0F) | ((x[0] >> 2) & 0x30303030);
    const uint32_t m1 = ((x[2] >> 4) & 0x0F0F0F0F) | ((x[1] >> 2) & 0x30303030);

    alignas(16) int16_t s[8];
    _mm_store_si128((__m128i *) s, _mm_cvtepu8_epi16(_mm_set_epi32(0, 0, s1, s0)));

    // the low nibbles of 32 bytes are a part, and the high ones are the next
    for (int i = 0; i < MMF_PARTS; i += 2) {
        const __m256i q = _mm256_loadu_si256((const __m256i *) (b.qs + i*16));
        w.u[i]     = _mm256_and_si256(q, _mm256_set1_epi8(0x0F));
        w.u[i + 1] = _mm256_and_si256(_mm256_srli_epi16(q, 4), _mm256_set1_epi8(0x0F));
        w.scale[i]     = _mm256_set1_epi16(s[i]);
        w.scale[i + 1] = _mm256_set1_epi16(s[i + 1]);
    }

    w.sums   = mmf_pairs(_mm_cvtepu8_epi16(_mm_set_epi32(0, 0, m1, m0)));
    w.d      = mmf_half(b.data.data.d);
    w.d_sums = -mmf_half(b.data.data.dmin);
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

    w.d      = mmf_half(b.d);
    w.d_sums = -32.0f*w.d;
}

// one block of each column of a tile
struct alignas(64) mmf_cols_K {
    int8_t  q   [MMF_PARTS][MMF_TILE_COLS][32];
    int16_t sums[MMF_TILE_COLS][16];
    float   d   [MMF_TILE_COLS];
};

static void mmf_lay_out(mmf_cols_K * dst, const char * cols, size_t row_size, int n_cols, int64_t ib0, int64_t ib1) {
    for (int64_t ib = ib0; ib < ib1; ++ib) {
        mmf_cols_K & to = dst[ib - ib0];

        for (int c = 0; c < n_cols; ++c) {
            const auto & b = ((const block_q8_K *) (cols + c*row_size))[ib];
            for (int i = 0; i < MMF_PARTS; ++i) {
                memcpy(to.q[i][c], b.qs + 32*i, 32);
            }
            memcpy(to.sums[c], b.bsums, sizeof(b.bsums));
            to.d[c] = b.d;
        }
    }
}

// acc + the sums of 2 products each
static inline __m256i mmf_dot_pairs(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(acc, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, a, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}

// dst: column c is at dst[c*stride]
template <typename block, int N_COLS>
static inline void mmf_row(float * dst, size_t stride, const block * row, const mmf_cols_K * cols, int64_t ib0, int64_t ib1) {
    __m256 acc[N_COLS];

    for (int c = 0; c < N_COLS; ++c) {
        acc[c] = _mm256_setzero_ps();
    }

    for (int64_t ib = ib0; ib < ib1; ++ib) {
        const mmf_cols_K & col = cols[ib - ib0];

        for (size_t i = 0; i < sizeof(block); i += MMF_LINE) {
            MMF_PREFETCH((const char *) (row + ib) + MMF_AHEAD + i);
        }

        mmf_block_K w;
        mmf_load(w, row[ib]);

        __m256i sum[N_COLS];
        for (int c = 0; c < N_COLS; ++c) {
            sum[c] = _mm256_setzero_si256();
        }
        for (int i = 0; i < MMF_PARTS; ++i) {
            for (int c = 0; c < N_COLS; ++c) {
                // at most 2*63*127, which 16 bits hold
                const __m256i x = _mm256_maddubs_epi16(w.u[i], _mm256_load_si256((const __m256i *) col.q[i][c]));
                sum[c] = mmf_dot_pairs(sum[c], x, w.scale[i]);
            }
        }
        for (int c = 0; c < N_COLS; ++c) {
            const __m256i sums = _mm256_madd_epi16(w.sums, _mm256_load_si256((const __m256i *) col.sums[c]));

            acc[c] = _mm256_fmadd_ps(_mm256_set1_ps(w.d     *col.d[c]), _mm256_cvtepi32_ps(sum[c]), acc[c]);
            acc[c] = _mm256_fmadd_ps(_mm256_set1_ps(w.d_sums*col.d[c]), _mm256_cvtepi32_ps(sums),   acc[c]);
        }
    }

    for (int c = 0; c < N_COLS; ++c) {
        float & to = dst[c*stride];
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
    static void lay_out(cols * dst, const char * c, size_t row_size, int n, int64_t ib0, int64_t ib1) {
        mmf_lay_out<TYPE>(dst, c, row_size, n, ib0, ib1);
    }
    template <int N_COLS>
    static void row(float * dst, size_t stride, const block * r, const cols * c, int64_t ib0, int64_t ib1) {
        mmf_row<TYPE, N_COLS>(dst, stride, r, c, ib0, ib1);
    }
};

template <typename B> struct mmf_type_K {
    using block = B;
    using cols  = mmf_cols_K;
    static constexpr int64_t SIZE = QK_K;
    static void lay_out(cols * dst, const char * c, size_t row_size, int n, int64_t ib0, int64_t ib1) {
        mmf_lay_out(dst, c, row_size, n, ib0, ib1);
    }
    template <int N_COLS>
    static void row(float * dst, size_t stride, const block * r, const cols * c, int64_t ib0, int64_t ib1) {
        mmf_row<block, N_COLS>(dst, stride, r, c, ib0, ib1);
    }
};

template <> struct mmf_type<GGML_TYPE_Q4_K> : mmf_type_K<block_q4_K> {};
template <> struct mmf_type<GGML_TYPE_Q6_K> : mmf_type_K<block_q6_K> {};

template <ggml_type TYPE, int N_COLS>
static void mmf_rows(float * dst, size_t stride, const char * rows, size_t nb01, int64_t n_rows, const typename mmf_type<TYPE>::cols * cols, int64_t ib0, int64_t ib1) {
    for (int64_t r = 0; r < n_rows; ++r) {
        mmf_type<TYPE>::template row<N_COLS>(dst + r, stride, (const typename mmf_type<TYPE>::block *) (rows + r*nb01), cols, ib0, ib1);
    }
}

template <ggml_type TYPE>
static void mmf_chunk(ggml_tensor * dst, const char * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    const ggml_tensor * src0 = dst->src[0];

    const int64_t n_cols  = ic1 - ic0;
    const int64_t n_block = src0->ne[0]/mmf_type<TYPE>::SIZE;
    const size_t  stride  = dst->nb[1]/sizeof(float);

    const char * rows = (const char *) src0->data + ir0*src0->nb[1];

    constexpr int64_t n_tile_block = 32*MMF_TILE_BLOCKS/mmf_type<TYPE>::SIZE;

    static thread_local std::vector<typename mmf_type<TYPE>::cols> laid_out(n_tile_block);

    // a row after the other, as they lie in memory; the sums are those of the tiles below
    if (n_cols == 1) {
        laid_out.resize(std::max<size_t>(laid_out.size(), n_block));

        mmf_type<TYPE>::lay_out(laid_out.data(), cols + ic0*row_size, row_size, 1, 0, n_block);

        float * to = (float *) dst->data + ic0*stride + ir0;

        for (int64_t r = 0; r < ir1 - ir0; ++r) {
            for (int64_t ib0 = 0; ib0 < n_block; ib0 += n_tile_block) {
                mmf_rows<TYPE, 1>(to + r, stride, rows + r*src0->nb[1], src0->nb[1], 1, laid_out.data() + ib0, ib0, std::min(ib0 + n_tile_block, n_block));
            }
        }
        return;
    }

    // tiles of about the same size
    const int64_t n_tile = (n_cols + MMF_TILE_COLS - 1)/MMF_TILE_COLS;

    for (int64_t it = 0, c0 = 0; it < n_tile; ++it) {
        const int n = (n_cols - c0)/(n_tile - it);

        float * to = (float *) dst->data + (ic0 + c0)*stride + ir0;

        for (int64_t ib0 = 0; ib0 < n_block; ib0 += n_tile_block) {
            const int64_t ib1 = std::min(ib0 + n_tile_block, n_block);

            mmf_type<TYPE>::lay_out(laid_out.data(), cols + (ic0 + c0)*row_size, row_size, n, ib0, ib1);

            const auto tile = [&](auto f) { f(to, stride, rows, src0->nb[1], ir1 - ir0, laid_out.data(), ib0, ib1); };

            switch (n) {
                case 1: tile(mmf_rows<TYPE, 1>); break;
                case 2: tile(mmf_rows<TYPE, 2>); break;
                case 3: tile(mmf_rows<TYPE, 3>); break;
                case 4: tile(mmf_rows<TYPE, 4>); break;
                case 5: tile(mmf_rows<TYPE, 5>); break;
                case 6: tile(mmf_rows<TYPE, 6>); break;
                case 7: tile(mmf_rows<TYPE, 7>); break;
                case 8: tile(mmf_rows<TYPE, 8>); break;
                default: GGML_ABORT("%d columns in a tile", n);
            }
        }

        c0 += n;
    }
}

bool ggml_mul_mat_few_serves(const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    int64_t max_cols = src1->ne[1];

    switch (src0->type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            break;
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q6_K:
            max_cols = MMF_MAX_COLS_K;
            break;
        default:
            return false;
    }

    return src1->type == GGML_TYPE_F32 && src1->ne[1] <= max_cols && src1->ne[2]*src1->ne[3] == 1;
}

void ggml_mul_mat_few_rows(ggml_tensor * dst, const void * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    const char * c = (const char *) cols;

    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: mmf_chunk<GGML_TYPE_Q4_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q4_1: mmf_chunk<GGML_TYPE_Q4_1>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_0: mmf_chunk<GGML_TYPE_Q5_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_1: mmf_chunk<GGML_TYPE_Q5_1>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q8_0: mmf_chunk<GGML_TYPE_Q8_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q4_K: mmf_chunk<GGML_TYPE_Q4_K>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q6_K: mmf_chunk<GGML_TYPE_Q6_K>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        default: GGML_ABORT("type %s is not served", ggml_type_name(dst->src[0]->type));
    }
}

#else

bool ggml_mul_mat_few_serves(const ggml_tensor * dst) {
    GGML_UNUSED(dst);
    return false;
}

void ggml_mul_mat_few_rows(ggml_tensor * dst, const void * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    GGML_UNUSED(dst);
    GGML_UNUSED(cols);
    GGML_UNUSED(row_size);
    GGML_UNUSED(ir0);
    GGML_UNUSED(ir1);
    GGML_UNUSED(ic0);
    GGML_UNUSED(ic1);
    GGML_ABORT("no kernel for this CPU");
}

#endif
