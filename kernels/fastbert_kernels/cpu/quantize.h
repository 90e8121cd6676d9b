// A row of floats in unsigned 8-bit numbers, x ~ scale * q + low; q is 0 at the row's least element and 255 at its
// largest. It is asymmetric: the output of a GELU lies on one side of 0, and would leave half of a symmetric range
// unused.
#pragma once

#include "linear_int8.h"

constexpr int64_t ROTATION = 32;  // elements in a block of the rotation
constexpr int64_t MAX_ROTATED = 4096;

// x @ H for the Hadamard matrix H of ROTATION rows, H[i][j] = -1 if i & j has an odd number of bits, else 1. A few
// channels of LayerNorm's output are several times as large as the others, and would make the step coarse for all; the
// rotation spreads them. low, high: elements 0 to 15, and 16 to 31.
#if VL == 16
INLINE vf butterflies(vf x) {
    const vf odd = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    const vf twos = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const vf fours = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const vf eights = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    x = x * odd + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    x = x * twos + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x = x * fours + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return x * eights + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

INLINE void rotate(vf& low, vf& high) {
    const vf sum = low + high, difference = low - high;
    low = butterflies(sum);
    high = butterflies(difference);
}

// The range of a row, from its least and largest element. total: of all its elements; it shows values that are not
// finite.
INLINE Affine affine_of(vf least_of, vf largest_of, vf total, float* inverse) {
    const float low = -largest(-least_of), range = largest(largest_of) - low, all = sum(total);
    const bool some = range > 1e-30f;
    *inverse = some ? 255.0f / range : 0.0f;
    const float scale = some ? range * (1.0f / 255.0f) : 0.0f;
    return {all - all == 0.0f ? scale : NAN, low};
}

// Rounds to nearest, ties to even.
INLINE void to_bytes(uint8_t* q, vf x, float low, float inverse, int64_t n) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)((x - low) * inverse));
    const __m128i bytes = _mm512_cvtusepi32_epi8(whole);
    memcpy(q, &bytes, n >= VL ? VL : n);
}

// n elements, a multiple of ROTATION, at `row` in floats; they are replaced by the rotated ones.
INLINE Affine quantize_rotated(float* row, int64_t n, uint8_t* q) {
    vf least_of = splat(INFINITY), largest_of = splat(-INFINITY), total = {};
    for (int64_t j = 0; j < n; j += 2 * VL) {
        vf low = load<vf>(row + j), high = load<vf>(row + j + VL);
        rotate(low, high);
        least_of = min(least_of, min(low, high));
        largest_of = max(largest_of, max(low, high));
        total += low + high;
        store(row + j, low);
        store(row + j + VL, high);
    }
    float inverse;
    const Affine affine = affine_of(least_of, largest_of, total, &inverse);
    for (int64_t j = 0; j < n; j += VL) to_bytes(q + j, load<vf>(row + j), affine.low, inverse, VL);
    return affine;
}

// n elements of T at x, unchanged.
template <typename T>
INLINE Affine quantize(const T* x, int64_t n, uint8_t* q) {
    vf least_of = splat(INFINITY), largest_of = splat(-INFINITY), total = {};
    for (int64_t j = 0; j < n; j += VL) {
        vf some = to_floats(x + j, n - j);
        if (n - j < VL)
            for (int64_t i = n - j; i < VL; i++) some[i] = some[0];
        least_of = min(least_of, some);
        largest_of = max(largest_of, some);
        total += some;
    }
    float inverse;
    const Affine affine = affine_of(least_of, largest_of, total, &inverse);
    for (int64_t j = 0; j < n; j += VL) to_bytes(q + j, to_floats(x + j, n - j), affine.low, inverse, n - j);
    return affine;
}
#endif
