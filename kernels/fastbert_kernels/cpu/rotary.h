// Rotary positions of one row, T being float or bf16: queries and keys are rotated by the row's angles.
//
//     a' = a cos - b sin,  b' = b cos + a sin    for elements i and i + D / 2 of a head
//
// The gradient is rotated back by the negative angles.
#pragma once

#include "rows.h"

// x: (3 * N * D), [q | k | v] -> the first two thirds of y, which may be x. cos, sin: (half,), half = D / 2.
template <bool BACK = false, typename T>
INLINE void rotate_row(const T* x, T* y, const float* cos, const float* sin, int64_t n_heads, int64_t half) {
    for (int64_t first = 0; first < 4 * n_heads * half; first += 2 * half)
        each_vector(half, [&](int64_t j, int64_t some) {
            const vf c = to_floats(cos + j, some), t = to_floats(sin + j, some), s = BACK ? -t : t;
            const vf a = to_floats(x + first + j, some), b = to_floats(x + first + half + j, some);
            from_floats(y + first + j, a * c - b * s, some);
            from_floats(y + first + half + j, b * c + a * s, some);
        });
}
