// The functions of linear_int8.cpp for the other kernels, if the processor has VNNI.
#pragma once

#include "linear.h"

// A row of unsigned 8-bit numbers q stands for scale * q + low.
struct Affine {
    float scale, low;
};

// out = activation(x @ weight^T + bias) * factor + residual; see linear_int8.cpp. factor and residual may be NULL.
template <typename T, typename O>
struct LinearInt8 {
    const uint8_t* x;
    const Affine* affine;  // of x's rows
    const int8_t* weight;  // packed
    const float* columns;  // see linear_int8.cpp
    const T* residual;
    O* out;
    int64_t x_stride, residual_stride, out_stride;
    int64_t n_rows, k_size, n_columns;
    int64_t activation;
    const T* factor = NULL;
    int64_t factor_stride = 0;
};

void linear_int8(const LinearInt8<float, float>& call, const Team& team);
void linear_int8(const LinearInt8<bf16, bf16>& call, const Team& team);
void linear_int8(const LinearInt8<bf16, float>& call, const Team& team);

// Rows of x are read past their end up to a multiple of this. The values there do not matter.
constexpr int64_t STEP_INT8 = 4;
