// Rows of a batch one vector at a time, and sums over rows.
//
// Sums have the same bits for any number of threads: each BLOCK of rows has its partial sums, which are added up in
// order.
#pragma once

#include "team.h"

constexpr int64_t BLOCK = 32;  // rows
constexpr int TOGETHER = 4;    // rows that are added up before they are added to the sum: shorter chains, fewer loads

template <int N>
struct Count {
    static constexpr int value = N;
};

// f(row, Count<ROWS>()) for the rows of a block: TOGETHER at a time, and the rest one by one.
template <typename F>
INLINE void each_rows(int64_t first, int64_t end, F f) {
    int64_t row = first;
    for (; row + TOGETHER <= end; row += TOGETHER) f(row, Count<TOGETHER>());
    for (; row < end; row++) f(row, Count<1>());
}

// f(j, VL) for each vector of a row of n elements, and f(j, n - j) for the rest.
template <typename F>
INLINE void each_vector(int64_t n, F f) {
    int64_t j = 0;
    for (; j + VL <= n; j += VL) f(j, (int64_t)VL);
    if (j < n) f(j, n - j);
}

// x in its first lanes, 0 in the others.
INLINE vf first_of(vf x, int64_t some) {
    for (int64_t i = some; i < VL; i++) x[i] = 0.0f;
    return x;
}

template <int ROWS>
INLINE vf add_up(const vf (&rows)[ROWS]) {
    if constexpr (ROWS == 1) return rows[0];
    else return (rows[0] + rows[1]) + (rows[2] + rows[3]);
}

INLINE void add_to(float* sums, vf value) { store(sums, load<vf>(sums) + value); }

// sums[j] = the sum of partials[b][j] over all blocks b. partials: (n_blocks, n).
INLINE void add_blocks(const float* partials, int64_t n_blocks, int64_t n, float* sums, const Team& team) {
    constexpr int64_t CHAIN = 16;
    team.share(over(n, VL), [&](int64_t i) {
        const int64_t j = i * VL;
        vf total = {};
        for (int64_t first = 0; first < n_blocks; first += CHAIN) {
            vf part = {};
            for (int64_t b = first; b < least(first + CHAIN, n_blocks); b++)
                part += to_floats(partials + b * n + j, n - j);
            total += part;
        }
        from_floats(sums + j, total, n - j);
    });
}
