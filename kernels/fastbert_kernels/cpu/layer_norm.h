// LayerNorm of a row of n elements, T being float or bf16, from `x` into `out`, which may be x. Arithmetic is float32;
// the variance is the mean squared distance from the mean.
#pragma once

#include "vector.h"

constexpr int64_t MAX_HIDDEN = 4096;

// row: room for MAX_HIDDEN floats, which then holds what `out` does before it is rounded.
template <typename Read, typename T>
INLINE void normalize(Read x, T* out, const T* weight, const T* bias, int64_t n, float eps, float* row) {
    vf total = {};
    for (int64_t j = 0; j < n; j += VL) {
        vf value = x(j);
        store(row + j, value);  // 0 beyond the row
        total += value;
    }
    const float mean = sum(total) / n;
    vf squares = {};
    for (int64_t j = 0; j < n; j += VL) {
        vf off = load<vf>(row + j) - mean;
        if (n - j < VL)
            for (int64_t i = n - j; i < VL; i++) off[i] = 0.0f;
        squares += off * off;
    }
    const float factor = 1.0f / sqrtf(sum(squares) / n + eps);
    for (int64_t j = 0; j < n; j += VL) {
        vf y = (load<vf>(row + j) - mean) * factor * to_floats(weight + j, n - j) + to_floats(bias + j, n - j);
        store(row + j, y);
        from_floats(out + j, y, n - j);
    }
}
