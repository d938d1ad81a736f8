#pragma once

// Matrix products of quantized weights, a few columns at a time, called by ggml-cpu.c

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// true if this GGML_OP_MUL_MAT is computed by ggml_mul_mat_few_rows()
bool ggml_mul_mat_few_serves(const struct ggml_tensor * dst);

// rows [ir0, ir1) of columns [ic0, ic1) of dst
// cols: the columns of src1 as the vec_dot_type of the weights, row_size bytes each
void ggml_mul_mat_few_rows(struct ggml_tensor * dst, const void * cols, size_t row_size, int64_t ir0, int64_t ir1, int64_t ic0, int64_t ic1);

#ifdef __cplusplus
}
#endif
