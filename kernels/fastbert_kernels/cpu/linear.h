// The functions of linear.cpp for the other kernels.
#pragma once

#include "team.h"

enum Activation { NONE, GELU, GELU_TANH, RELU, SILU };

// out = activation(x @ weight^T + bias) * factor + residual,    pre = x @ weight^T + bias
//
// bias, factor, residual and pre may be NULL; weight is packed. out may be residual or factor.
template <typename T>
struct Linear {
    const T *x, *weight, *bias, *residual;
    T* out;
    int64_t x_stride, residual_stride, out_stride;
    int64_t n_rows, k_size, n_columns;
    int64_t activation;
    T* pre = NULL;
    int64_t pre_stride = 0;
    const T* factor = NULL;
    int64_t factor_stride = 0;
};

void linear(const Linear<float>& call, const Team& team);
void linear(const Linear<bf16>& call, const Team& team);
