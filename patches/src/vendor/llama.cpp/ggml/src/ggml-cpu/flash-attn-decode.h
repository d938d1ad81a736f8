#pragma once

// Flash attention for few query rows against a long KV cache, called by ops.cpp

#include <stddef.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Amount of wdata that the decode kernel wants for this op, 0 if it does not serve it
size_t ggml_flash_attn_decode_wdata_size(int n_tasks, const struct ggml_tensor * dst);

// GGML_OP_FLASH_ATTN_EXT with few query rows: returns true if the op was computed here,
// false to fall through to the other paths
bool ggml_compute_forward_flash_attn_decode(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
