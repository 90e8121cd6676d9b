// The layout of the weights in linears: panels of columns, and in each panel one step of the sums after the other.
//
//     [panel][step][COLUMNS]    a word for each column: a float, or the two bfloat16 of a step, even one first
//
// It is filled up with zeros.
#pragma once

#include "vector.h"

constexpr int VECTORS = VL == 16 ? 3 : 2;
constexpr int COLUMNS = VECTORS * VL;
constexpr int ROWS = VL == 16 ? 8 : 6;  // of a tile, beside COLUMNS

INLINE int64_t at_least_1(int64_t n) { return n < 1 ? 1 : n; }

// N words from row p of a matrix and, for pairs, from row q. For pairs float32 is rounded to bfloat16. For words of one
// element bfloat16 becomes float32.
template <int N>
INLINE void copy_words(float* to, const float* p, const float*) {
    memcpy(to, p, N * sizeof(float));
}

template <int N>
INLINE void copy_words(float* to, const bf16* p, const bf16*) {
    for (int j = 0; j < N; j++) {
        const uint32_t word = (uint32_t)p[j] << 16;
        memcpy(to + j, &word, sizeof word);
    }
}

template <int N>
INLINE void copy_words(int32_t* to, const bf16* p, const bf16* q) {
    for (int j = 0; j < N; j++) to[j] = p[j] | (uint32_t)q[j] << 16;
}

INLINE vi rounded(const float* p) {
    bf16 some[VL];
    from_floats(some, to_floats(p));
    return __builtin_convertvector(load<vh>(some), vi);
}

template <int N>
INLINE void copy_words(int32_t* to, const float* p, const float* q) {
    for (int j = 0; j < N; j += VL) store(to + j, rounded(p + j) | rounded(q + j) << 16);
}

// The same if only the first n of N columns exist, with zeros for a row that is NULL.
template <int N, typename E, typename T>
INLINE void copy_some_words(E* to, const T* p, const T* q, int64_t n) {
    T even[N] = {}, odd[N] = {};
    memcpy(even, p, n * sizeof(T));
    if (q != NULL) memcpy(odd, q, n * sizeof(T));
    copy_words<N>(to, even, odd);
}

// A panel of N columns whose steps are rows first to first + n of a matrix. row(i): the address of row i, from the
// panel's first column on; n_columns: how many exist from there on.
template <int N, typename O, typename R>
INLINE void pack_rows(typename O::E* to, R row, int64_t first, int64_t n, int64_t n_columns) {
    const int64_t last = first + n, whole = n_columns >= N ? last - n % O::SIZE : first;
    for (int64_t i = first; i < whole; i += O::SIZE, to += N) copy_words<N>(to, row(i), row(i + O::SIZE - 1));
    for (int64_t i = whole; i < last; i += O::SIZE, to += N)
        copy_some_words<N>(to, row(i), O::SIZE == 2 && i + 1 < last ? row(i + 1) : NULL, least(n_columns, N));
}
