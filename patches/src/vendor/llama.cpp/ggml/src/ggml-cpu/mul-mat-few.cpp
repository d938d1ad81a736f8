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
//   - the blocks of ggml-common.h, and that the columns come as the vec_dot_type of the weights: Q8_1 for Q4_1 and Q5_1, else Q8_0

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

template <ggml_type TYPE, int N_COLS>
static void mmf_rows(float * dst, size_t stride, const char * rows, size_t nb01, int64_t n_rows, const mmf_cols * cols, int64_t ib0, int64_t ib1) {
    for (int64_t r = 0; r < n_rows; ++r) {
        mmf_row<TYPE, N_COLS>(dst + r, stride, (const typename mmf_weights<TYPE>::block *) (rows + r*nb01), cols, ib0, ib1);
    }
}

template <ggml_type TYPE>
static void mmf_chunk(ggml_tensor * dst, const char * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    const ggml_tensor * src0 = dst->src[0];

    const int64_t n_cols  = ic1 - ic0;
    const int64_t n_block = src0->ne[0]/32;
    const size_t  stride  = dst->nb[1]/sizeof(float);

    const char * rows = (const char *) src0->data + ir0*src0->nb[1];

    static thread_local std::vector<mmf_cols> laid_out(MMF_TILE_BLOCKS);

    // tiles of about the same size
    const int64_t n_tile = (n_cols + MMF_TILE_COLS - 1)/MMF_TILE_COLS;

    for (int64_t it = 0, c0 = 0; it < n_tile; ++it) {
        const int n = (n_cols - c0)/(n_tile - it);

        float * to = (float *) dst->data + (ic0 + c0)*stride + ir0;

        for (int64_t ib0 = 0; ib0 < n_block; ib0 += MMF_TILE_BLOCKS) {
            const int64_t ib1 = std::min(ib0 + MMF_TILE_BLOCKS, n_block);

            mmf_lay_out<TYPE>(laid_out.data(), cols + (ic0 + c0)*row_size, row_size, n, ib0, ib1);

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

    switch (src0->type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            break;
        default:
            return false;
    }

    return src1->type == GGML_TYPE_F32 && src1->ne[1] > 1 && src1->ne[2]*src1->ne[3] == 1;
}

void ggml_mul_mat_few_rows(ggml_tensor * dst, const void * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1) {
    const char * c = (const char *) cols;

    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: mmf_chunk<GGML_TYPE_Q4_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q4_1: mmf_chunk<GGML_TYPE_Q4_1>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_0: mmf_chunk<GGML_TYPE_Q5_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q5_1: mmf_chunk<GGML_TYPE_Q5_1>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
        case GGML_TYPE_Q8_0: mmf_chunk<GGML_TYPE_Q8_0>(dst, c, row_size, ir0, ir1, ic0, ic1); break;
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
