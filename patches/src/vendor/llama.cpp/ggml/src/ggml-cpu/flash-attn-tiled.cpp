// Flash attention for many query rows
//
// Here the op is bound by compute, so it is done by matrix products of tiles in F32. A tile of the cache is converted and
// transposed once for several tiles of queries, those of one query head or of the heads that share K and V, and not at all
// if the mask hides it from all of them. What the mask hides from a part of a tile of queries is not computed either.
//
// It stands in for ggml_compute_forward_flash_attn_ext_tiled() of ops.cpp, with the same results to the bit, and begins
// with fewer queries. When upstream changes, these have to follow:
//   - ggml_compute_forward_flash_attn_ext_f16(): which ops are tiled, how the threads share out the rows
//   - ggml_compute_forward_flash_attn_ext_tiled(): the arithmetic and its order
//   - simd_gemm(): how many rows it takes at a time (FA_TILE_ROWS), that it reads aligned, where it is scalar
//   - the layout of the op's parameters, ggml_flash_attn_ext()

#include "flash-attn-tiled.h"

#include "common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// queries and cells of a tile
static constexpr int FA_TILE_Q  = GGML_FA_TILE_Q;
static constexpr int FA_TILE_KV = GGML_FA_TILE_KV;

// tiles of queries that share a converted tile of K and V
static constexpr int FA_TILE_N = 4;

// queries that the GEMM computes at a time
static constexpr int FA_TILE_ROWS = 4;

// rows of K that are transposed at a time
static constexpr int FA_TILE_PACK = 16;

// fewer queries do not pay for the conversion of K and V, nor for a scalar GEMM
#if defined(SIMD_GEMM_IS_SCALAR)
static constexpr int64_t FA_TILED_MIN_TOKENS = FA_TILE_Q;
#else
static constexpr int64_t FA_TILED_MIN_TOKENS = 9;
#endif

static bool fa_tiled_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    bool res = q->ne[1] >= FA_TILED_MIN_TOKENS &&
               q->type == GGML_TYPE_F32        &&
               k->type == v->type              &&
               (k->type == GGML_TYPE_F32 || k->type == GGML_TYPE_F16);

#if defined(GGML_SIMD) && !defined(__x86_64__) && !defined(_M_X64)
#if defined(__ARM_FEATURE_SVE)
    const int64_t f32_epr = svcntw();
#else
    const int64_t f32_epr = GGML_F32_EPR;
#endif
    res = res && v->ne[0] % f32_epr == 0;
#endif

    return res;
}

// the scratch of a thread, in floats
static size_t fa_tiled_scratch_size(int64_t DK, int64_t DV) {
    return FA_TILE_KV*(DK + DV) + 2*FA_TILE_Q*FA_TILE_KV + FA_TILE_PACK*DK + FA_TILE_N*FA_TILE_Q*(DK + DV);
}

size_t ggml_flash_attn_tiled_wdata_size(int n_tasks, const ggml_tensor * dst) {
    if (!fa_tiled_supported(dst)) {
        return 0;
    }
    // one cache line more for each thread to align its own
    return n_tasks*(fa_tiled_scratch_size(dst->src[1]->ne[0], dst->src[2]->ne[0]) + CACHE_LINE_SIZE_F32)*sizeof(float);
}

struct fa_tiled_scratch {
    float * K;    // [DK][FA_TILE_KV] a tile of K, transposed
    float * V;    // [FA_TILE_KV][DV] a tile of V
    float * KQ;   // [FA_TILE_Q][FA_TILE_KV] attention scores
    float * mask; // [FA_TILE_Q][FA_TILE_KV]
    float * rows; // [FA_TILE_PACK][DK] rows of K on their way to K
    float * base; // Q and VKQ of each of FA_TILE_N tiles

    fa_tiled_scratch(float * wdata, int64_t DK, int64_t DV) {
        // the GEMM reads whole cache lines, which the work buffer by itself is not aligned to
        K    = (float *) GGML_PAD((uintptr_t) wdata, CACHE_LINE_SIZE);
        V    = K    + FA_TILE_KV*DK;
        KQ   = V    + FA_TILE_KV*DV;
        mask = KQ   + FA_TILE_Q*FA_TILE_KV;
        rows = mask + FA_TILE_Q*FA_TILE_KV;
        base = rows + FA_TILE_PACK*DK;

        // the columns past the last cell
        memset(mask, 0, FA_TILE_Q*FA_TILE_KV*sizeof(float));
    }
};

// a tile of query rows, all of one head, and what is known of its output so far
struct fa_tiled_queries {
    int64_t iq1;
    int64_t iq2;
    int64_t iq3;

    int   rows;
    int   rows_pad;
    float slope;

    float * Q;   // [FA_TILE_Q][DK]
    float * VKQ; // [FA_TILE_Q][DV]

    // softmax
    float S[FA_TILE_Q];
    float M[FA_TILE_Q];
};

// K_f32[dk][kv]: the cells are contiguous, by way of some rows in F32
static void fa_tiled_pack_k(const char * k_data, size_t nbk1, ggml_type type, int kv_tile, int64_t DK, float * GGML_RESTRICT rows, float * GGML_RESTRICT K_f32) {
    for (int i0 = 0; i0 < kv_tile; i0 += FA_TILE_PACK) {
        const int n = MIN(FA_TILE_PACK, kv_tile - i0);

        for (int i = 0; i < n; i++) {
            const char * row = k_data + (i0 + i)*nbk1;
            if (type == GGML_TYPE_F16) {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, rows + i*DK, DK);
            } else {
                memcpy(rows + i*DK, row, DK*sizeof(float));
            }
        }

        for (int64_t dk = 0; dk < DK; dk++) {
            for (int i = 0; i < n; i++) {
                K_f32[dk*FA_TILE_KV + i0 + i] = rows[i*DK + dk];
            }
        }
    }
}

// V_f32[kv][dv], the rows past the last cell are zero, as the GEMM takes all of them
static void fa_tiled_pack_v(const char * v_data, size_t nbv1, ggml_type type, int kv_tile, int64_t DV, float * V_f32) {
    for (int i = 0; i < kv_tile; i++) {
        const char * row = v_data + i*nbv1;
        if (type == GGML_TYPE_F16) {
            ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, V_f32 + i*DV, DV);
        } else {
            memcpy(V_f32 + i*DV, row, DV*sizeof(float));
        }
    }
    memset(V_f32 + kv_tile*DV, 0, (FA_TILE_KV - kv_tile)*DV*sizeof(float));
}

// the part of the mask that a tile of queries and a tile of cells have in common
enum fa_tiled_mask {
    FA_TILED_MASK_NONE, // every query sees every cell
    FA_TILED_MASK_SOME,
    FA_TILED_MASK_ALL,  // no query sees a cell
};

// the mask of query tq of a tile
static const ggml_fp16_t * fa_tiled_mask_row(const ggml_tensor * mask, const fa_tiled_queries & tile, int tq) {
    return (const ggml_fp16_t *) ((const char *) mask->data + (tile.iq1 + tq)*mask->nb[1] +
        (tile.iq2%mask->ne[2])*mask->nb[2] + (tile.iq3%mask->ne[3])*mask->nb[3]);
}

// of the queries [r0, r1) of the tile, looked at as integers
static fa_tiled_mask fa_tiled_mask_kind(const ggml_tensor * mask, const fa_tiled_queries & tile, int r0, int r1, int64_t ic, int kv_tile) {
    const ggml_fp16_t neg_inf = GGML_CPU_FP32_TO_FP16(-INFINITY);

    ggml_fp16_t any  = 0; // a bit that is not zero
    ggml_fp16_t diff = 0; // a bit that is not as in -inf

    for (int tq = r0; tq < r1; tq++) {
        const ggml_fp16_t * mp = fa_tiled_mask_row(mask, tile, tq) + ic;

        for (int tk = 0; tk < kv_tile; tk++) {
            any  |= mp[tk];
            diff |= mp[tk] ^ neg_inf;
        }
    }

    return diff == 0 ? FA_TILED_MASK_ALL : any == 0 ? FA_TILED_MASK_NONE : FA_TILED_MASK_SOME;
}

// the rows from the first to the last that see a cell, as many at a time as the GEMM takes
static void fa_tiled_mask_rows(const ggml_tensor * mask, const fa_tiled_queries & tile, int64_t ic, int kv_tile, int & r0, int & r1) {
    const auto sees = [&](int tq) {
        return fa_tiled_mask_kind(mask, tile, tq, tq + 1, ic, kv_tile) != FA_TILED_MASK_ALL;
    };

    r0 = 0;
    while (r0 < tile.rows && !sees(r0)) {
        r0++;
    }
    r1 = tile.rows;
    while (r1 > r0 && !sees(r1 - 1)) {
        r1--;
    }

    r0 = r0/FA_TILE_ROWS*FA_TILE_ROWS;
    r1 = GGML_PAD(r1, FA_TILE_ROWS);
}

// attend with the rows [r0, r1) of a tile to the cells that are in the scratch. mask: nullptr: they see all of them
static void fa_tiled_attend(
        const fa_tiled_scratch & scratch,
              fa_tiled_queries & tile,
             const ggml_tensor * mask,
                       int64_t   ic,
                           int   kv_tile,
                           int   r0,
                           int   r1,
                       int64_t   DK,
                       int64_t   DV,
                         float   scale,
                         float   logit_softcap) {
    const int n_rows = r1 - r0;

    float * KQ     = scratch.KQ;
    float * mask32 = scratch.mask;

    float * S     = tile.S   + r0;
    float * M     = tile.M   + r0;
    float * VKQ32 = tile.VKQ + r0*DV;

    memset(KQ, 0, n_rows*FA_TILE_KV*sizeof(float));
    simd_gemm(KQ, tile.Q + r0*DK, scratch.K, n_rows, DK, FA_TILE_KV);
    ggml_vec_scale_f32(n_rows*FA_TILE_KV, KQ, scale);

    if (logit_softcap != 0.0f) {
        ggml_vec_tanh_f32(n_rows*FA_TILE_KV, KQ, KQ);
        ggml_vec_scale_f32(n_rows*FA_TILE_KV, KQ, logit_softcap);
    }

    // the columns past the last cell get no weight
    if (kv_tile < FA_TILE_KV) {
        for (int tq = 0; tq < n_rows; tq++) {
            for (int tk = kv_tile; tk < FA_TILE_KV; tk++) {
                KQ[tq*FA_TILE_KV + tk] = -INFINITY;
            }
        }
    }

    if (mask) {
        const int n_mask = MIN(r1, tile.rows) - r0;
        for (int tq = 0; tq < n_mask; tq++) {
            ggml_cpu_fp16_to_fp32(fa_tiled_mask_row(mask, tile, r0 + tq) + ic, mask32 + tq*FA_TILE_KV, kv_tile);
        }
        if (tile.slope != 1.0f) {
            ggml_vec_scale_f32(n_mask*FA_TILE_KV, mask32, tile.slope);
        }
        ggml_vec_add_f32(n_mask*FA_TILE_KV, KQ, KQ, mask32);
    }

    // online softmax
    // ref: https://arxiv.org/pdf/2112.05682.pdf
    bool skip[FA_TILE_Q] = {};

    for (int tq = 0; tq < n_rows; tq++) {
        float * kq_row = KQ + tq*FA_TILE_KV;

        float tile_max;
        ggml_vec_max_f32(FA_TILE_KV, &tile_max, kq_row);

        if (tile_max == -INFINITY) {
            skip[tq] = true;
            continue;
        }

        const float Mold = M[tq];
        const float Mnew = fmaxf(Mold, tile_max);

        if (Mnew > Mold) {
            const float ms = expf(Mold - Mnew);
            ggml_vec_scale_f32(DV, VKQ32 + tq*DV, ms);
            S[tq] *= ms;
        }
        M[tq] = Mnew;

        S[tq] += ggml_vec_soft_max_f32(FA_TILE_KV, kq_row, kq_row, Mnew);
    }

    for (int tq = 0; tq < n_rows; tq++) {
        if (skip[tq]) {
            memset(KQ + tq*FA_TILE_KV, 0, FA_TILE_KV*sizeof(float));
        }
    }

    // VKQ32 += softmax(KQ)*V
    simd_gemm(VKQ32, KQ, scratch.V, n_rows, FA_TILE_KV, DV);
}

// the tile's rows of dst. sink: nullptr or the learned logit of the head
static void fa_tiled_write(fa_tiled_queries & tile, const float * sink, int64_t DV, ggml_tensor * dst) {
    float * S     = tile.S;
    float * M     = tile.M;
    float * VKQ32 = tile.VKQ;

    if (sink) {
        const float s = *sink;

        for (int tq = 0; tq < tile.rows; tq++) {
            float ms = 1.0f;
            float vs = 1.0f;

            if (s > M[tq]) {
                ms = expf(M[tq] - s);
                ggml_vec_scale_f32(DV, VKQ32 + tq*DV, ms);
            } else {
                vs = expf(s - M[tq]);
            }

            S[tq] = S[tq]*ms + vs;
        }
    }

    const int64_t ne1 = dst->ne[1];
    const int64_t ne2 = dst->ne[2];
    const size_t  nb1 = dst->nb[1];

    for (int tq = 0; tq < tile.rows; tq++) {
        // V /= S
        const float S_inv = S[tq] == 0.0f ? 0.0f : 1.0f/S[tq];
        ggml_vec_scale_f32(DV, VKQ32 + tq*DV, S_inv);

        // permute(0, 2, 1, 3)
        memcpy((char *) dst->data + (tile.iq3*ne2*ne1 + tile.iq2 + (tile.iq1 + tq)*ne1)*nb1, VKQ32 + tq*DV, nb1);
    }
}

// the query rows [ir0, ir1), a chunk of one thread
static void fa_tiled_chunk(const ggml_compute_params * params, ggml_tensor * dst, int ir0, int ir1) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    GGML_TENSOR_LOCALS(int64_t, neq, q, ne)
    GGML_TENSOR_LOCALS(size_t,  nbq, q, nb)
    GGML_TENSOR_LOCALS(int64_t, nek, k, ne)
    GGML_TENSOR_LOCALS(size_t,  nbk, k, nb)
    GGML_TENSOR_LOCALS(int64_t, nev, v, ne)
    GGML_TENSOR_LOCALS(size_t,  nbv, v, nb)

    const int64_t DK = nek0;
    const int64_t DV = nev0;

    // broadcast factors
    const int64_t rk2 = neq2/nek2;
    const int64_t rk3 = neq3/nek3;

    const int64_t rv2 = neq2/nev2;
    const int64_t rv3 = neq3/nev3;

    float scale         = 1.0f;
    float max_bias      = 0.0f;
    float logit_softcap = 0.0f;

    memcpy(&scale,         (float *) dst->op_params + 0, sizeof(float));
    memcpy(&max_bias,      (float *) dst->op_params + 1, sizeof(float));
    memcpy(&logit_softcap, (float *) dst->op_params + 2, sizeof(float));

    if (logit_softcap != 0) {
        scale /= logit_softcap;
    }

    const uint32_t n_head      = neq2;
    const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2(n_head));

    const float m0 = powf(2.0f, -(max_bias       ) / n_head_log2);
    const float m1 = powf(2.0f, -(max_bias / 2.0f) / n_head_log2);

    const fa_tiled_scratch scratch((float *) params->wdata + params->ith*(fa_tiled_scratch_size(DK, DV) + CACHE_LINE_SIZE_F32), DK, DV);

    fa_tiled_queries tiles[FA_TILE_N];

    int ir = ir0;
    while (ir < ir1) {
        // k indices
        const int64_t ik3 = (ir/(neq2*neq1))/rk3;
        const int64_t ik2 = (ir/neq1%neq2)/rk2;

        // v indices
        const int64_t iv3 = (ir/(neq2*neq1))/rv3;
        const int64_t iv2 = (ir/neq1%neq2)/rv2;

        // the tiles that share K and V, of one query head or more
        int n_tiles = 0;

        while (n_tiles < FA_TILE_N && ir < ir1) {
            fa_tiled_queries & tile = tiles[n_tiles];

            // q indices for the start of this tile
            tile.iq3 = ir/(neq2*neq1);
            tile.iq2 = (ir - tile.iq3*neq2*neq1)/neq1;
            tile.iq1 = (ir - tile.iq3*neq2*neq1 - tile.iq2*neq1);

            if (tile.iq3/rk3 != ik3 || tile.iq2/rk2 != ik2 || tile.iq3/rv3 != iv3 || tile.iq2/rv2 != iv2) {
                break;
            }

            // up to the end of the tile, of the chunk and of the head
            tile.rows = MIN(FA_TILE_Q, MIN((int)(ir1 - ir), (int)(neq1 - tile.iq1)));
            GGML_ASSERT(tile.rows > 0);

            tile.rows_pad = GGML_PAD(tile.rows, FA_TILE_ROWS);

            const uint32_t h = tile.iq2; // head index
            tile.slope = (max_bias > 0.0f) ? h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_head_log2) + 1) : 1.0f;

            for (int i = 0; i < tile.rows_pad; ++i) {
                tile.S[i] = 0.;
                tile.M[i] = -INFINITY;
            }

            tile.Q   = scratch.base + n_tiles*FA_TILE_Q*(DK + DV);
            tile.VKQ = tile.Q + FA_TILE_Q*DK;

            memset(tile.VKQ, 0, tile.rows_pad*DV*sizeof(float));

            for (int tq = 0; tq < tile.rows; tq++) {
                const float * pq = (const float *) ((char *) q->data + ((tile.iq1 + tq)*nbq1 + tile.iq2*nbq2 + tile.iq3*nbq3));
                memcpy(tile.Q + tq*DK, pq, DK*sizeof(float));
            }
            for (int tq = tile.rows; tq < tile.rows_pad; tq++) {
                memset(tile.Q + tq*DK, 0, DK*sizeof(float));
            }

            ir += tile.rows;
            n_tiles++;
        }

        for (int64_t ic = 0; ic < nek1; ic += FA_TILE_KV) {
            const int kv_tile = (int) std::min((int64_t) FA_TILE_KV, nek1 - ic);

            bool packed = false;

            for (int it = 0; it < n_tiles; it++) {
                fa_tiled_queries & tile = tiles[it];

                const fa_tiled_mask mask_kind = mask ? fa_tiled_mask_kind(mask, tile, 0, tile.rows, ic, kv_tile) : FA_TILED_MASK_NONE;

                if (mask_kind == FA_TILED_MASK_ALL) {
                    continue;
                }

                // for the tiles of queries that follow too
                if (!packed) {
                    fa_tiled_pack_k((const char *) k->data + ic*nbk1 + ik2*nbk2 + ik3*nbk3, nbk1, k->type, kv_tile, DK, scratch.rows, scratch.K);
                    fa_tiled_pack_v((const char *) v->data + ic*nbv1 + iv2*nbv2 + iv3*nbv3, nbv1, v->type, kv_tile, DV, scratch.V);

                    packed = true;
                }

                if (mask_kind == FA_TILED_MASK_NONE) {
                    fa_tiled_attend(scratch, tile, nullptr, ic, kv_tile, 0, tile.rows_pad, DK, DV, scale, logit_softcap);
                } else {
                    int r0;
                    int r1;
                    fa_tiled_mask_rows(mask, tile, ic, kv_tile, r0, r1);
                    fa_tiled_attend(scratch, tile, mask, ic, kv_tile, r0, r1, DK, DV, scale, logit_softcap);
                }
            }
        }

        for (int it = 0; it < n_tiles; it++) {
            fa_tiled_write(tiles[it], sinks ? (const float *) sinks->data + tiles[it].iq2 : nullptr, DV, dst);
        }
    }
}

bool ggml_compute_forward_flash_attn_tiled(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !fa_tiled_supported(dst)) {
        return false;
    }

    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    const int64_t n_tokens = q->ne[1];
    const int64_t n_head   = q->ne[2];

    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(dst->ne[0] == v->ne[0]);
    GGML_ASSERT(dst->ne[2] == n_tokens);

    // rows must be contiguous
    GGML_ASSERT(q->nb[0] == ggml_type_size(q->type));
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));
    GGML_ASSERT(v->nb[0] == ggml_type_size(v->type));

    // dst cannot be transposed or permuted
    GGML_ASSERT(dst->nb[0] == sizeof(float));
    GGML_ASSERT(dst->nb[0] <= dst->nb[1]);
    GGML_ASSERT(dst->nb[1] <= dst->nb[2]);
    GGML_ASSERT(dst->nb[2] <= dst->nb[3]);

    const int nth = params->nth;

    const int64_t nr = n_tokens*n_head*q->ne[3];

    // up to 4 chunks per thread
    const int64_t chunk_size = (nr + nth*4 - 1)/(nth*4);

    int64_t nchunk = (nr + chunk_size - 1)/chunk_size;

    if (nth == 1 || nchunk < nth || ggml_is_numa()) {
        nchunk = nth;
    }

    // whole tiles, each chunk converts its K and V
    const int64_t n_rows = std::min<int64_t>(n_tokens, FA_TILE_Q);

    int64_t dr = (nr + nchunk - 1)/nchunk;
    dr     = (dr + n_rows - 1)/n_rows*n_rows;
    nchunk = (nr + dr - 1)/dr;

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }

    ggml_barrier(params->threadpool);

    int current_chunk = params->ith;

    while (current_chunk < nchunk) {
        const int64_t ir0 = dr*current_chunk;
        const int64_t ir1 = std::min(ir0 + dr, nr);

        fa_tiled_chunk(params, dst, ir0, ir1);

        current_chunk = ggml_threadpool_chunk_add(params->threadpool, 1);
    }

    return true;
}
