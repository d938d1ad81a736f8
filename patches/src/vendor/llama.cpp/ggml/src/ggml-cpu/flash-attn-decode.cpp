// Flash attention for few query rows against a long KV cache
//
// Here the op is bound by the memory that it reads, so the cache is walked once, in blocks of cells and in memory order.
// All query rows and heads are served from a block before the next one: the K/V rows are converted to F32 once for all
// query rows that share them (GQA, several tokens) and those that the mask hides from every row are not touched.
//
// Where several query heads share a head of K and V, x86 has a way of its own with a block: flash-attn-transposed.h.
//
// Each thread takes every n_threads-th block and keeps its own running softmax (M, S, VKQ) per query row, in F32. They
// are combined at the end. Which thread takes which block is fixed, so the result does not depend on the timing.
//
// Relies on, of ggml:
//   - the layout of the op's parameters, ggml_flash_attn_ext(), and of its output, which is permuted and contiguous
//   - the vectors of simd-mappings.h (GGML_F32_VEC_*, GGML_F32_EPR), and the blocks of Q8_0 and Q4_0; other types are
//     converted by the to_float of their traits
//   - ggml_graph_plan(), which asks ggml_flash_attn_decode_wdata_size() for the scratch memory

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "flash-attn-decode.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

// with more query rows the op is bound by compute
static constexpr int64_t FA_DECODE_MAX_TOKENS = 8;
static constexpr int64_t FA_DECODE_MAX_ROWS   = 512; // tokens times heads of a stream

// rows of all streams, each thread has a result of its own for every one: bounds the scratch memory
static constexpr int64_t FA_DECODE_MAX_ROWS_ALL = 2048;

// cells per block
static constexpr int64_t FA_BLOCK_MAX = 64;
static constexpr int64_t FA_BLOCK_MIN = 16;

// cells and query rows whose products are computed together
#if defined(__AVX512F__) || (defined(__ARM_NEON) && defined(__aarch64__)) || defined(__POWER9_VECTOR__)
static constexpr int FA_TILE_CELLS = 8; // 32 registers or more
#else
static constexpr int FA_TILE_CELLS = 4;
#endif
static constexpr int FA_TILE_ROWS  = 2;

#if defined(__GNUC__)
#define FA_PREFETCH(addr) __builtin_prefetch(addr)
#else
#define FA_PREFETCH(addr) GGML_UNUSED(addr)
#endif

// the tiles are arrays of vectors, which those without a size (SVE, RVV) cannot be in
#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
#define FA_DECODE_SIMD

#if (defined(__AVX512F__) && defined(__AVX512DQ__)) || (!defined(__AVX512F__) && defined(__AVX2__) && defined(__F16C__) && defined(__FMA__))
#define FA_X86
#endif

// GGML_F32_EPR values of F16, I8 or one nibble of each byte (less 8) as F32
#if defined(__AVX512F__)
#define FA_F16_LOAD(x) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x)))
#define FA_I8_LOAD(x)  _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (x))))

static inline __m512 fa_i4_load(const uint8_t * x, int shift) {
    const __m512i q = _mm512_srl_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) x)), _mm_cvtsi32_si128(shift));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(q, _mm512_set1_epi32(0x0F)), _mm512_set1_epi32(8)));
}
#elif defined(__AVX2__) && defined(__F16C__)
#define FA_F16_LOAD(x) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x)))
#define FA_I8_LOAD(x)  _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (x))))

static inline __m256 fa_i4_load(const uint8_t * x, int shift) {
    const __m256i q = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) x)), _mm_cvtsi32_si128(shift));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(q, _mm256_set1_epi32(0x0F)), _mm256_set1_epi32(8)));
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define FA_F16_LOAD(x) vcvt_f32_f16(vld1_f16((const __fp16 *) (x)))
#define FA_I8_LOAD(x)  fa_i8_load(x)

static inline float32x4_t fa_i8_load(const int8_t * x) {
    int32_t x4;
    memcpy(&x4, x, sizeof(x4));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(x4))))));
}

static inline float32x4_t fa_i4_load(const uint8_t * x, int shift) {
    uint32_t x4;
    memcpy(&x4, x, sizeof(x4));
    x4 = (x4 >> shift) & 0x0F0F0F0F;
    const int32x4_t q = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(x4))))));
    return vcvtq_f32_s32(vsubq_s32(q, vdupq_n_s32(8)));
}
#endif

// the scale of a block for all lanes, not by the table, which would push the cache's rows out of L1
static inline GGML_F32_VEC fa_scale(ggml_half d) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_set1_epi16(d));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_set1_epi16(d));
#else
    return GGML_F32_VEC_SET1(GGML_CPU_FP16_TO_FP32(d));
#endif
}

// s[i] = sum of the lanes of x[i]
template <int N>
static inline void fa_reduce(const GGML_F32_VEC * x, float * s) {
    int i = 0;

#if defined(__AVX__)
    for (; i + 4 <= N; i += 4) {
        __m256 y[4];
        for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
            const __m256d hi = _mm512_extractf64x4_pd(_mm512_castps_pd(x[i + j]), 1);
            y[j] = _mm256_add_ps(_mm512_castps512_ps256(x[i + j]), _mm256_castpd_ps(hi));
#else
            y[j] = x[i + j];
#endif
        }
        const __m256 z = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
        _mm_storeu_ps(s + i, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
    }
#elif defined(__ARM_NEON) && defined(__aarch64__)
    for (; i + 4 <= N; i += 4) {
        vst1q_f32(s + i, vpaddq_f32(vpaddq_f32(x[i], x[i + 1]), vpaddq_f32(x[i + 2], x[i + 3])));
    }
#endif

    const GGML_F32_VEC zero = GGML_F32_VEC_ZERO;
    for (; i < N; ++i) {
        GGML_F32_VEC sum[GGML_F32_ARR];
        sum[0] = x[i];
        for (int j = 1; j < GGML_F32_ARR; ++j) {
            sum[j] = zero;
        }
        float res = 0.0f;
        GGML_F32_VEC_REDUCE(res, sum);
        s[i] = res;
    }
}
#endif

//
// rows of the cache: X::load() gives N registers of values from the element j of a chunk of FA_CHUNK values
//

static constexpr int FA_CHUNK = 32;

// registers that are loaded together, with one scale
static constexpr int FA_LOADS = 2;

#if defined(FA_DECODE_SIMD)
static_assert(FA_CHUNK % (FA_LOADS*GGML_F32_EPR) == 0, "a chunk must be a number of loads");

struct fa_x_f32 {
    static constexpr size_t chunk_size = FA_CHUNK*sizeof(float);

    template <int N>
    static inline void load(const char * x, int j, GGML_F32_VEC * v) {
        for (int i = 0; i < N; ++i) {
            v[i] = GGML_F32_VEC_LOAD((const float *) x + j + i*GGML_F32_EPR);
        }
    }
    static inline float get(const char * x, int j) {
        return ((const float *) x)[j];
    }
};

#if defined(FA_F16_LOAD)
struct fa_x_f16 {
    static constexpr size_t chunk_size = FA_CHUNK*sizeof(ggml_fp16_t);

    template <int N>
    static inline void load(const char * x, int j, GGML_F32_VEC * v) {
        for (int i = 0; i < N; ++i) {
            v[i] = FA_F16_LOAD((const ggml_fp16_t *) x + j + i*GGML_F32_EPR);
        }
    }
    static inline float get(const char * x, int j) {
        return GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) x)[j]);
    }
};
#endif

#if defined(FA_I8_LOAD)
struct fa_x_q8_0 {
    static_assert(QK8_0 == FA_CHUNK, "a chunk must be a block");

    static constexpr size_t chunk_size = sizeof(block_q8_0);

    template <int N>
    static inline void load(const char * x, int j, GGML_F32_VEC * v) {
        const block_q8_0 * b = (const block_q8_0 *) x;

        const GGML_F32_VEC d = fa_scale(b->d);
        for (int i = 0; i < N; ++i) {
            v[i] = GGML_F32_VEC_MUL(FA_I8_LOAD(b->qs + j + i*GGML_F32_EPR), d);
        }
    }
    static inline float get(const char * x, int j) {
        const block_q8_0 * b = (const block_q8_0 *) x;
        return GGML_CPU_FP16_TO_FP32(b->d)*b->qs[j];
    }
};

struct fa_x_q4_0 {
    static_assert(QK4_0 == FA_CHUNK, "a chunk must be a block");

    static constexpr size_t chunk_size = sizeof(block_q4_0);

    template <int N>
    static inline void load(const char * x, int j, GGML_F32_VEC * v) {
        const block_q4_0 * b = (const block_q4_0 *) x;

        const GGML_F32_VEC d = fa_scale(b->d);
        for (int i = 0; i < N; ++i, j += GGML_F32_EPR) {
            v[i] = GGML_F32_VEC_MUL(j < QK4_0/2 ? fa_i4_load(b->qs + j, 0) : fa_i4_load(b->qs + j - QK4_0/2, 4), d);
        }
    }
    static inline float get(const char * x, int j) {
        const block_q4_0 * b = (const block_q4_0 *) x;
        return GGML_CPU_FP16_TO_FP32(b->d)*((j < QK4_0/2 ? b->qs[j] & 0x0F : b->qs[j - QK4_0/2] >> 4) - 8);
    }
};
#endif
#else
struct fa_x_f32 {};
#endif

// the conversion of the rows of types that have no fa_x, nullptr for those that have one
static ggml_to_float_t fa_get_to_float(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
            return nullptr;
        case GGML_TYPE_F16:
#if defined(FA_F16_LOAD)
            return nullptr;
#else
            return [](const void * x, float * y, int64_t n) { ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n); };
#endif
        case GGML_TYPE_BF16:
            return [](const void * x, float * y, int64_t n) { ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) x, y, n); };
#if defined(FA_I8_LOAD)
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
            return nullptr;
#endif
        default:
            return ggml_get_type_traits(type)->to_float;
    }
}

//
// tiles of NC cells and NR query rows
//

template <int N>
using fa_int = std::integral_constant<int, N>;

// s[r][c] = x[c]*y[r], fetching the rows pf meanwhile
template <typename X, int NC, int NR>
static inline void fa_dot_tile(int64_t n, const char * const * x, const char * const * pf, const float * const * y, float * const * s) {
#if defined(FA_DECODE_SIMD)
    const GGML_F32_VEC zero = GGML_F32_VEC_ZERO;
    GGML_F32_VEC acc[NR][NC];
    for (int r = 0; r < NR; ++r) {
        for (int c = 0; c < NC; ++c) {
            acc[r][c] = zero;
        }
    }

    const auto step = [&](auto n_loads, size_t offset, int64_t i, int j) {
        constexpr int NL = decltype(n_loads)::value;

        GGML_F32_VEC vy[NR][NL];
        for (int r = 0; r < NR; ++r) {
            for (int l = 0; l < NL; ++l) {
                vy[r][l] = GGML_F32_VEC_LOAD(y[r] + i + j + l*GGML_F32_EPR);
            }
        }
        for (int c = 0; c < NC; ++c) {
            GGML_F32_VEC vx[NL];
            X::template load<NL>(x[c] + offset, j, vx);
            for (int r = 0; r < NR; ++r) {
                for (int l = 0; l < NL; ++l) {
                    acc[r][c] = GGML_F32_VEC_FMA(acc[r][c], vx[l], vy[r][l]);
                }
            }
        }
    };

    int64_t i = 0;
    size_t offset = 0;
    for (; i + FA_CHUNK <= n; i += FA_CHUNK, offset += X::chunk_size) {
        for (int c = 0; c < NC; ++c) {
            FA_PREFETCH(pf[c] + offset);
        }
        for (int j = 0; j < FA_CHUNK; j += FA_LOADS*GGML_F32_EPR) {
            step(fa_int<FA_LOADS>(), offset, i, j);
        }
    }
    int j = 0;
    for (; i + j + GGML_F32_EPR <= n; j += GGML_F32_EPR) {
        step(fa_int<1>(), offset, i, j);
    }

    for (int r = 0; r < NR; ++r) {
        fa_reduce<NC>(acc[r], s[r]);
    }

    for (; i + j < n; ++j) {
        for (int r = 0; r < NR; ++r) {
            for (int c = 0; c < NC; ++c) {
                s[r][c] += X::get(x[c] + offset, j)*y[r][i + j];
            }
        }
    }
#else
    for (int r = 0; r < NR; ++r) {
        for (int c = 0; c < NC; ++c) {
            ggml_vec_dot_f32(n, &s[r][c], 0, (const float *) x[c], 0, y[r], 0, 1);
        }
    }
    GGML_UNUSED(pf);
#endif
}

// y[r] += sum_c s[r][c]*x[c], fetching the rows pf meanwhile
template <typename X, int NC, int NR>
static inline void fa_mad_tile(int64_t n, const char * const * x, const char * const * pf, float * const * y, const float * const * s) {
#if defined(FA_DECODE_SIMD)
    GGML_F32_VEC vs[NR][NC];
    for (int r = 0; r < NR; ++r) {
        for (int c = 0; c < NC; ++c) {
            vs[r][c] = GGML_F32_VEC_SET1(s[r][c]);
        }
    }

    const auto step = [&](auto n_loads, size_t offset, int64_t i, int j) {
        constexpr int NL = decltype(n_loads)::value;

        GGML_F32_VEC vy[NR][NL];
        for (int r = 0; r < NR; ++r) {
            for (int l = 0; l < NL; ++l) {
                vy[r][l] = GGML_F32_VEC_LOAD(y[r] + i + j + l*GGML_F32_EPR);
            }
        }
        for (int c = 0; c < NC; ++c) {
            GGML_F32_VEC vx[NL];
            X::template load<NL>(x[c] + offset, j, vx);
            for (int r = 0; r < NR; ++r) {
                for (int l = 0; l < NL; ++l) {
                    vy[r][l] = GGML_F32_VEC_FMA(vy[r][l], vx[l], vs[r][c]);
                }
            }
        }
        for (int r = 0; r < NR; ++r) {
            for (int l = 0; l < NL; ++l) {
                GGML_F32_VEC_STORE(y[r] + i + j + l*GGML_F32_EPR, vy[r][l]);
            }
        }
    };

    int64_t i = 0;
    size_t offset = 0;
    for (; i + FA_CHUNK <= n; i += FA_CHUNK, offset += X::chunk_size) {
        for (int c = 0; c < NC; ++c) {
            FA_PREFETCH(pf[c] + offset);
        }
        for (int j = 0; j < FA_CHUNK; j += FA_LOADS*GGML_F32_EPR) {
            step(fa_int<FA_LOADS>(), offset, i, j);
        }
    }
    int j = 0;
    for (; i + j + GGML_F32_EPR <= n; j += GGML_F32_EPR) {
        step(fa_int<1>(), offset, i, j);
    }

    for (; i + j < n; ++j) {
        for (int r = 0; r < NR; ++r) {
            for (int c = 0; c < NC; ++c) {
                y[r][i + j] += X::get(x[c] + offset, j)*s[r][c];
            }
        }
    }
#else
    for (int r = 0; r < NR; ++r) {
        for (int c = 0; c < NC; ++c) {
            ggml_vec_mad_f32(n, y[r], (const float *) x[c], s[r][c]);
        }
    }
    GGML_UNUSED(pf);
#endif
}

// the query rows of a block
struct fa_rows {
    const int32_t * idx;   // [n] those of the first KV head
    int64_t         n;
    int64_t         n_gqa; // added to an index it gives that of the next KV head

    const float   * q;     // [n_rows][DK]
    float         * vkq;   // [n_rows][DV]
    float         * p;     // [n_rows][ldp]
    int64_t         ldp;
};

struct fa_op_kq {
    // the order of a sum over a row depends on the tile, so all are whole
    static constexpr bool WHOLE_TILES = true;

    template <typename X, int NC, int NR>
    static inline int64_t rows(int64_t n, const char * const * x, const char * const * pf, int64_t ic, int64_t ih, const fa_rows & rows, int64_t ir) {
        for (; ir + NR <= rows.n; ir += NR) {
            const float * y[NR];
            float       * s[NR];
            for (int r = 0; r < NR; ++r) {
                const int64_t row = rows.idx[ir + r] + ih*rows.n_gqa;
                y[r] = rows.q + row*n;
                s[r] = rows.p + row*rows.ldp + ic;
            }
            fa_dot_tile<X, NC, NR>(n, x, ir == 0 ? pf : x, y, s);
        }
        return ir;
    }
};

struct fa_op_vkq {
    static constexpr bool WHOLE_TILES = false;

    template <typename X, int NC, int NR>
    static inline int64_t rows(int64_t n, const char * const * x, const char * const * pf, int64_t ic, int64_t ih, const fa_rows & rows, int64_t ir) {
        for (; ir + NR <= rows.n; ir += NR) {
            float       * y[NR];
            const float * s[NR];
            for (int r = 0; r < NR; ++r) {
                const int64_t row = rows.idx[ir + r] + ih*rows.n_gqa;
                y[r] = rows.vkq + row*n;
                s[r] = rows.p + row*rows.ldp + ic;
            }
            fa_mad_tile<X, NC, NR>(n, x, ir == 0 ? pf : x, y, s);
        }
        return ir;
    }
};

//
// blocks of cells
//

// one stream of K or V
struct fa_cache {
    const char * data;
    size_t       nb1;      // from cell to cell
    size_t       nb2;      // from head to head
    size_t       row_size;
    int64_t      n;        // head size
    int64_t      n_head;
    ggml_type    type;

    ggml_to_float_t to_float; // nullptr: read as it is
};

static fa_cache fa_get_cache(const ggml_tensor * kv, int64_t i3) {
    return {
        /*.data     =*/ (const char *) kv->data + i3*kv->nb[3],
        /*.nb1      =*/ kv->nb[1],
        /*.nb2      =*/ kv->nb[2],
        /*.row_size =*/ ggml_row_size(kv->type, kv->ne[0]),
        /*.n        =*/ kv->ne[0],
        /*.n_head   =*/ kv->ne[2],
        /*.type     =*/ kv->type,
        /*.to_float =*/ fa_get_to_float(kv->type),
    };
}

// the heads [ih0, ih1) of NC cells, whose scores are the columns from ic on; meanwhile the cells cells_pf of data_pf, which
// are read next, are fetched: the hardware does not see through rows of a few lines at several places
template <typename OP, typename X, int NC>
static inline void fa_cells(const fa_cache & cache, const int32_t * cells, const int32_t * cells_pf, const char * data_pf,
        int64_t ic, int64_t ih0, int64_t ih1, const fa_rows & rows, float * buf) {
    const char * x [NC];
    const char * pf[NC];
    for (int c = 0; c < NC; ++c) {
        x [c] = cache.data + cells   [c]*cache.nb1 + ih0*cache.nb2;
        pf[c] = data_pf    + cells_pf[c]*cache.nb1 + ih0*cache.nb2;
    }

    for (int64_t ih = ih0; ih < ih1; ++ih) {
        const char * const * xx = x;
        const char * const * pp = pf;

        const char * xb[NC];
        if (cache.to_float) {
            for (int c = 0; c < NC; ++c) {
                for (size_t i = 0; i < cache.row_size; i += CACHE_LINE_SIZE) {
                    FA_PREFETCH(pf[c] + i);
                }
                cache.to_float(x[c], buf + c*cache.n, cache.n);
                xb[c] = (const char *) (buf + c*cache.n);
            }
            xx = xb;
            pp = xb;
        }

        int64_t ir = 0;
        ir = OP::template rows<X, NC, FA_TILE_ROWS>(cache.n, xx, pp, ic, ih, rows, ir);
        ir = OP::template rows<X, NC, 1>           (cache.n, xx, pp, ic, ih, rows, ir);

        for (int c = 0; c < NC; ++c) {
            x [c] += cache.nb2;
            pf[c] += cache.nb2;
        }
    }
}

// all heads of the cells, in the order in which they lie in memory
template <typename OP, typename X>
static void fa_block_x(const fa_cache & cache, const int32_t * cells, int64_t n_cells, const char * next, const fa_rows & rows, float * buf) {
    static const int32_t first[] = { 0, 1, 2, 3, 4, 5, 6, 7 };
    static_assert(FA_TILE_CELLS <= sizeof(first)/sizeof(first[0]), "");

    const bool    by_cell = cache.nb2 < cache.nb1;
    const int64_t dh      = by_cell ? cache.n_head : 1;

    for (int64_t ih = 0; ih < cache.n_head; ih += dh) {
        int64_t ic = 0;
        for (; ic + FA_TILE_CELLS <= n_cells; ic += FA_TILE_CELLS) {
            const bool last = ic + 2*FA_TILE_CELLS > n_cells;
            fa_cells<OP, X, FA_TILE_CELLS>(cache, cells + ic, last ? first : cells + ic + FA_TILE_CELLS, last ? next : cache.data,
                    ic, ih, ih + dh, rows, buf);
        }
        if (OP::WHOLE_TILES && ic < n_cells) {
            int32_t rest[FA_TILE_CELLS];
            for (int c = 0; c < FA_TILE_CELLS; ++c) {
                rest[c] = cells[std::min(ic + c, n_cells - 1)];
            }
            fa_cells<OP, X, FA_TILE_CELLS>(cache, rest, first, next, ic, ih, ih + dh, rows, buf);
            continue;
        }
        for (; ic < n_cells; ++ic) {
            fa_cells<OP, X, 1>(cache, cells + ic, first, next, ic, ih, ih + dh, rows, buf);
        }
    }
}

template <typename OP>
static void fa_block(const fa_cache & cache, const int32_t * cells, int64_t n_cells, const char * next, const fa_rows & rows, float * buf) {
#if defined(FA_F16_LOAD)
    if (cache.type == GGML_TYPE_F16) {
        fa_block_x<OP, fa_x_f16>(cache, cells, n_cells, next, rows, buf);
        return;
    }
#endif
#if defined(FA_I8_LOAD)
    if (cache.type == GGML_TYPE_Q8_0) {
        fa_block_x<OP, fa_x_q8_0>(cache, cells, n_cells, next, rows, buf);
        return;
    }
    if (cache.type == GGML_TYPE_Q4_0) {
        fa_block_x<OP, fa_x_q4_0>(cache, cells, n_cells, next, rows, buf);
        return;
    }
#endif
    fa_block_x<OP, fa_x_f32>(cache, cells, n_cells, next, rows, buf);
}

#if defined(FA_X86)
#include "flash-attn-transposed.h"
#endif

//
// the op
//

// scratch memory of one thread, in units of float
struct fa_layout {
    int64_t vkq;   // [n_stream][n_rows][DV]  running softmax: output
    int64_t m;     // [n_stream][n_rows]                       maximum
    int64_t s;     // [n_stream][n_rows]                       sum
    int64_t q;     // [n_rows][DK]            scaled query rows of the stream
    int64_t p;     // [n_rows][block]         scores of the block, then their exponentials
    int64_t mask;  // [block]                 mask of the visible cells for one token
    int64_t cells; // [block]                 int32: the visible cells
    int64_t rows;  // [n_rows]                int32: the query rows that see some of them (of the first KV head)
    int64_t kt;    // [DK][FA_BLOCK_MAX]      x86: K of one head, transposed
    int64_t buf;   // [FA_TILE_CELLS][max(DK, DV)]  cells as F32; x86: [FA_BLOCK_MAX]
    int64_t size;
};

static fa_layout fa_get_layout(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * v = dst->src[2];

    const int64_t DK       = q->ne[0];
    const int64_t DV       = v->ne[0];
    const int64_t n_rows   = q->ne[1]*q->ne[2];
    const int64_t n_stream = q->ne[3];

    int64_t size = 0;
    const auto add = [&](int64_t n) {
        const int64_t offset = size;
        size += GGML_PAD(n, (int64_t) CACHE_LINE_SIZE_F32);
        return offset;
    };

    fa_layout l;
    l.vkq   = add(n_stream*n_rows*DV);
    l.m     = add(n_stream*n_rows);
    l.s     = add(n_stream*n_rows);
    l.q     = add(n_rows*DK);
    l.p     = add(n_rows*FA_BLOCK_MAX);
    l.mask  = add(FA_BLOCK_MAX);
    l.cells = add(FA_BLOCK_MAX);
    l.rows  = add(n_rows);
#if defined(FA_X86)
    l.kt    = add(FA_BLOCK_MAX*DK);
    l.buf   = add(FA_BLOCK_MAX*std::max(DK, DV));
#else
    l.kt    = size;
    l.buf   = add(FA_TILE_CELLS*std::max(DK, DV));
#endif
    l.size  = size;
    return l;
}

static bool fa_type_supported(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

static bool fa_decode_supported(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    return q->ne[1] <= FA_DECODE_MAX_TOKENS                            &&
           q->ne[1]*q->ne[2] <= FA_DECODE_MAX_ROWS                     &&
           q->ne[1]*q->ne[2]*q->ne[3] <= FA_DECODE_MAX_ROWS_ALL        &&
           q->type == GGML_TYPE_F32                                    &&
           fa_type_supported(k->type) && fa_type_supported(v->type)    &&
           k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0            &&
           k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3]                &&
           (mask == nullptr || mask->ne[2] == 1); // the same for all heads
}

size_t ggml_flash_attn_decode_wdata_size(int n_tasks, const ggml_tensor * dst) {
    if (!fa_decode_supported(dst)) {
        return 0;
    }
    // one cache line more to align the first thread's
    return (n_tasks*fa_get_layout(dst).size + CACHE_LINE_SIZE_F32)*sizeof(float);
}

// the cells [ic0, ic0 + nc) that some token sees, and those tokens
static int64_t fa_visible_cells(const char * mask, size_t nb1, int64_t n_tokens, int64_t ic0, int64_t nc, int32_t * cells, bool * sees) {
    uint16_t hidden[FA_BLOCK_MAX]; // from all tokens
    for (int64_t c = 0; c < nc; ++c) {
        hidden[c] = mask != nullptr;
    }

    for (int64_t t = 0; t < n_tokens; ++t) {
        uint16_t blind = mask != nullptr;
        if (mask) {
            const ggml_fp16_t * mp = (const ggml_fp16_t *) (mask + t*nb1) + ic0;
            for (int64_t c = 0; c < nc; ++c) {
                const uint16_t h = mp[c] == 0xFC00; // -INFINITY
                hidden[c] &= h;
                blind     &= h;
            }
        }
        sees[t] = !blind;
    }

    int64_t n_cells = 0;
    for (int64_t c = 0; c < nc; ++c) {
        cells[n_cells] = ic0 + c;
        n_cells += !hidden[c];
    }
    return n_cells;
}

// groups of FA_BLOCK_MIN cells in which some are seen, whole: the order of a sum over cells depends on their places, which do
// not depend on what other tokens see. read: the cell, or one that is seen in place of one that is not
static int64_t fa_whole_groups(const int32_t * cells, int64_t n_cells, int64_t ic0, int64_t nc, int32_t * read, int32_t * place) {
    int64_t n = 0;
    int64_t i = 0;
    for (int64_t c0 = ic0; c0 < ic0 + nc && i < n_cells; c0 += FA_BLOCK_MIN) {
        const int64_t c1 = std::min(c0 + FA_BLOCK_MIN, ic0 + nc);
        if (cells[i] >= c1) {
            continue;
        }
        int32_t at = cells[i];
        for (int64_t c = c0; c < c1; ++c) {
            if (i < n_cells && cells[i] == c) {
                at = cells[i++];
            }
            read [n] = at;
            place[n] = c;
            ++n;
        }
    }
    return n;
}

// out = the threads' parts of the query row r of all streams, normalized
static void fa_combine(const float * wdata, const fa_layout & layout, int n_parts, int64_t r, const float * sink, int64_t DV, float * out) {
    float M = sink ? *sink : -INFINITY;
    for (int i = 0; i < n_parts; ++i) {
        M = std::max(M, wdata[i*layout.size + layout.m + r]);
    }

    float S = sink ? expf(*sink - M) : 0.0f;
    memset(out, 0, DV*sizeof(float));

    for (int i = 0; i < n_parts; ++i) {
        const float * part = wdata + i*layout.size;
        if (part[layout.s + r] == 0.0f) {
            continue;
        }
        const float ms = expf(part[layout.m + r] - M);
        ggml_vec_mad_f32(DV, out, part + layout.vkq + r*DV, ms);
        S += part[layout.s + r]*ms;
    }

    ggml_vec_scale_f32(DV, out, S == 0.0f ? 0.0f : 1.0f/S);
}

bool ggml_compute_forward_flash_attn_decode(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !fa_decode_supported(dst)) {
        return false;
    }

    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const int64_t DK       = k->ne[0];
    const int64_t DV       = v->ne[0];
    const int64_t n_tokens = q->ne[1];
    const int64_t n_head   = q->ne[2];
    const int64_t n_stream = q->ne[3];
    const int64_t n_kv     = k->ne[1];

    const int64_t n_rows = n_tokens*n_head; // of a stream, in the order of dst: token, head
    const int64_t n_gqa  = n_head/k->ne[2];

    GGML_ASSERT(q->ne[0] == DK);
    GGML_ASSERT(v->ne[1] == n_kv);
    GGML_ASSERT(dst->ne[0] == DV && dst->ne[1] == n_head && dst->ne[2] == n_tokens && dst->ne[3] == n_stream);

    // rows must be contiguous
    GGML_ASSERT(q->nb[0] == ggml_type_size(q->type));
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));
    GGML_ASSERT(v->nb[0] == ggml_type_size(v->type));
    GGML_ASSERT(ggml_is_contiguous(dst));

    float scale         = 1.0f;
    float max_bias      = 0.0f;
    float logit_softcap = 0.0f;

    memcpy(&scale,         (float *) dst->op_params + 0, sizeof(float));
    memcpy(&max_bias,      (float *) dst->op_params + 1, sizeof(float));
    memcpy(&logit_softcap, (float *) dst->op_params + 2, sizeof(float));

    if (logit_softcap != 0.0f) {
        scale /= logit_softcap;
    }

    const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2(n_head));

    const float m0 = powf(2.0f, -(max_bias       ) / n_head_log2);
    const float m1 = powf(2.0f, -(max_bias / 2.0f) / n_head_log2);

    const auto slope = [&](int64_t h) { return h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_head_log2) + 1); };

    const int ith = params->ith;
    const int nth = params->nth;

    const fa_layout layout = fa_get_layout(dst);

    float   * wdata  = (float *) GGML_PAD((uintptr_t) params->wdata, CACHE_LINE_SIZE); // of all threads
    float   * base   = wdata + ith*layout.size;
    float   * Q      = base + layout.q;
    float   * P      = base + layout.p;
    float   * mask32 = base + layout.mask;
    int32_t * cells  = (int32_t *) (base + layout.cells);
    int32_t * rows   = (int32_t *) (base + layout.rows);
    float   * buf    = base + layout.buf;

    // smaller blocks if there are not enough for all threads
    int64_t block = FA_BLOCK_MAX;
    while (block > FA_BLOCK_MIN && n_stream*((n_kv + block - 1)/block) < nth) {
        block /= 2;
    }
    const int64_t n_blocks = (n_kv + block - 1)/block; // of a stream

    for (int64_t i3 = 0; i3 < n_stream; ++i3) {
        float * VKQ = base + layout.vkq + i3*n_rows*DV;
        float * M   = base + layout.m   + i3*n_rows;
        float * S   = base + layout.s   + i3*n_rows;

        const auto raise_max = [&](int64_t r, float max) {
            if (max > M[r]) {
                const float ms = expf(M[r] - max);
                ggml_vec_scale_f32(DV, VKQ + r*DV, ms);
                S[r] *= ms;
                M[r]  = max;
            }
        };

        ggml_vec_set_f32(n_rows, M, -INFINITY);
        memset(S, 0, n_rows*sizeof(float));

        // the blocks of all streams are dealt out in turn
        const int64_t ib0 = (ith + nth - (i3*n_blocks)%nth)%nth;
        if (ib0 >= n_blocks) {
            continue;
        }

        memset(VKQ, 0, n_rows*DV*sizeof(float));

        for (int64_t r = 0; r < n_rows; ++r) {
            const char * pq = (const char *) q->data + (r/n_head)*q->nb[1] + (r%n_head)*q->nb[2] + i3*q->nb[3];
            memcpy(Q + r*DK, pq, DK*sizeof(float));
        }
        ggml_vec_scale_f32(n_rows*DK, Q, scale);

        const fa_cache cache_k = fa_get_cache(k, i3);
        const fa_cache cache_v = fa_get_cache(v, i3);

        const char * mp = mask ? (const char *) mask->data + (i3%mask->ne[3])*mask->nb[3] : nullptr;

        for (int64_t ib = ib0; ib < n_blocks; ib += nth) {
            const int64_t ic0 = ib*block;
            const int64_t nc  = std::min(block, n_kv - ic0);

            bool sees[FA_DECODE_MAX_TOKENS];
            const int64_t n_cells = fa_visible_cells(mp, mask ? mask->nb[1] : 0, n_tokens, ic0, nc, cells, sees);
            if (n_cells == 0) {
                continue;
            }

            int64_t n_act = 0;
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t j = 0; sees[t] && j < n_gqa; ++j) {
                    rows[n_act++] = t*n_head + j;
                }
            }

            const fa_rows act = {
                /*.idx   =*/ rows,
                /*.n     =*/ n_act,
                /*.n_gqa =*/ n_gqa,
                /*.q     =*/ Q,
                /*.vkq   =*/ VKQ,
                /*.p     =*/ P,
                /*.ldp   =*/ block,
            };

#if defined(FA_X86)
            if (n_gqa >= FA_TRANSPOSED_MIN_GQA) {
                for (int64_t i = 0; i < n_cells; ++i) {
                    cells[i] -= ic0;
                }
                const int64_t ic_next = std::min(ic0 + nth*block, n_kv);
                const auto    next    = fa_get_ahead(cache_k, ic_next, std::min(block, n_kv - ic_next));

                fa_block_transposed(cache_k, cache_v, ic0, nc, cells, n_cells, act, next, base + layout.kt, buf, [&](const fa_seen & seen) {
                    for (int64_t t = 0; t < n_tokens; ++t) {
                        if (!sees[t]) {
                            continue;
                        }
                        fa_get_mask(mask ? (const ggml_fp16_t *) (mp + t*mask->nb[1]) + ic0 : nullptr, nc, seen.block, mask32);

                        for (int64_t h = 0; h < n_head; ++h) {
                            const int64_t r = t*n_head + h;
                            float * p = P + r*block;

                            if (logit_softcap != 0.0f) {
                                fa_softcap(p, logit_softcap, seen);
                            }
                            const float max = fa_add_mask(p, mask32, max_bias > 0.0f ? slope(h) : 1.0f, seen);
                            if (max == -INFINITY) {
                                memset(p, 0, seen.block*sizeof(float));
                                continue;
                            }
                            raise_max(r, max);
                            S[r] += fa_exp(p, M[r], seen);
                        }
                    }
                });
                continue;
            }
#endif

            int32_t read [FA_BLOCK_MAX];
            int32_t place[FA_BLOCK_MAX];
            const int64_t n_read = fa_whole_groups(cells, n_cells, ic0, nc, read, place);

            // what is read next: K, then V of this block, then K of the next one
            const char * next_v = cache_v.data + read[0]*cache_v.nb1;
            const char * next_k = cache_k.data + std::min(ic0 + nth*block, n_kv - 1)*cache_k.nb1;

            fa_block<fa_op_kq>(cache_k, read, n_read, next_v, act, buf);

            const int64_t n_exp = GGML_PAD(n_read, FA_BLOCK_MIN);

            // online softmax
            // ref: https://arxiv.org/pdf/2112.05682.pdf
            for (int64_t t = 0; t < n_tokens; ++t) {
                if (!sees[t]) {
                    continue;
                }

                for (int64_t i = 0; mask && i < n_read; ++i) {
                    mask32[i] = GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) (mp + t*mask->nb[1]))[place[i]]);
                }

                for (int64_t h = 0; h < n_head; ++h) {
                    const int64_t r = t*n_head + h;
                    float * p = P + r*block;

                    if (logit_softcap != 0.0f) {
                        ggml_vec_tanh_f32(n_read, p, p);
                        ggml_vec_scale_f32(n_read, p, logit_softcap);
                    }
                    if (max_bias > 0.0f) {
                        ggml_vec_mad_f32(n_read, p, mask32, slope(h));
                    } else if (mask) {
                        ggml_vec_add_f32(n_read, p, p, mask32);
                    }

                    float max = -INFINITY;
                    ggml_vec_max_f32(n_read, &max, p);

                    // whole vectors, for the rest of one is computed otherwise
                    std::fill(p + n_read, p + n_exp, -INFINITY);

                    if (max == -INFINITY) {
                        memset(p, 0, n_read*sizeof(float));
                        continue;
                    }
                    raise_max(r, max);
                    S[r] += ggml_vec_soft_max_f32(n_exp, p, p, M[r]);
                }
            }

            fa_block<fa_op_vkq>(cache_v, read, n_read, next_k, act, buf);
        }
    }

    ggml_barrier(params->threadpool);

    for (int64_t r = ith; r < n_stream*n_rows; r += nth) {
        const float * sink = sinks ? (const float *) sinks->data + r%n_head : nullptr;
        fa_combine(wdata, layout, nth, r, sink, DV, (float *) dst->data + r*DV);
    }

    return true;
}
