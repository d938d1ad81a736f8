#pragma once

#include "common.cuh"

// Products of several weight matrices with one vector, as of Q, K and V with the input of a layer, in one kernel.

// in ggml-cuda.cu
bool ggml_cuda_should_fuse_mul_mat_vec_f(const ggml_tensor * tensor);
bool ggml_cuda_should_fuse_mul_mat_vec_q(const ggml_tensor * tensor);
bool ggml_cuda_should_fuse_mul_mat(
    const ggml_tensor * ffn_up, const ggml_tensor * ffn_gate, const ggml_tensor * glu,
    const ggml_tensor * ffn_up_bias = nullptr, const ggml_tensor * ffn_gate_bias = nullptr,
    const ggml_tensor * ffn_up_scale = nullptr, const ggml_tensor * ffn_gate_scale = nullptr);

// whether two tensors share memory
bool ggml_cuda_overlap(const ggml_tensor * a, const ggml_tensor * b);

// whether the current device is of those that compute so
bool ggml_cuda_mm_more_available();

// bring products with the same vector together, before memory is planned
void ggml_cuda_mm_more_reorder(ggml_cgraph * cgraph);

// compute the products with the same vector that begin at node_idx, or with a norm of it in front
// returns the number of further nodes that this has computed
int ggml_cuda_mm_more_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int node_idx);

// pass further products and the norm on to the kernel
// returns the number of rows of all matrices
int64_t ggml_cuda_mm_more_args(
    const ggml_tensor * src0, const ggml_cuda_mm_fusion_args_host * host, ggml_cuda_mm_fusion_args_device & device);
