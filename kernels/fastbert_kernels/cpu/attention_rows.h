// The work of ROWS queries with the keys and values of a sequence: scores, softmax and outputs.
#pragma once

#include "attention_tiles.h"

constexpr int64_t CHUNK = 32 * ROWS;  // the queries of a task
constexpr int64_t PIECE = 128;  // the longest chain of sums over values, so that its rounding does not grow with L

enum Mode { INFERENCE, TRAINING, TRAINING_WITH_DROPOUT };

// scores, (padded,) -> probabilities times their sum, as bfloat16 in the first half if PAIRS. Those of keys from length
// on are 0.
template <bool PAIRS, Mode MODE>
INLINE void softmax(float* scores, int64_t length, int64_t padded, const uint64_t* keep, float* top_of,
                    float* total_of) {
    const int64_t last = padded - VL;
    const vf end = cut(load<vf>(scores + last), length - last);
    store(scores + last, end);
    vf high = end, total = {};
    for (int64_t j = 0; j < last; j += VL) high = max(high, load<vf>(scores + j));
    const float top = largest(high);
    for (int64_t j = 0; j < padded; j += VL) {
        vf p = exp2<!PAIRS>((load<vf>(scores + j) - top) * LOG2_E);
        total += p;
        if (MODE == TRAINING_WITH_DROPOUT) p = where(keep, j, p);
        if (PAIRS) from_floats((bf16*)scores + j, p);
        else store(scores + j, p);
    }
    *top_of = top;
    *total_of = sum(total);
}

// scores[i][N * VL] = scale * q_i k^T + bias_i for N blocks of keys, the first of which is block `at`.
template <int N, typename O, bool BIASED>
INLINE void scores_of(float* scores, int64_t stride, const typename O::E* const* queries, const typename O::E* keys,
                      int64_t depth, float scale, const float* const* bias, int64_t at) {
    vf sums[ROWS][N] = {};
    products<ROWS, N, O>(sums, queries, keys, depth, VL, depth * VL);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < N; j++) {
            vf score = sums[i][j] * scale;
            if (BIASED) score += load<vf>(bias[i] + (at + j) * VL);
            store(scores + i * stride + j * VL, score);
        }
}

// Both at once if N blocks are all the keys: the scores stay in registers. tops: the largest scores. totals: sums of
// the probabilities. keep: a word for each query.
template <int N, typename O, Mode MODE, bool BIASED>
INLINE void probabilities_of(float* p, int64_t stride, const typename O::E* const* queries, const typename O::E* keys,
                             int64_t depth, float scale, int64_t length, const uint64_t* keep, float* tops,
                             float* totals, const float* const* bias) {
    static_assert(N * VL <= 64, "a word of the mask holds all keys");
    constexpr bool PAIRS = O::SIZE == 2;
    vf sums[ROWS][N] = {};
    products<ROWS, N, O>(sums, queries, keys, depth, VL, depth * VL);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < N; j++) {
            sums[i][j] *= scale;
            if (BIASED) sums[i][j] += load<vf>(bias[i] + j * VL);
        }
        sums[i][N - 1] = cut(sums[i][N - 1], length - (N - 1) * VL);
        vf high = sums[i][0], total = {};
        for (int j = 1; j < N; j++) high = max(high, sums[i][j]);
        const float top = largest(high);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            vf e = exp2<!PAIRS>((sums[i][j] - top) * LOG2_E);
            total += e;
            if (MODE == TRAINING_WITH_DROPOUT) e = where(keep + i, j * VL, e);
            if (PAIRS) from_floats((bf16*)(p + i * stride) + j * VL, e);
            else store(p + i * stride + j * VL, e);
        }
        tops[i] = top;
        totals[i] = sum(total);
    }
}

// out_i[N * VL] = p_i v / total_i for N vectors of a head's elements, i < n_rows.
template <int N, typename O, typename T>
INLINE void outputs_of(T* out, int64_t stride, const float* totals, const typename O::E* const* p,
                       const typename O::E* values, int64_t n_values, int64_t head_size, int n_rows) {
    vf sums[ROWS][N] = {};
    for (int64_t start = 0; start < n_values; start += PIECE) {
        const int64_t n = least(n_values - start, PIECE);
        const typename O::E* from[ROWS];
        for (int i = 0; i < ROWS; i++) from[i] = p[i] + start;
        vf part[ROWS][N] = {};
        products<ROWS, N, O>(part, from, values + start * head_size, n, head_size, VL);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < N; j++) sums[i][j] += part[i][j];
    }
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < N; j++) from_floats(out + i * stride + j * VL, sums[i][j] / totals[i]);
}

// Statements for n_vectors vectors, N of them at a time from `at` on.
#define IN_VECTORS(n_vectors, at, ...)        \
    for (int64_t at = 0; at < (n_vectors);) { \
        int64_t left = (n_vectors) - at;      \
        if (left >= VECTORS) {                \
            constexpr int N = VECTORS;        \
            __VA_ARGS__;                      \
            at += N;                          \
        } else if (left >= 2) {               \
            constexpr int N = 2;              \
            __VA_ARGS__;                      \
            at += N;                          \
        } else {                              \
            constexpr int N = 1;              \
            __VA_ARGS__;                      \
            at += N;                          \
        }                                     \
    }
