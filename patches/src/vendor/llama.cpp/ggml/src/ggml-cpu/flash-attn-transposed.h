// Flash attention for few query rows on x86, where several query heads share a head of K and V
//
// A part of flash-attn-decode.cpp, which includes it behind the types that it takes from there: fa_cache, fa_rows, the rows of
// the cache (fa_x_*) and FA_BLOCK_MAX. A block of cells, for all query rows.
//
// A product with a row of K would end with a sum over the lanes of a register, which costs more than the products of a short
// head. So K is transposed first, once for all query rows: a lane is a cell, by its place in the block. A sum over cells
// keeps the outputs of a tile in registers. Each sum is a chain of products in an order that depends on nothing: not on the
// other rows of the tile, nor on which cells they see.
//
// For one or two query heads on a head of K and V, transposing costs more than it saves.

#pragma once

static constexpr int64_t FA_TRANSPOSED_MIN_GQA = 3;

static constexpr int FA_GROUP = 16; // cells that are transposed together

#if defined(__AVX512F__)
using fa_vec = __m512;
static constexpr int FA_VECS = 4; // of a tile, times FA_ROWS they fit into the registers
#else
using fa_vec = __m256;
static constexpr int FA_VECS = 2;
#endif
static constexpr int FA_ROWS = 6; // the most query rows of a tile

static_assert(FA_BLOCK_MIN == FA_GROUP && FA_BLOCK_MAX % (FA_VECS*GGML_F32_EPR) == 0, "tiles must fill a block");

#if defined(__AVX512F__)
static inline void fa_transpose(fa_vec * x) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i]     = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(y[i + j]);
            const __m512d b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2*j]     = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2*j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // x[4*i + j]: the values j of each four, of the rows 4*i to 4*i + 3
    for (int j = 0; j < 4; ++j) {
        const __m512 a = _mm512_shuffle_f32x4(x[j],     x[j + 4],  0x88);
        const __m512 b = _mm512_shuffle_f32x4(x[j],     x[j + 4],  0xDD);
        const __m512 c = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xDD);
        x[j]      = _mm512_shuffle_f32x4(a, c, 0x88);
        x[j + 4]  = _mm512_shuffle_f32x4(b, d, 0x88);
        x[j + 8]  = _mm512_shuffle_f32x4(a, c, 0xDD);
        x[j + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
}
#else
static inline void fa_transpose(fa_vec * x) {
    __m256 y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i]     = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m256d a = _mm256_castps_pd(y[i + j]);
            const __m256d b = _mm256_castps_pd(y[i + j + 2]);
            x[i + 2*j]     = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            x[i + 2*j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const __m256 a = x[j];
        x[j]     = _mm256_permute2f128_ps(a, x[j + 4], 0x20);
        x[j + 4] = _mm256_permute2f128_ps(a, x[j + 4], 0x31);
    }
}
#endif

static inline fa_vec fa_set1(float x) {
    return GGML_F32_VEC_SET1(x);
}

#if defined(__AVX512BW__)
// 32 values of 16 rows of F16: half as much to move as of F32
static inline void fa_transpose_f16(const char * const * rows, size_t offset, float * kt) {
    __m512i x[16], y[16];
    for (int c = 0; c < 16; ++c) {
        x[c] = _mm512_loadu_si512(rows[c] + offset);
    }
    for (int c = 0; c < 16; c += 2) {
        y[c]     = _mm512_unpacklo_epi16(x[c], x[c + 1]);
        y[c + 1] = _mm512_unpackhi_epi16(x[c], x[c + 1]);
    }
    for (int c = 0; c < 16; c += 4) {
        for (int h = 0; h < 2; ++h) {
            x[c + 2*h]     = _mm512_unpacklo_epi32(y[c + h], y[c + h + 2]);
            x[c + 2*h + 1] = _mm512_unpackhi_epi32(y[c + h], y[c + h + 2]);
        }
    }
    for (int c = 0; c < 16; c += 8) {
        for (int h = 0; h < 4; ++h) {
            y[c + 2*h]     = _mm512_unpacklo_epi64(x[c + h], x[c + h + 4]);
            y[c + 2*h + 1] = _mm512_unpackhi_epi64(x[c + h], x[c + h + 4]);
        }
    }
    // y[c + k]: the values k, k + 8, k + 16 and k + 24 of the rows c to c + 7
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2,  9,  8, 1, 0);
    const __m512i last  = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (int k = 0; k < 8; ++k) {
        const __m512i a = _mm512_permutex2var_epi64(y[k], first, y[k + 8]);
        const __m512i b = _mm512_permutex2var_epi64(y[k], last,  y[k + 8]);
        _mm512_storeu_ps(kt + (k     )*FA_BLOCK_MAX, _mm512_cvtph_ps(_mm512_castsi512_si256(a)));
        _mm512_storeu_ps(kt + (k +  8)*FA_BLOCK_MAX, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1)));
        _mm512_storeu_ps(kt + (k + 16)*FA_BLOCK_MAX, _mm512_cvtph_ps(_mm512_castsi512_si256(b)));
        _mm512_storeu_ps(kt + (k + 24)*FA_BLOCK_MAX, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1)));
    }
}
#endif

// rows of a cache in the order in which they lie in memory, to be fetched before they are read: the hardware does not see
// through rows of a few lines at several places. A few lines at a time, or the products wait for them
struct fa_ahead {
    const char * row;
    size_t  nb_in, nb_out; // to the next row, and from there to the next one of the outer kind
    int64_t n_in, i;
    int64_t left;
    size_t  row_size;
    size_t  offset;

    inline void fetch(int n_lines) {
        for (int k = 0; k < n_lines && left > 0; ++k) {
            FA_PREFETCH(row + offset);
            offset += CACHE_LINE_SIZE;
            if (offset >= row_size) {
                offset = 0;
                --left;
                row += nb_in;
                if (++i == n_in) {
                    i = 0;
                    row += nb_out;
                }
            }
        }
    }
};

// the cells [ic0, ic0 + nc)
static fa_ahead fa_get_ahead(const fa_cache & cache, int64_t ic0, int64_t nc) {
    const bool by_cell = cache.nb2 < cache.nb1;

    const size_t  nb_in  = by_cell ? cache.nb2 : cache.nb1;
    const size_t  nb_out = by_cell ? cache.nb1 : cache.nb2;
    const int64_t n_in   = by_cell ? cache.n_head : nc;

    return { cache.data + ic0*cache.nb1, nb_in, nb_out - n_in*nb_in, n_in, 0, nc*cache.n_head, cache.row_size, 0 };
}

// kt[i*FA_BLOCK_MAX + c] = x[c][i]
template <typename X>
static inline void fa_transpose_group(int64_t n, const char * const * x, float * kt, fa_ahead & ahead) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; std::is_same<X, fa_x_f16>::value && i + FA_CHUNK <= n; i += FA_CHUNK) {
        ahead.fetch(8);
        fa_transpose_f16(x, i*sizeof(ggml_fp16_t), kt + i*FA_BLOCK_MAX);
    }
#endif
    for (; i + GGML_F32_EPR <= n; i += GGML_F32_EPR) {
        const size_t offset = i/FA_CHUNK*X::chunk_size;
        for (int c = 0; c < FA_GROUP; c += GGML_F32_EPR) {
            ahead.fetch(GGML_F32_EPR*GGML_F32_EPR/64);
            fa_vec v[GGML_F32_EPR];
            for (int k = 0; k < GGML_F32_EPR; ++k) {
                X::template load<1>(x[c + k] + offset, i%FA_CHUNK, v + k);
            }
            fa_transpose(v);
            for (int k = 0; k < GGML_F32_EPR; ++k) {
                GGML_F32_VEC_STORE(kt + (i + k)*FA_BLOCK_MAX + c, v[k]);
            }
        }
    }
    for (; i < n; ++i) {
        for (int c = 0; c < FA_GROUP; ++c) {
            kt[i*FA_BLOCK_MAX + c] = X::get(x[c] + i/FA_CHUNK*X::chunk_size, i%FA_CHUNK);
        }
    }
}

template <int NR, int NV>
static inline void fa_kq_tile(int64_t n, const float * kt, const float * const * q, float * const * s, fa_ahead & ahead) {
    fa_vec acc[NR][NV];
    for (int r = 0; r < NR; ++r) {
        for (int v = 0; v < NV; ++v) {
            acc[r][v] = GGML_F32_VEC_ZERO;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        ahead.fetch(1);
        fa_vec x[NV];
        for (int v = 0; v < NV; ++v) {
            x[v] = GGML_F32_VEC_LOAD(kt + i*FA_BLOCK_MAX + v*GGML_F32_EPR);
        }
        for (int r = 0; r < NR; ++r) {
            const fa_vec y = fa_set1(q[r][i]);
            for (int v = 0; v < NV; ++v) {
                acc[r][v] = GGML_F32_VEC_FMA(acc[r][v], x[v], y);
            }
        }
    }
    for (int r = 0; r < NR; ++r) {
        for (int v = 0; v < NV; ++v) {
            GGML_F32_VEC_STORE(s[r] + v*GGML_F32_EPR, acc[r][v]);
        }
    }
}

// calls f with a number of rows that is known when it is compiled, for about equal parts of n
template <typename F>
static inline void fa_for_rows(int64_t n, F && f) {
    int64_t ir = 0;
    for (int64_t left = (n + FA_ROWS - 1)/FA_ROWS; left > 0; --left) {
        const int64_t nr = (n - ir)/left;
        switch (nr) {
            case 1: f(ir, fa_int<1>()); break;
            case 2: f(ir, fa_int<2>()); break;
            case 3: f(ir, fa_int<3>()); break;
            case 4: f(ir, fa_int<4>()); break;
            case 5: f(ir, fa_int<5>()); break;
            case 6: f(ir, fa_int<6>()); break;
        }
        ir += nr;
    }
}

// the cells of a block that some query row sees
struct fa_seen {
    int64_t         ic0;
    int64_t         block;
    const int32_t * cells; // [n] their places in the block
    int64_t         n;
    const bool    * group; // [block/FA_GROUP] whether it has any
};

// P = scores of the groups that are seen
template <typename X>
static void fa_kq(const fa_cache & cache, const fa_seen & seen, const fa_rows & rows, float * kt, float * buf, fa_ahead ahead) {
    const int64_t n = cache.n;
    fa_ahead none = {};

    for (int64_t ih = 0; ih < cache.n_head; ++ih) {
        const char * data = cache.data + seen.ic0*cache.nb1 + ih*cache.nb2;

        int64_t i = 0;
        for (int64_t c0 = 0; c0 < seen.block; c0 += FA_GROUP) {
            if (!seen.group[c0/FA_GROUP]) {
                continue;
            }
            // those that nobody sees have a lane, too, and in it one that is read anyway
            const char * x[FA_GROUP];
            int32_t at = seen.cells[i];
            for (int c = 0; c < FA_GROUP; ++c) {
                if (i < seen.n && seen.cells[i] == c0 + c) {
                    at = seen.cells[i++];
                }
                x[c] = data + at*cache.nb1;
            }
            if (cache.to_float) {
                for (int c = 0; c < FA_GROUP; ++c) {
                    cache.to_float(x[c], buf + c*n, n);
                    x[c] = (const char *) (buf + c*n);
                }
            }
            fa_transpose_group<X>(n, x, kt + c0, ahead);
        }

        fa_for_rows(rows.n, [&](int64_t ir, auto nr) {
            constexpr int NR = decltype(nr)::value;

            const float * q[NR];
            float       * p[NR];
            for (int r = 0; r < NR; ++r) {
                const int64_t row = rows.idx[ir + r] + ih*rows.n_gqa;
                q[r] = rows.q + row*n;
                p[r] = rows.p + row*rows.ldp;
            }
            fa_ahead & a = ir == 0 ? ahead : none;
            for (int64_t c0 = 0; c0 < seen.block;) {
                constexpr int n_tile = FA_VECS*GGML_F32_EPR;
                bool whole = c0 + n_tile <= seen.block;
                for (int64_t c = c0; whole && c < c0 + n_tile; c += FA_GROUP) {
                    whole = seen.group[c/FA_GROUP];
                }
                float * s[NR];
                for (int r = 0; r < NR; ++r) {
                    s[r] = p[r] + c0;
                }
                if (whole) {
                    fa_kq_tile<NR, FA_VECS>(n, kt + c0, q, s, a);
                    c0 += n_tile;
                    continue;
                }
                if (seen.group[c0/FA_GROUP]) {
                    fa_kq_tile<NR, FA_GROUP/GGML_F32_EPR>(n, kt + c0, q, s, a);
                }
                c0 += FA_GROUP;
            }
        });
    }
}

template <typename X, int NR, int NV>
static inline void fa_vkq_tile(const fa_cache & cache, const char * data, const fa_seen & seen, int64_t i, const float * const * p, float * const * y, fa_ahead & ahead) {
    // a tile begins at a multiple of its width, so that these are of one chunk
    constexpr int NL = NV % FA_LOADS == 0 ? FA_LOADS : 1;

    size_t offset[NV];
    int    j[NV];
    fa_vec acc[NR][NV];
    for (int v = 0; v < NV; ++v) {
        offset[v] = (i + v*GGML_F32_EPR)/FA_CHUNK*X::chunk_size;
        j[v]      = (i + v*GGML_F32_EPR)%FA_CHUNK;
        for (int r = 0; r < NR; ++r) {
            acc[r][v] = GGML_F32_VEC_LOAD(y[r] + i + v*GGML_F32_EPR);
        }
    }
    for (int64_t k = 0; k < seen.n; ++k) {
        const int64_t c = seen.cells[k];
        const char  * row = data + c*cache.nb1;
        ahead.fetch((NV*GGML_F32_EPR + 31)/32);
        fa_vec x[NV];
        for (int v = 0; v < NV; v += NL) {
            X::template load<NL>(row + offset[v], j[v], x + v);
        }
        for (int r = 0; r < NR; ++r) {
            const fa_vec s = fa_set1(p[r][c]);
            for (int v = 0; v < NV; ++v) {
                acc[r][v] = GGML_F32_VEC_FMA(acc[r][v], x[v], s);
            }
        }
    }
    for (int r = 0; r < NR; ++r) {
        for (int v = 0; v < NV; ++v) {
            GGML_F32_VEC_STORE(y[r] + i + v*GGML_F32_EPR, acc[r][v]);
        }
    }
}

// VKQ += P*V
template <typename X>
static void fa_vkq(const fa_cache & from, const fa_seen & seen, const fa_rows & rows, float * buf, fa_ahead ahead) {
    const int64_t n = from.n;
    fa_cache cache = from;
    fa_ahead none  = {};

    for (int64_t ih = 0; ih < cache.n_head; ++ih) {
        const char * data = from.data + seen.ic0*from.nb1 + ih*from.nb2;

        if (from.to_float) {
            for (int64_t k = 0; k < seen.n; ++k) {
                from.to_float(data + seen.cells[k]*from.nb1, buf + seen.cells[k]*n, n);
            }
            data      = (const char *) buf;
            cache.nb1 = n*sizeof(float);
        }

        fa_for_rows(rows.n, [&](int64_t ir, auto nr) {
            constexpr int NR = decltype(nr)::value;

            const float * p[NR];
            float       * y[NR];
            for (int r = 0; r < NR; ++r) {
                const int64_t row = rows.idx[ir + r] + ih*rows.n_gqa;
                p[r] = rows.p   + row*rows.ldp;
                y[r] = rows.vkq + row*n;
            }
            fa_ahead & a = ir == 0 ? ahead : none;
            // as wide as the registers allow: each tile reads its part of every cell
            constexpr int NV = NR <= FA_ROWS/2 ? 2*FA_VECS : FA_VECS;
            int64_t i = 0;
            for (; i + NV*GGML_F32_EPR <= n; i += NV*GGML_F32_EPR) {
                fa_vkq_tile<X, NR, NV>(cache, data, seen, i, p, y, a);
            }
            for (; i + FA_VECS*GGML_F32_EPR <= n; i += FA_VECS*GGML_F32_EPR) {
                fa_vkq_tile<X, NR, FA_VECS>(cache, data, seen, i, p, y, a);
            }
            for (; i + GGML_F32_EPR <= n; i += GGML_F32_EPR) {
                fa_vkq_tile<X, NR, 1>(cache, data, seen, i, p, y, a);
            }
            for (; i < n; ++i) {
                for (int64_t k = 0; k < seen.n; ++k) {
                    const int64_t c = seen.cells[k];
                    const float   x = X::get(data + c*cache.nb1 + i/FA_CHUNK*X::chunk_size, i%FA_CHUNK);
                    for (int r = 0; r < NR; ++r) {
                        y[r][i] = std::fma(x, p[r][c], y[r][i]);
                    }
                }
            }
        });
    }
}

// calls f with the type of the rows of a cache
template <typename F>
static inline void fa_for_type(const fa_cache & cache, F && f) {
    switch (cache.type) {
        case GGML_TYPE_F16:  f(fa_x_f16());  break;
        case GGML_TYPE_Q8_0: f(fa_x_q8_0()); break;
        case GGML_TYPE_Q4_0: f(fa_x_q4_0()); break;
        default:             f(fa_x_f32());  break;
    }
}

static inline float fa_vec_max(fa_vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#endif
}

static inline float fa_vec_sum(fa_vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
#endif
}

// mask32 = the mask of a block for one token, as F32; what is behind its cells is hidden
static void fa_get_mask(const ggml_fp16_t * mask, int64_t nc, int64_t block, float * mask32) {
    int64_t i = 0;
    for (; i + FA_GROUP <= nc; i += FA_GROUP) {
        for (int j = 0; j < FA_GROUP; j += GGML_F32_EPR) {
            GGML_F32_VEC_STORE(mask32 + i + j, mask ? FA_F16_LOAD(mask + i + j) : fa_set1(0.0f));
        }
    }
    for (; i < block; ++i) {
        mask32[i] = i >= nc ? -INFINITY : mask ? GGML_CPU_FP16_TO_FP32(mask[i]) : 0.0f;
    }
}

static inline void fa_softcap(float * p, float softcap, const fa_seen & seen) {
    for (int64_t c = 0; c < seen.block; c += FA_GROUP) {
        if (seen.group[c/FA_GROUP]) {
            ggml_vec_tanh_f32(FA_GROUP, p + c, p + c);
            ggml_vec_scale_f32(FA_GROUP, p + c, softcap);
        }
    }
}

// p += slope*mask; its maximum
static inline float fa_add_mask(float * p, const float * mask, float slope, const fa_seen & seen) {
    const fa_vec vs = fa_set1(slope);
    fa_vec max = fa_set1(-INFINITY);
    for (int64_t c = 0; c < seen.block; c += GGML_F32_EPR) {
        if (seen.group[c/FA_GROUP]) {
            const fa_vec x = GGML_F32_VEC_FMA(GGML_F32_VEC_LOAD(p + c), GGML_F32_VEC_LOAD(mask + c), vs);
            GGML_F32_VEC_STORE(p + c, x);
#if defined(__AVX512F__)
            max = _mm512_max_ps(max, x);
#else
            max = _mm256_max_ps(max, x);
#endif
        }
    }
    return fa_vec_max(max);
}

// p = exp(p - max); its sum
static inline float fa_exp(float * p, float max, const fa_seen & seen) {
    const fa_vec m = fa_set1(-max);
    fa_vec sum = GGML_F32_VEC_ZERO;
    for (int64_t c = 0; c < seen.block; c += GGML_F32_EPR) {
        if (seen.group[c/FA_GROUP]) {
            const fa_vec x = ggml_v_expf(GGML_F32_VEC_ADD(GGML_F32_VEC_LOAD(p + c), m));
            GGML_F32_VEC_STORE(p + c, x);
            sum = GGML_F32_VEC_ADD(sum, x);
        }
    }
    return fa_vec_sum(sum);
}

// the cells of [ic0, ic0 + nc) whose places in it are given, by all rows. softmax makes exponentials of the scores. next: what is
// read after this block
template <typename F>
static void fa_block_transposed(const fa_cache & k, const fa_cache & v, int64_t ic0, int64_t nc, const int32_t * cells, int64_t n_cells,
        const fa_rows & rows, const fa_ahead & next, float * kt, float * buf, F && softmax) {
    bool group[FA_BLOCK_MAX/FA_GROUP] = {};
    for (int64_t i = 0; i < n_cells; ++i) {
        group[cells[i]/FA_GROUP] = true;
    }
    const fa_seen seen = { ic0, GGML_PAD(nc, FA_GROUP), cells, n_cells, group };

    fa_for_type(k, [&](auto x) {
        fa_kq<decltype(x)>(k, seen, rows, kt, buf, fa_get_ahead(v, ic0, nc));
    });

    softmax(seen);

    fa_for_type(v, [&](auto x) {
        fa_vkq<decltype(x)>(v, seen, rows, buf, next);
    });
}
