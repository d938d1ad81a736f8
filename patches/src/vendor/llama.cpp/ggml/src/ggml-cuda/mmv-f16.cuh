#pragma once

#include "common.cuh"

// The product of F16 weights with one vector, which the kernel can norm first.

bool ggml_cuda_should_use_mmv_f16(const ggml_tensor * src0, const ggml_tensor * src1);

// nrows: of the matrices of all products
void ggml_cuda_mmv_f16(
    const ggml_tensor * src0, const ggml_tensor * src1, const ggml_cuda_mm_fusion_args_device & fusion, ggml_tensor * dst,
    int64_t nrows, cudaStream_t stream);
