#pragma once

// Matrix products of quantized weights, a few columns at a time, called by ggml-cpu.c

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// true if n_cols columns of this GGML_OP_MUL_MAT, or of an expert of this GGML_OP_MUL_MAT_ID, are computed by ggml_mul_mat_few_rows()
bool ggml_mul_mat_few_serves(const struct ggml_tensor * dst, int64_t n_cols);

// rows [ir0, ir1) of columns [ic0, ic1): of dst, or of those that an expert has in it
// cols: all columns of src1 as the vec_dot_type of the weights, row_size bytes each, one behind another
// expert_cols: for each column of the expert, where it is in dst (dimensions 1 and 2); NULL for GGML_OP_MUL_MAT, whose expert is 0
void ggml_mul_mat_few_rows(
        struct ggml_tensor * dst, const void * cols, size_t row_size, int64_t expert, const int32_t * expert_cols,
        int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1);

#ifdef __cplusplus
}
#endif
