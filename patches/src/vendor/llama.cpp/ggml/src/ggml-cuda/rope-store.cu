#include "mm-more.cuh"
#include "rope-store.cuh"
#include "rope.cuh"

// with more tokens the rows fill the GPU, and a launch more or less does not matter
static constexpr int64_t ROPE_STORE_MAX_TOKENS = 8;
static constexpr int     ROPE_STORE_WARPS      = 4;

// the heads of Q, K or V
struct rope_store_part {
    const float   * x       = nullptr;
    int64_t         s_head  = 0;
    int64_t         s_token = 0;
    const float   * norm_w  = nullptr; // no norm without
    float           eps     = 0.0f;
    char          * dst     = nullptr;
    int64_t         nb_head = 0;
    int64_t         nb_row  = 0;
    const int64_t * rows    = nullptr; // those of the cache, for each token
    int             n_heads = 0;
};

struct rope_store_parts {
    rope_store_part part[3]; // Q, K, V
};

struct rope_store_rotation {
    int             n_dims       = 0;
    const int32_t * pos          = nullptr;
    const float   * freq_factors = nullptr;
    float           freq_scale   = 0.0f;
    float           ext_factor   = 0.0f;
    float           attn_factor  = 0.0f;
    float           theta_scale  = 0.0f;
    rope_corr_dims  corr_dims    = {};
    bool            is_neox      = false;
};

// a warp for each head
__launch_bounds__(ROPE_STORE_WARPS*WARP_SIZE, 1)
static __global__ void rope_store(const rope_store_parts parts, const rope_store_rotation rotation, const int ncols) {
    const int token = blockIdx.y;
    const int lane  = threadIdx.x;

    int head = blockIdx.x*ROPE_STORE_WARPS + threadIdx.y;
    int i    = 0;
    while (i < 3 && head >= parts.part[i].n_heads) {
        head -= parts.part[i].n_heads;
        i++;
    }
    if (i == 3) {
        return;
    }

    const rope_store_part & part = parts.part[i];

    const bool is_q    = i == 0;
    const int  n_dims  = i == 2 ? 0 : rotation.n_dims;
    const bool is_neox = rotation.is_neox;

    const float * x = part.x + token*part.s_token + head*part.s_head;
    const float * w = part.norm_w;

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    float scale = 1.0f;
    if (w != nullptr) {
        float sum = 0.0f;
        for (int col = lane; col < ncols; col += WARP_SIZE) {
            sum += x[col]*x[col];
        }
        scale = rsqrtf(warp_reduce_sum(sum)/ncols + part.eps);
    }

    char * dst = part.dst + head*part.nb_head + (is_q ? token : part.rows[token])*part.nb_row;

    auto store = [&](const int col, const float value) {
        if (is_q) {
            ((float *) dst)[col] = value;
        } else {
            ((half *) dst)[col] = __float2half(value);
        }
    };

    for (int i0 = 2*lane; i0 < ncols; i0 += 2*WARP_SIZE) {
        const bool is_rotated = i0 < n_dims;

        const int ix0 = is_rotated && is_neox ? i0/2            : i0;
        const int ix1 = is_rotated && is_neox ? i0/2 + n_dims/2 : i0 + 1;

        float x0 = x[ix0];
        float x1 = x[ix1];

        if (w != nullptr) {
            x0 = scale*x0*w[ix0];
            x1 = scale*x1*w[ix1];
        }

        if (!is_rotated) {
            store(ix0, x0);
            store(ix1, x1);
            continue;
        }

        const float theta_base  = rotation.pos[token]*powf(rotation.theta_scale, i0/2.0f);
        const float freq_factor = rotation.freq_factors != nullptr ? rotation.freq_factors[i0/2] : 1.0f;

        float cos_theta;
        float sin_theta;
        rope_yarn<true>(theta_base/freq_factor, rotation.freq_scale, rotation.corr_dims, i0, rotation.ext_factor, rotation.attn_factor,
            cos_theta, sin_theta);

        store(ix0, x0*cos_theta - x1*sin_theta);
        store(ix1, x0*sin_theta + x1*cos_theta);
    }
}

// a rotation, with the norm in front of it where there is one
struct rope_store_rope {
    const ggml_tensor * x      = nullptr;
    const ggml_tensor * norm_w = nullptr;
    ggml_tensor       * rope   = nullptr;
    float               eps    = 0.0f;
    int                 end    = 0;
};

static int rope_store_skip_views(const ggml_cgraph * cgraph, int node_idx) {
    while (node_idx < cgraph->n_nodes && ggml_cuda_is_view_or_noop(cgraph->nodes[node_idx])) {
        node_idx++;
    }
    return node_idx;
}

static bool rope_store_get_rope(const ggml_cgraph * cgraph, int node_idx, rope_store_rope & unit) {
    const bool has_norm = ggml_can_fuse(cgraph, node_idx, { GGML_OP_RMS_NORM, GGML_OP_MUL, GGML_OP_ROPE });

    ggml_tensor * rope = cgraph->nodes[node_idx + (has_norm ? 2 : 0)];
    if (rope->op != GGML_OP_ROPE || (rope->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return false;
    }

    unit = { rope->src[0], nullptr, rope, 0.0f, node_idx + (has_norm ? 3 : 1) };

    if (has_norm) {
        const ggml_tensor * rms = cgraph->nodes[node_idx];
        const ggml_tensor * mul = cgraph->nodes[node_idx + 1];

        if (!ggml_cuda_should_fuse_rms_norm_mul_rope(rms, mul, rope)) {
            return false;
        }

        unit.x      = rms->src[0];
        unit.norm_w = mul->src[0] == rms ? mul->src[1] : mul->src[0];
        memcpy(&unit.eps, rms->op_params, sizeof(float));

        if (ggml_nelements(unit.norm_w) != rope->ne[0]) {
            return false;
        }
    }

    const int n_dims = ggml_get_op_params_i32(rope, 1);
    const int mode   = ggml_get_op_params_i32(rope, 2);
    const int n_offs = ggml_get_op_params_i32(rope, 15);

    return (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) && n_offs == 0 && n_dims % 2 == 0 &&
        rope->type == GGML_TYPE_F32 && unit.x->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(unit.x) && ggml_is_contiguous_rows(rope) &&
        rope->ne[0] % 2 == 0 && rope->ne[2] <= ROPE_STORE_MAX_TOKENS && rope->ne[3] == 1;
}

// whether rows of floats, one for each token, go into the cache as they are
static bool rope_store_is_store(const ggml_tensor * set_rows, const int64_t n_tokens) {
    const ggml_tensor * x    = set_rows->src[0];
    const ggml_tensor * rows = set_rows->src[1];

    return set_rows->op == GGML_OP_SET_ROWS && (set_rows->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
        set_rows->type == GGML_TYPE_F16 &&
        x->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(x) && x->ne[1] == n_tokens && x->ne[2]*x->ne[3] == 1 &&
        rows->type == GGML_TYPE_I64 && ggml_is_contiguous(rows) && ggml_nelements(rows) == n_tokens &&
        set_rows->ne[2]*set_rows->ne[3] == 1;
}

static bool rope_store_is_in_place(const ggml_tensor * dst, const ggml_tensor * x) {
    return dst->data == x->data && dst->nb[1] == x->nb[1] && dst->nb[2] == x->nb[2];
}

static const ggml_tensor * rope_store_root(const ggml_tensor * tensor) {
    return tensor->view_src != nullptr ? tensor->view_src : tensor;
}

static rope_store_part rope_store_rotated(const rope_store_rope & unit) {
    rope_store_part part;

    part.x       = (const float *) unit.x->data;
    part.s_head  = unit.x->nb[1]/sizeof(float);
    part.s_token = unit.x->nb[2]/sizeof(float);
    part.norm_w  = unit.norm_w != nullptr ? (const float *) unit.norm_w->data : nullptr;
    part.eps     = unit.eps;
    part.dst     = (char *) unit.rope->data;
    part.nb_head = unit.rope->nb[1];
    part.nb_row  = unit.rope->nb[2];
    part.n_heads = unit.rope->ne[1];

    return part;
}

static void rope_store_into(rope_store_part & part, const ggml_tensor * set_rows, const int64_t ncols) {
    part.dst     = (char *) set_rows->data;
    part.nb_head = ncols*sizeof(half);
    part.nb_row  = set_rows->nb[1];
    part.rows    = (const int64_t *) set_rows->src[1]->data;
}

int ggml_cuda_rope_store_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int node_idx) {
    // a stream of its own for each of Q, K and V is upstream's way, see GGML_CUDA_GRAPH_OPT
    if (ctx.curr_stream_no != 0) {
        return 0;
    }

    rope_store_rope q;
    if (!rope_store_get_rope(cgraph, node_idx, q)) {
        return 0;
    }

    const int k_idx = rope_store_skip_views(cgraph, q.end);
    if (k_idx >= cgraph->n_nodes) {
        return 0;
    }

    rope_store_rope k;
    if (!rope_store_get_rope(cgraph, k_idx, k)) {
        return 0;
    }

    const int64_t ncols    = q.rope->ne[0];
    const int64_t n_tokens = q.rope->ne[2];

    // K is needed in the cache alone
    if (k.norm_w != nullptr) {
        if (!ggml_can_fuse_subgraph(cgraph, k_idx, { GGML_OP_RMS_NORM, GGML_OP_MUL, GGML_OP_ROPE, GGML_OP_VIEW, GGML_OP_SET_ROWS }, { k_idx + 4 })) {
            return 0;
        }
    } else {
        if (!ggml_can_fuse_subgraph(cgraph, k_idx, { GGML_OP_ROPE, GGML_OP_VIEW, GGML_OP_SET_ROWS }, { k_idx + 2 })) {
            return 0;
        }
    }

    const ggml_tensor * k_view  = cgraph->nodes[k.end];
    const ggml_tensor * k_store = cgraph->nodes[k.end + 1];

    const int v_idx = rope_store_skip_views(cgraph, k.end + 2);
    if (v_idx >= cgraph->n_nodes) {
        return 0;
    }

    const ggml_tensor * v_store = cgraph->nodes[v_idx];

    if (!rope_store_is_store(k_store, n_tokens) || !rope_store_is_store(v_store, n_tokens)) {
        return 0;
    }

    const ggml_tensor * v = v_store->src[0];

    const bool is_same_rotation = q.rope->src[1] == k.rope->src[1] && q.rope->src[2] == k.rope->src[2] &&
        memcmp(q.rope->op_params, k.rope->op_params, sizeof(q.rope->op_params)) == 0;

    if (!is_same_rotation || k_view->view_src != k.rope || k_store->src[0] != k_view || !ggml_is_contiguous(k_view) ||
            k_view->ne[0] != ncols*k.rope->ne[1] || k.rope->ne[0] != ncols || k.rope->ne[2] != n_tokens ||
            v->ne[0] % ncols != 0) {
        return 0;
    }

    // K and V are read before they are computed otherwise
    for (int i = node_idx; i < v_idx; ++i) {
        const ggml_tensor * node = cgraph->nodes[i];
        if (node == rope_store_root(v) || (i < k_idx && node == rope_store_root(k.x))) {
            return 0;
        }
    }
    if (ggml_cuda_overlap(q.rope, k.x) || ggml_cuda_overlap(q.rope, v) ||
            (ggml_cuda_overlap(q.rope, q.x) && !rope_store_is_in_place(q.rope, q.x))) {
        return 0;
    }

    rope_store_parts parts;

    parts.part[0] = rope_store_rotated(q);
    parts.part[1] = rope_store_rotated(k);
    rope_store_into(parts.part[1], k_store, ncols);

    parts.part[2].x       = (const float *) v->data;
    parts.part[2].s_head  = ncols;
    parts.part[2].s_token = v->nb[1]/sizeof(float);
    parts.part[2].n_heads = v->ne[0]/ncols;
    rope_store_into(parts.part[2], v_store, ncols);

    float freq_base;
    float beta_fast;
    float beta_slow;

    rope_store_rotation rotation;

    memcpy(&freq_base,            q.rope->op_params +  5, sizeof(float));
    memcpy(&rotation.freq_scale,  q.rope->op_params +  6, sizeof(float));
    memcpy(&rotation.ext_factor,  q.rope->op_params +  7, sizeof(float));
    memcpy(&rotation.attn_factor, q.rope->op_params +  8, sizeof(float));
    memcpy(&beta_fast,            q.rope->op_params +  9, sizeof(float));
    memcpy(&beta_slow,            q.rope->op_params + 10, sizeof(float));

    rotation.n_dims       = ggml_get_op_params_i32(q.rope, 1);
    rotation.pos          = (const int32_t *) q.rope->src[1]->data;
    rotation.freq_factors = q.rope->src[2] != nullptr ? (const float *) q.rope->src[2]->data : nullptr;
    rotation.theta_scale  = powf(freq_base, -2.0f/rotation.n_dims);
    rotation.is_neox      = ggml_get_op_params_i32(q.rope, 2) & GGML_ROPE_TYPE_NEOX;

    ggml_rope_yarn_corr_dims(rotation.n_dims, ggml_get_op_params_i32(q.rope, 4), freq_base, beta_fast, beta_slow, rotation.corr_dims.v);

    const int n_heads = parts.part[0].n_heads + parts.part[1].n_heads + parts.part[2].n_heads;

    const dim3 block_dims(WARP_SIZE, ROPE_STORE_WARPS, 1);
    const dim3 block_nums((n_heads + ROPE_STORE_WARPS - 1)/ROPE_STORE_WARPS, n_tokens, 1);
    const ggml_cuda_kernel_launch_params launch_params = { block_nums, block_dims, 0, ctx.stream() };

    ggml_cuda_kernel_launch(rope_store, launch_params, parts, rotation, int(ncols));

    return v_idx - node_idx;
}
