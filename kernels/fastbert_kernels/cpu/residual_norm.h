// The forward passes of LayerNorm in training share this: dropout of rows, parameters of two dtypes, and saved values.
#pragma once

#include "layer_norm.h"
#include "philox.h"
#include "team.h"

// The mask of a row of at most MAX_HIDDEN elements; DROPOUT false: all are kept.
template <bool DROPOUT>
struct RowMask {
    uint64_t bits[DROPOUT ? MAX_HIDDEN / 64 : 1];
    float scale;

    __attribute__((always_inline)) void draw(const Masks& masks, float scale_of_kept, int64_t row, int64_t n) {
        if (!DROPOUT) return;
        scale = scale_of_kept;
        for (int64_t block = 0; block < over(n, 64); block++) bits[block] = masks(row, block);
    }

    // x: elements j to j + VL.
    __attribute__((always_inline)) vf operator()(int64_t j, vf x) const {
        return DROPOUT ? where(bits[j / 64] >> (j % 64), x * scale) : x;
    }
};

// A vector of parameters, float or bf16; NULL stands for zeros.
struct Parameter {
    const void* values;
    int64_t is_bf16;

    // to: the parameters as floats, and 0 up to a multiple of VL.
    void read(float* to, int64_t n) const {
        for (int64_t j = 0; j < n; j += VL)
            store(to + j, values == NULL ? vf{}
                          : is_bf16      ? to_floats((const bf16*)values + j, n - j)
                                         : to_floats((const float*)values + j, n - j));
    }
};

// The outputs of a row: y and, if it is not NULL, low hold the result, total the sum that was normalised.
template <typename C, typename S>
struct NormRows {
    S* y;
    C *low, *total;
    float *mean, *rstd;
    Parameter weight, ln_bias;
    int64_t n_rows, n_columns;
    float eps;
};

// One thread's room.
struct NormRoom {
    float weight[MAX_HIDDEN], ln_bias[MAX_HIDDEN], bias[MAX_HIDDEN], row[MAX_HIDDEN];
};

// x(j): elements j to j + VL, 0 beyond the row. mask: of the result.
template <typename C, typename S, bool DROPOUT, typename Read>
INLINE void norm_row(Read x, const RowMask<DROPOUT>& mask, const NormRows<C, S>& out, int64_t r, NormRoom& room) {
    const int64_t n = out.n_columns;
    S* y = out.y + r * n;
    C *low = out.low == NULL ? NULL : out.low + r * n, *total = out.total + r * n;
    const auto read = [&](int64_t j) {
        const vf sum = x(j);
        from_floats(total + j, sum, n - j);
        return sum;
    };
    const auto write = [&](int64_t j, vf value) {
        value = mask(j, value);
        from_floats(y + j, value, n - j);
        if (sizeof(C) != sizeof(S) && low != NULL) from_floats(low + j, value, n - j);
    };
    const Moments moments = normalize_by(read, write, room.weight, room.ln_bias, n, out.eps, room.row);
    out.mean[r] = moments.mean;
    out.rstd[r] = moments.rstd;
}
