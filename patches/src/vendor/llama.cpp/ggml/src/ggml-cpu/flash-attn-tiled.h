#pragma once

// Flash attention for many query rows, called by ops.cpp

#include <stddef.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Amount of wdata that the tiled kernel wants for this op, 0 if it does not serve it
size_t ggml_flash_attn_tiled_wdata_size(int n_tasks, const struct ggml_tensor * dst);

// GGML_OP_FLASH_ATTN_EXT with many query rows: returns true if the op was computed here,
// false to fall through to the other paths
bool ggml_compute_forward_flash_attn_tiled(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
