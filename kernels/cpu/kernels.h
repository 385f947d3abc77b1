// The functions of this library that others of its files call too.

#pragma once

#include "vectors.h"

extern "C" {

void rms_norm(int64_t dtype, const void* x, int64_t stride, const void* weight, float eps,
              void* out, int64_t rows, int64_t count);

void add_rms_norm(int64_t dtype, const void* x, int64_t stride, const void* residual,
                  int64_t residual_stride, const void* weight, float eps, void* out, void* total,
                  int64_t rows, int64_t count);

void silu_mul(int64_t dtype, const void* gate_up, void* out, int64_t rows, int64_t count);

void rotate_and_write(int64_t dtype, const void* qkv, const void* q_norm, const void* k_norm,
                      float eps, const float* cos, const float* sin, const int64_t* slots, void* kv,
                      int64_t block_stride, int64_t head_stride, int64_t value_offset,
                      int64_t block_size, void* queries, int64_t tokens, int64_t heads,
                      int64_t kv_heads, int64_t head_dim);

void decode_attention(int64_t dtype, const void* q, int64_t q_row_stride, int64_t q_head_stride,
                      const void* kv, int64_t block_stride, int64_t head_stride,
                      int64_t value_offset, int64_t block_size, int64_t head_dim,
                      const int32_t* tables, int64_t table_width, const int32_t* contexts,
                      int64_t rows, int64_t heads, int64_t kv_heads, float scale, int64_t window,
                      void* out);

void linear_bf16(const kvferry::BFloat16* x, int64_t stride, const uint32_t* panels,
                 const kvferry::BFloat16* bias, kvferry::BFloat16* out, int64_t rows,
                 int64_t features, int64_t outputs);

void linear_int8(int64_t dtype, const void* x, int64_t stride, const uint32_t* panels,
                 const float* scales, const int32_t* totals, const void* bias, void* out,
                 int64_t rows, int64_t features, int64_t outputs);

}  // extern "C"
