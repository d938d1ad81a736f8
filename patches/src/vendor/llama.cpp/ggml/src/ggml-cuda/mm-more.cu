#include "mm-more.cuh"
#include "mmv-f16.cuh"
#include "mmvf.cuh"
#include "mmvq.cuh"

// a block never takes rows of two matrices
static constexpr int64_t MM_MORE_ROWS = 8;

// nodes in which products with the same vector are looked for
static constexpr int MM_MORE_RANGE = 32;

// a product, with the bias where there is one
struct mm_more_unit {
    ggml_tensor       * mm      = nullptr;
    const ggml_tensor * bias    = nullptr;
    ggml_tensor       * dst     = nullptr;
    int                 n_nodes = 0;
};

// the norm of a vector, with its weights
struct mm_more_norm {
    const ggml_tensor * x   = nullptr;
    const ggml_tensor * w   = nullptr;
    ggml_tensor       * dst = nullptr;
    float               eps = 0.0f;
};

bool ggml_cuda_mm_more_available() {
    const int cc = ggml_cuda_info().devices[ggml_cuda_get_device()].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && cc >= GGML_CUDA_CC_HOPPER;
}

static bool mm_more_is_weight(const ggml_tensor * tensor) {
    return tensor->op == GGML_OP_NONE && tensor->view_src == nullptr && tensor->buffer != nullptr &&
        ggml_backend_buffer_get_usage(tensor->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

static bool mm_more_get_unit(const ggml_cgraph * cgraph, int node_idx, mm_more_unit & unit) {
    ggml_tensor * mm = cgraph->nodes[node_idx];

    if (mm->op != GGML_OP_MUL_MAT || (mm->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return false;
    }

    const ggml_tensor * src0 = mm->src[0];
    const ggml_tensor * src1 = mm->src[1];

    if (!mm_more_is_weight(src0)) {
        return false;
    }
    if (ggml_nrows(src1) != 1 || src0->ne[2]*src0->ne[3] != 1 || src0->ne[1] % MM_MORE_ROWS != 0 || !ggml_is_contiguous(src0)) {
        return false;
    }
    if (!ggml_cuda_should_fuse_mul_mat_vec_f(mm) && !ggml_cuda_should_fuse_mul_mat_vec_q(mm)) {
        return false;
    }

    unit = { mm, nullptr, mm, 1 };

    if (ggml_can_fuse(cgraph, node_idx, { GGML_OP_MUL_MAT, GGML_OP_ADD })) {
        ggml_tensor       * add  = cgraph->nodes[node_idx + 1];
        const ggml_tensor * bias = add->src[0] == mm ? add->src[1] : add->src[0];

        // only what is known already can be added
        if (mm_more_is_weight(bias) && bias->type == GGML_TYPE_F32 && ggml_is_contiguous(bias) && ggml_are_same_shape(bias, mm)) {
            unit = { mm, bias, add, 2 };
            return true;
        }
    }

    // what else is added to the product, or scales it, is fused with it elsewhere
    if (node_idx + 1 < cgraph->n_nodes) {
        const ggml_tensor * next = cgraph->nodes[node_idx + 1];
        if ((next->op == GGML_OP_ADD || next->op == GGML_OP_MUL) && (next->src[0] == mm || next->src[1] == mm)) {
            return false;
        }
    }

    return true;
}

static bool mm_more_get_norm(const ggml_cgraph * cgraph, int node_idx, mm_more_norm & norm) {
    if (!ggml_can_fuse(cgraph, node_idx, { GGML_OP_RMS_NORM, GGML_OP_MUL })) {
        return false;
    }

    const ggml_tensor * rms = cgraph->nodes[node_idx];
    ggml_tensor       * mul = cgraph->nodes[node_idx + 1];

    norm.x   = rms->src[0];
    norm.w   = mul->src[0] == rms ? mul->src[1] : mul->src[0];
    norm.dst = mul;
    memcpy(&norm.eps, rms->op_params, sizeof(float));

    return ggml_nrows(norm.x) == 1 && norm.x->type == GGML_TYPE_F32 && ggml_is_contiguous(norm.x) &&
        mm_more_is_weight(norm.w) && norm.w->type == GGML_TYPE_F32 && ggml_is_contiguous(norm.w) &&
        ggml_are_same_shape(norm.w, norm.x) && (mul->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
}

static bool mm_more_same_vector(const mm_more_unit & a, const mm_more_unit & b) {
    return a.mm->src[1] == b.mm->src[1] && a.mm->src[0]->type == b.mm->src[0]->type && a.mm->op_params[0] == b.mm->op_params[0];
}

bool ggml_cuda_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a_data = (const char *) a->data;
    const char * b_data = (const char *) b->data;

    return a_data < b_data + ggml_nbytes(b) && b_data < a_data + ggml_nbytes(a);
}

void ggml_cuda_mm_more_reorder(ggml_cgraph * cgraph) {
    if (!ggml_cuda_mm_more_available()) {
        return;
    }

    for (int i = 0; i < cgraph->n_nodes; ++i) {
        mm_more_unit first;
        if (!mm_more_get_unit(cgraph, i, first)) {
            continue;
        }

        int n_more = 0;
        int end    = i + first.n_nodes;

        for (int j = end; j < std::min(i + MM_MORE_RANGE, cgraph->n_nodes) && n_more < GGML_CUDA_MM_MAX_MORE; ++j) {
            // gate and up are one kernel with their activation where they are
            if (ggml_can_fuse_subgraph(cgraph, j, { GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU }, { j + 2 })) {
                j++;
                continue;
            }

            mm_more_unit unit;
            if (!mm_more_get_unit(cgraph, j, unit) || !mm_more_same_vector(first, unit)) {
                continue;
            }

            // it depends on nothing but weights and the vector, which the first product has read
            std::rotate(cgraph->nodes + end, cgraph->nodes + j, cgraph->nodes + j + unit.n_nodes);
            end += unit.n_nodes;
            j   += unit.n_nodes - 1;
            n_more++;
        }

        i = end - 1;
    }
}

int ggml_cuda_mm_more_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int node_idx) {
    // a stream of its own for each product is upstream's way, see GGML_CUDA_GRAPH_OPT
    if (!ggml_cuda_mm_more_available() || ctx.curr_stream_no != 0) {
        return 0;
    }

    // a norm may be where these streams begin
    mm_more_norm norm;
    const bool has_norm = cgraph->nodes[node_idx]->op == GGML_OP_RMS_NORM && ctx.stream_context().concurrent_events.empty() &&
        mm_more_get_norm(cgraph, node_idx, norm);

    mm_more_unit units[1 + GGML_CUDA_MM_MAX_MORE];

    int n_units = 0;
    int end     = has_norm ? node_idx + 2 : node_idx;

    while (n_units < 1 + GGML_CUDA_MM_MAX_MORE && end < cgraph->n_nodes) {
        mm_more_unit & unit = units[n_units];
        if (!mm_more_get_unit(cgraph, end, unit) || (n_units > 0 && !mm_more_same_vector(units[0], unit))) {
            break;
        }

        // results are written while the vector is still read
        bool overlap = ggml_cuda_overlap(unit.dst, has_norm ? norm.x : unit.mm->src[1]);
        for (int i = 0; i < n_units; ++i) {
            overlap = overlap || ggml_cuda_overlap(unit.dst, units[i].dst);
        }
        if (overlap) {
            break;
        }

        end += unit.n_nodes;
        n_units++;
    }

    ggml_cuda_mm_fusion_args_host fusion{};
    ggml_tensor * dst = nullptr;

    if (has_norm) {
        // its result is not written, so that these products must be all that need it
        if (n_units == 0 || units[0].mm->src[1] != norm.dst || ggml_node_get_use_count(cgraph, node_idx + 1) != n_units) {
            return 0;
        }
        for (int i = 0; i < n_units; ++i) {
            if (!ggml_cuda_should_fuse_mul_mat_vec_q(units[i].mm) && !ggml_cuda_should_use_mmv_f16(units[i].mm->src[0], norm.x)) {
                return 0;
            }
        }

        if (n_units == 2 && units[0].n_nodes + units[1].n_nodes == 2 && end < cgraph->n_nodes && cgraph->nodes[end]->op == GGML_OP_GLU &&
                ggml_can_fuse_subgraph(cgraph, end - 2, { GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU }, { end })) {
            ggml_tensor       * glu  = cgraph->nodes[end];
            const ggml_tensor * gate = glu->src[0];
            const ggml_tensor * up   = glu->src[1];

            if (up == units[1].mm) {
                std::swap(units[0], units[1]);
            }
            if (up == units[0].mm && gate == units[1].mm && !ggml_cuda_overlap(glu, norm.x) &&
                    ggml_cuda_should_fuse_mul_mat(up, gate, glu)) {
                fusion.gate      = gate->src[0];
                fusion.glu_op    = ggml_get_glu_op(glu);
                fusion.glu_limit = ggml_get_op_params_f32(glu, 3);
                dst     = glu;
                n_units = 1;
                end++;
            }
        }

        fusion.norm_w   = norm.w;
        fusion.norm_eps = norm.eps;
    } else if (n_units < 2) {
        return 0;
    }

    if (dst == nullptr) {
        dst           = units[0].dst;
        fusion.x_bias = units[0].bias;
    }
    for (int i = 1; i < n_units; ++i) {
        fusion.more_x[i - 1]      = units[i].mm->src[0];
        fusion.more_x_bias[i - 1] = units[i].bias;
        fusion.more_dst[i - 1]    = units[i].dst;
    }

    const ggml_tensor * src0 = units[0].mm->src[0];
    const ggml_tensor * src1 = has_norm ? norm.x : units[0].mm->src[1];

    if (ggml_cuda_should_fuse_mul_mat_vec_f(units[0].mm)) {
        ggml_cuda_mul_mat_vec_f(ctx, src0, src1, nullptr, dst, &fusion);
    } else {
        ggml_cuda_mul_mat_vec_q(ctx, src0, src1, nullptr, dst, &fusion);
    }

    return end - node_idx - 1;
}

int64_t ggml_cuda_mm_more_args(
        const ggml_tensor * src0, const ggml_cuda_mm_fusion_args_host * host, ggml_cuda_mm_fusion_args_device & device) {
    int64_t nrows = src0->ne[1];

    if (host == nullptr) {
        return nrows;
    }

    if (host->norm_w != nullptr) {
        device.norm_w   = host->norm_w->data;
        device.norm_eps = host->norm_eps;
    }

    for (int i = 0; i < GGML_CUDA_MM_MAX_MORE && host->more_x[i] != nullptr; ++i) {
        const ggml_tensor * x = host->more_x[i];
        GGML_ASSERT(x->type == src0->type && x->ne[0] == src0->ne[0] && x->nb[1] == src0->nb[1]);

        device.more_x[i]      = x->data;
        device.more_x_bias[i] = host->more_x_bias[i] != nullptr ? host->more_x_bias[i]->data : nullptr;
        device.more_dst[i]    = host->more_dst[i]->data;
        device.more_row[i]    = nrows;

        nrows += x->ne[1];
    }

    return nrows;
}
