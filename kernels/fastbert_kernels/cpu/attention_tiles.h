// The forward and the backward pass of attention share these parts: the size of their tiles in registers, and the two
// orders in which products read a head's elements.
#pragma once

#include "philox.h"
#include "vector.h"

constexpr int ROWS = 6;                    // of a tile
constexpr int VECTORS = VL == 16 ? 4 : 2;  // of sums in registers, for each of them
constexpr int64_t DEPTH = 128;             // the longest chain of sums in a score, so that its rounding does not grow
constexpr float LOG2_E = 1.44269504f;

INLINE int64_t up(int64_t n, int64_t step) { return over(n, step) * step; }

// Scores beyond the first n belong to no key.
INLINE vf cut(vf scores, int64_t n) {
    vf lanes = {};
    for (int j = 0; j < VL; j++) lanes[j] = (float)j;
    return lanes < splat((float)n) ? scores : splat(-INFINITY);
}

// keep[i][w], rows of `stride` words: the mask of 64 columns from column + 64 w on in row + i. It is not inlined, since
// its constants would take the registers of the products beside it. masks is a copy, which no store to keep can change.
__attribute__((noinline, unused)) static void draw(uint64_t* keep, int64_t stride, Masks masks, int64_t row,
                                                   int64_t n_rows, int64_t column, int64_t n_columns) {
    for (int64_t i = 0; i < n_rows; i++)
        for (int64_t j = 0; j < n_columns; j += 64) keep[i * stride + j / 64] = masks.from(row + i, column + j);
}

// x in the lanes of VL columns from `column` on that a row of such bits keeps, and 0 in the others.
INLINE vf where(const uint64_t* keep, int64_t column, vf x) {
    uint16_t bits = 0;
    memcpy(&bits, (const char*)keep + column / 8, VL / 8);
    return where(bits, x);
}

// to[i][j] = factor * x_i y_j for ROWS rows and N vectors of columns, summed over the first n of depth elements, in
// chains of at most `most`.
template <int N, typename O>
__attribute__((noinline)) void products_in_parts(float* to, int64_t stride, const typename O::E* const* x,
                                                 const typename O::E* columns, int64_t depth, int64_t n, int64_t most,
                                                 float factor) {
    vf sums[ROWS][N] = {};
    for (int64_t start = 0; start < n; start += most) {
        const typename O::E* from[ROWS];
        for (int i = 0; i < ROWS; i++) from[i] = x[i] + start;
        vf part[ROWS][N] = {};
        products<ROWS, N, O>(part, from, columns + start * VL, least(n - start, most), VL, depth * VL);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < N; j++) sums[i][j] += part[i][j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < N; j++) store(to + i * stride + j * VL, sums[i][j] * factor);
}

// Rows k, (length, size), of size = depth * O::SIZE elements -> keys, [block of VL rows][depth][VL]. The rest of the
// last block is 0. Pairs of a head of few elements are read past its end, unless BOUNDED.
template <typename O, bool BOUNDED = false, typename T>
INLINE void pack_keys(typename O::E* keys, const T* k, int64_t length, int64_t n_blocks, int64_t depth,
                      int64_t row_stride) {
    for (int64_t block = 0; block < n_blocks; block++)
        for (int64_t d = 0; d < depth; d += VL) {
            vi tile[VL] = {};
            for (int64_t i = 0; i < VL && block * VL + i < length; i++) {
                const T* key = k + (block * VL + i) * row_stride + O::SIZE * d;
                if (BOUNDED && depth - d < VL) memcpy(&tile[i], key, (depth - d) * sizeof(int32_t));
                else tile[i] = O::SIZE == 2 ? load<vi>(key) : (vi)to_floats(key);
            }
            transpose(tile);
            for (int64_t j = 0; j < VL && d + j < depth; j++) store(keys + (block * depth + d + j) * VL, tile[j]);
        }
}

// Rows v, (length, size) -> values, [length / O::SIZE][size]. An odd row's partner is 0.
template <typename O, typename T>
INLINE void pack_values(typename O::E* values, const T* v, int64_t length, int64_t size, int64_t row_stride) {
    for (int64_t i = 0; i < length; i += O::SIZE)
        for (int64_t d = 0; d < size; d += VL, values += VL) {
            const T* value = v + i * row_stride + d;
            if (O::SIZE == 2) {
                vi low = __builtin_convertvector(load<vh>(value), vi), high = {};
                if (i + 1 < length) high = __builtin_convertvector(load<vh>(value + row_stride), vi);
                store(values, low | high << 16);
            } else {
                store(values, to_floats(value));
            }
        }
}
