// LayerNorm of a row of n elements, T being float or bf16, from `x` into `out`, which may be x. Arithmetic is float32;
// the variance is the mean squared distance from the mean.
#pragma once

#include "vector.h"

constexpr int64_t MAX_HIDDEN = 4096;

struct Moments {
    float mean, rstd;
};

// x(j): elements j to j + VL, 0 beyond the row. write(j, y): takes their results. row: room for MAX_HIDDEN floats.
template <typename Read, typename Write, typename P>
INLINE Moments normalize_by(Read x, Write write, const P* weight, const P* bias, int64_t n, float eps, float* row) {
    vf total = {};
    for (int64_t j = 0; j < n; j += VL) {
        vf value = x(j);
        store(row + j, value);
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
    const float rstd = 1.0f / sqrtf(sum(squares) / n + eps);
    for (int64_t j = 0; j < n; j += VL)
        write(j, (load<vf>(row + j) - mean) * rstd * to_floats(weight + j, n - j) + to_floats(bias + j, n - j));
    return {mean, rstd};
}

// row: room for MAX_HIDDEN floats; at the end it holds `out` before rounding.
template <typename Read, typename T>
INLINE void normalize(Read x, T* out, const T* weight, const T* bias, int64_t n, float eps, float* row) {
    const auto write = [=](int64_t j, vf y) {
        store(row + j, y);
        from_floats(out + j, y, n - j);
    };
    normalize_by(x, write, weight, bias, n, eps, row);
}
