#pragma once

#include "common.cuh"

// The norm of a vector, times its weights, in blocks of 8 bits, for a product with quantized weights.

// y: GGML_PAD(n, MATRIX_ROW_PADDING) values, those past n are 0
void ggml_cuda_norm_quantize_q8_1(const float * x, const float * w, float eps, void * y, int64_t n, cudaStream_t stream);
