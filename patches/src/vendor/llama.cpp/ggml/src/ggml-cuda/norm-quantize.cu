#include "norm-quantize.cuh"
#include "quantize.cuh"

static constexpr int NORM_QUANTIZE_THREADS = 256;

// every block reads the whole vector for its norm, and quantizes a part of it
static __global__ void norm_quantize_q8_1(const float * x, const float * w, const float eps, block_q8_1 * y, const int n) {
    const int i = blockIdx.x*NORM_QUANTIZE_THREADS + threadIdx.x;

    const float wi = i < n ? w[i] : 0.0f;

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    float sum_sq = 0.0f;
    for (int j = threadIdx.x; j < n; j += NORM_QUANTIZE_THREADS) {
        sum_sq += x[j]*x[j];
    }

    __shared__ float s_sum[32];
    sum_sq = block_reduce<block_reduce_method::SUM, NORM_QUANTIZE_THREADS>(sum_sq, s_sum);

    const float xi = i < n ? rsqrtf(sum_sq/n + eps)*x[i]*wi : 0.0f;

    const float amax = warp_reduce_max<QK8_1>(fabsf(xi));
    const float sum  = warp_reduce_sum<QK8_1>(xi);
    const float d    = amax/127.0f;

    y[i/QK8_1].qs[i % QK8_1] = amax == 0.0f ? 0 : roundf(xi/d);
    if (i % QK8_1 == 0) {
        y[i/QK8_1].ds = make_half2(d, sum);
    }
}

void ggml_cuda_norm_quantize_q8_1(const float * x, const float * w, float eps, void * y, int64_t n, cudaStream_t stream) {
    static_assert(MATRIX_ROW_PADDING % NORM_QUANTIZE_THREADS == 0, "a block must not reach past the padding");

    const dim3 block_nums(GGML_PAD(n, MATRIX_ROW_PADDING)/NORM_QUANTIZE_THREADS, 1, 1);
    const dim3 block_dims(NORM_QUANTIZE_THREADS, 1, 1);
    const ggml_cuda_kernel_launch_params launch_params = { block_nums, block_dims, 0, stream };

    ggml_cuda_kernel_launch(norm_quantize_q8_1, launch_params, x, w, eps, (block_q8_1 *) y, int(n));
}
