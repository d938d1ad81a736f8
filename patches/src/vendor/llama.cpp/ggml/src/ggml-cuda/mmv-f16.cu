#include "mmv-f16.cuh"
#include "mm-more.cuh"
#include "unary.cuh"

// A warp computes rows one after the other. The vector is held in shared memory, in two halves so that a warp reads it
// without bank conflicts. No kernel writes weights, so the first of them are asked for before the vector is waited for.

static constexpr int MMV_F16_NWARPS     = 8;
static constexpr int MMV_F16_NBLOCKS_SM = 3;     // what registers allow
static constexpr int MMV_F16_MAX_ROWS   = 4;     // of a warp
static constexpr int MMV_F16_MAX_COLS   = 12000; // shared memory of a block: 48 kB

// weights are read once and should push nothing out
static __device__ __forceinline__ int4 mmv_f16_load(const half * ptr, const int i) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    return ((const int4 *) ptr)[i];
#else
    return __ldcs((const int4 *) ptr + i);
#endif // defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
}

// n8: columns in groups of 8. nload: groups that a thread has on their way
template <int nload, bool has_gate, bool has_norm>
__launch_bounds__(MMV_F16_NWARPS*WARP_SIZE, MMV_F16_NBLOCKS_SM)
static __global__ void mul_mat_vec_f16(
        const half * x_ptr, const float * y_ptr, const ggml_cuda_mm_fusion_args_device fusion, float * dst_ptr,
        const int n8, const int stride_row, const int nrows, const int rows_per_warp) {
    constexpr int nthreads = MMV_F16_NWARPS*WARP_SIZE;

    const int tid      = threadIdx.x;
    const int lane     = tid % WARP_SIZE;
    const int row_beg  = (blockIdx.x*MMV_F16_NWARPS + tid/WARP_SIZE)*rows_per_warp;
    const int row_end  = min(row_beg + rows_per_warp, nrows);

    // the matrix of this row: its weights, bias and result
    const half  * x    = nullptr;
    const half  * gate = nullptr;
    const float * bias = nullptr;
    float       * dst  = nullptr;

    auto find = [&](const int row) {
        int i = -1;
        if constexpr (!has_gate) {
#pragma unroll
            for (int m = 0; m < GGML_CUDA_MM_MAX_MORE; ++m) {
                i = fusion.more_x[m] != nullptr && row >= fusion.more_row[m] ? m : i;
            }
        }
        const int r = i < 0 ? row : row - fusion.more_row[i];

        x    = (i < 0 ? x_ptr                          : (const half  *) fusion.more_x[i]) + int64_t(r)*stride_row;
        bias = i < 0 ? (const float *) fusion.x_bias   : (const float *) fusion.more_x_bias[i];
        bias = bias == nullptr ? nullptr : bias + r;
        dst  = (i < 0 ? dst_ptr                        : (float *) fusion.more_dst[i]) + r;
        if constexpr (has_gate) {
            gate = (const half *) fusion.gate + int64_t(r)*stride_row;
        }
    };

    int4 xr[nload];
    int4 gr[has_gate ? nload : 1];

    auto load = [&](const int u, const int i) {
        xr[u] = i < n8 ? mmv_f16_load(x, i) : make_int4(0, 0, 0, 0);
        if constexpr (has_gate) {
            gr[u] = i < n8 ? mmv_f16_load(gate, i) : make_int4(0, 0, 0, 0);
        }
    };

    if (row_beg < row_end) {
        find(row_beg);
#pragma unroll
        for (int u = 0; u < nload; ++u) {
            load(u, lane + u*WARP_SIZE);
        }
    }

    ggml_cuda_pdl_sync();

    extern __shared__ float4 y_shared[];
    float4 * y_lo = y_shared;
    float4 * y_hi = y_shared + n8;

    float sum_sq = 0.0f;
    for (int i = tid; i < n8; i += nthreads) {
        float4 y[2] = {((const float4 *) y_ptr)[2*i + 0], ((const float4 *) y_ptr)[2*i + 1]};
        if constexpr (has_norm) {
            const float4 w[2] = {((const float4 *) fusion.norm_w)[2*i + 0], ((const float4 *) fusion.norm_w)[2*i + 1]};
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                float & yk = ((float *) y)[k];
                sum_sq += yk*yk;
                yk     *= ((const float *) w)[k];
            }
        }
        y_lo[i] = y[0];
        y_hi[i] = y[1];
    }

    float scale = 1.0f;
    if constexpr (has_norm) {
        __shared__ float part[MMV_F16_NWARPS];
        sum_sq = warp_reduce_sum(sum_sq);
        if (lane == 0) {
            part[tid/WARP_SIZE] = sum_sq;
        }
        __syncthreads();
        sum_sq = 0.0f;
#pragma unroll
        for (int i = 0; i < MMV_F16_NWARPS; ++i) {
            sum_sq += part[i];
        }
        scale = rsqrtf(sum_sq/(8*n8) + fusion.norm_eps);
    } else {
        __syncthreads();
    }

    for (int row = row_beg; row < row_end; ++row) {
        float sum      = 0.0f;
        float sum_gate = 0.0f;

        const float * bias_row = bias;
        float       * dst_row  = dst;

        for (int first = 0; first < n8; first += nload*WARP_SIZE) {
            const bool last = first + nload*WARP_SIZE >= n8;
            const bool more = !last || row + 1 < row_end;
            const int  next = last ? 0 : first + nload*WARP_SIZE;

            if (last && more) {
                find(row + 1);
            }

#pragma unroll
            for (int u = 0; u < nload; ++u) {
                const int i = min(first + u*WARP_SIZE + lane, n8 - 1);
                const float4 y[2] = {y_lo[i], y_hi[i]};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float2 yk = ((const float2 *) y)[k];
                    const float2 xk = __half22float2(((const half2 *) &xr[u])[k]);
                    sum += xk.x*yk.x;
                    sum += xk.y*yk.y;
                    if constexpr (has_gate) {
                        const float2 gk = __half22float2(((const half2 *) &gr[u])[k]);
                        sum_gate += gk.x*yk.x;
                        sum_gate += gk.y*yk.y;
                    }
                }
                if (more) {
                    load(u, next + u*WARP_SIZE + lane);
                }
            }
        }

        sum = scale*warp_reduce_sum(sum);
        if constexpr (has_gate) {
            sum_gate = scale*warp_reduce_sum(sum_gate);
        }

        if (lane == 0) {
            if (bias_row != nullptr) {
                sum += *bias_row;
            }
            if constexpr (has_gate) {
                if (fusion.gate_bias != nullptr) {
                    sum_gate += ((const float *) fusion.gate_bias)[row];
                }
                switch (fusion.glu_op) {
                    case GGML_GLU_OP_SWIGLU:
                        sum *= ggml_cuda_op_silu_single(sum_gate);
                        break;
                    case GGML_GLU_OP_GEGLU:
                        sum *= ggml_cuda_op_gelu_single(sum_gate);
                        break;
                    case GGML_GLU_OP_SWIGLU_OAI:
                        sum = ggml_cuda_op_swiglu_oai_single(sum_gate, sum);
                        break;
                    case GGML_GLU_OP_SWIGLU_CLAMP:
                        sum = ggml_cuda_op_swiglu_clamp_single(sum_gate, sum, fusion.glu_limit);
                        break;
                    default:
                        break;
                }
            }
            *dst_row = sum;
        }
    }

    ggml_cuda_pdl_lc();
}

template <int nload, bool has_gate>
static void mul_mat_vec_f16_cuda(
        const half * x, const float * y, const ggml_cuda_mm_fusion_args_device & fusion, float * dst,
        const int ncols, const int nrows, const int stride_row, cudaStream_t stream) {
    const int nsm            = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    const int nwarps         = nsm*MMV_F16_NBLOCKS_SM*MMV_F16_NWARPS;
    const int rows_per_warp  = std::min((nrows + nwarps - 1)/nwarps, MMV_F16_MAX_ROWS);
    const int rows_per_block = rows_per_warp*MMV_F16_NWARPS;

    const dim3 block_nums((nrows + rows_per_block - 1)/rows_per_block, 1, 1);
    const dim3 block_dims(MMV_F16_NWARPS*WARP_SIZE, 1, 1);

    const ggml_cuda_kernel_launch_params launch_params = { block_nums, block_dims, ncols*sizeof(float), stream };

    const auto launch = [&](auto kernel) {
        ggml_cuda_kernel_launch(kernel, launch_params, x, y, fusion, dst, ncols/8, stride_row, nrows, rows_per_warp);
    };

    if (fusion.norm_w != nullptr) {
        launch(mul_mat_vec_f16<nload, has_gate, true>);
    } else {
        launch(mul_mat_vec_f16<nload, has_gate, false>);
    }
}

bool ggml_cuda_should_use_mmv_f16(const ggml_tensor * src0, const ggml_tensor * src1) {
    return ggml_cuda_mm_more_available() && src0->type == GGML_TYPE_F16 && src0->buffer != nullptr &&
        ggml_backend_buffer_get_usage(src0->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
        src0->ne[0] % 8 == 0 && src0->ne[0] <= MMV_F16_MAX_COLS && src0->ne[2]*src0->ne[3] == 1 && ggml_is_contiguous(src0) &&
        ggml_nrows(src1) == 1 && ggml_is_contiguous(src1) &&
        (uintptr_t(src0->data) | uintptr_t(src1->data)) % sizeof(int4) == 0;
}

void ggml_cuda_mmv_f16(
        const ggml_tensor * src0, const ggml_tensor * src1, const ggml_cuda_mm_fusion_args_device & fusion, ggml_tensor * dst,
        int64_t nrows, cudaStream_t stream) {
    const half  * x = (const half  *) src0->data;
    const float * y = (const float *) src1->data;

    const int64_t ncols = src0->ne[0];

    if (fusion.gate != nullptr) {
        mul_mat_vec_f16_cuda<4, true >(x, y, fusion, (float *) dst->data, ncols, nrows, ncols, stream);
    } else {
        mul_mat_vec_f16_cuda<8, false>(x, y, fusion, (float *) dst->data, ncols, nrows, ncols, stream);
    }
}
