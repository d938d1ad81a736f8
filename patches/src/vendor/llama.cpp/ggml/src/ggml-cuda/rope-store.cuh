#pragma once

#include "common.cuh"

// Rotation of Q and K, with their norms, and storing of K and V in the cache: one kernel for the few rows of a token that is decoded.

// in ggml-cuda.cu
bool ggml_cuda_is_view_or_noop(const ggml_tensor * t);
bool ggml_cuda_should_fuse_rms_norm_mul_rope(const ggml_tensor * rms_norm, const ggml_tensor * mul, const ggml_tensor * rope);

// compute the rotation of Q that begins at node_idx, and what follows of K and V
// returns the number of further nodes that this has computed
int ggml_cuda_rope_store_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int node_idx);
