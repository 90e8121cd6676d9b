// A linear layer on 8-bit operands with its bias, activation, factor and residual, on CPUs with AVX-512 VNNI.
//
//     out = activation(x @ weight^T + bias) * factor + residual
//
// x: (T, K), unsigned 8-bit with a scale and an offset for each row (quantize.h); weight: (M, K), signed 8-bit with a
// scale for each of its rows; factor, residual, out: (T, M), float32 or bfloat16. Sums are int32 and exact: one product
// of x and weight is at most 255 * 127, so that K may be 66,000. With the sum of each row of the weight,
//
//     x @ weight^T = scale[t] * w_scale[m] * sum(q[t] w[m]) + low[t] * w_scale[m] * sum(w[m])
//
// This is computed in float32 from the integers, one element at a time, so no row's bits depend on the rows beside it.
// The weight is packed in panels of COLUMNS of its rows, laid out [panel][K / 4][COLUMNS][4] and filled up with zeros;
// columns: w_scale, w_scale * sum(w) and bias, each filled up with zeros to a multiple of COLUMNS. Multiplications: T K
// M. Bytes, at least: those of x, weight and out, once.
#include "linear_int8.h"

#include "activations.h"
#include "quantize.h"

#ifdef __AVX512VNNI__

namespace {

constexpr int VECTORS = 3;
constexpr int COLUMNS = VECTORS * VL;
constexpr int ROWS = 8;
constexpr int64_t GROUP = 8;  // blocks of rows that a task multiplies by a panel

// The steps after the product.
template <int R, typename T, typename O, typename F>
INLINE void finish(const LinearInt8<T, O>& call, const vi (&sums)[R][VECTORS], int64_t row, int64_t column,
                   F activated) {
    const int64_t padded = over(call.n_columns, COLUMNS) * COLUMNS;
    for (int j = 0; j < VECTORS; j++) {
        const int64_t at = column + j * VL, n = call.n_columns - at;
        const vf scale = load<vf>(call.columns + at), per_low = load<vf>(call.columns + padded + at);
        const vf bias = load<vf>(call.columns + 2 * padded + at);
        for (int i = 0; i < R; i++) {
            const Affine affine = call.affine[row + i];
            const vf product = __builtin_convertvector(sums[i][j], vf) * scale;
            vf y = activated(product * affine.scale + (per_low * affine.low + bias));
            if (call.factor != NULL) y *= to_floats(call.factor + (row + i) * call.factor_stride + at, n);
            if (call.residual != NULL) y += to_floats(call.residual + (row + i) * call.residual_stride + at, n);
            from_floats(call.out + (row + i) * call.out_stride + at, y, n);
        }
    }
}

template <int R, typename T, typename O>
void tile(const LinearInt8<T, O>& call, int64_t row, int64_t panel) {
    const int64_t depth = over(call.k_size, STEP_INT8), column = panel * COLUMNS;
    vi sums[R][VECTORS];  // in memory for the loops below; in registers it would be `part`
    {
        const int8_t* weight = call.weight + column * depth * STEP_INT8;
        const uint8_t* x[R];
        for (int i = 0; i < R; i++) x[i] = call.x + (row + i) * call.x_stride;
        vi part[R][VECTORS] = {};
        for (int64_t k = 0; k < depth; k++) {
            vi right[VECTORS];
            for (int j = 0; j < VECTORS; j++) right[j] = load<vi>(weight + (k * COLUMNS + j * VL) * STEP_INT8);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                const vi left = load<int32_t>(x[i] + k * STEP_INT8) - vi{};
#pragma GCC unroll 3
                for (int j = 0; j < VECTORS; j++)
                    part[i][j] = (vi)_mm512_dpbusd_epi32((__m512i)part[i][j], (__m512i)left, (__m512i)right[j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; j++) sums[i][j] = part[i][j];
    }
    switch (call.activation) {
        case GELU: return finish<R>(call, sums, row, column, [](vf x) { return gelu_rounded(x); });
        case GELU_TANH: return finish<R>(call, sums, row, column, [](vf x) { return gelu_tanh(x); });
        case SILU: return finish<R>(call, sums, row, column, [](vf x) { return silu(x); });
        case RELU: return finish<R>(call, sums, row, column, [](vf x) { return x < 0.0f ? vf{} : x; });
        default: return finish<R>(call, sums, row, column, [](vf x) { return x; });
    }
}

template <typename T, typename O>
void run(const LinearInt8<T, O>& call, const Team& team) {
    typedef void (*Tile)(const LinearInt8<T, O>&, int64_t, int64_t);
    static const Tile tiles[] = {NULL,          tile<1, T, O>, tile<2, T, O>, tile<3, T, O>, tile<4, T, O>,
                                 tile<5, T, O>, tile<6, T, O>, tile<7, T, O>, tile<8, T, O>};
    const int64_t n_blocks = over(call.n_rows, ROWS), n_groups = over(n_blocks, GROUP);
    team.each(over(call.n_columns, COLUMNS) * n_groups, [&](int64_t task) {
        const int64_t panel = task / n_groups, first = task % n_groups * GROUP;
        for (int64_t b = first; b < least(first + GROUP, n_blocks); b++)
            tiles[least(call.n_rows - b * ROWS, ROWS)](call, b * ROWS, panel);
    });
}

template <typename T>
void quantize_all(const T* x, int64_t stride, int64_t n_rows, int64_t n, bool rotated, uint8_t* q, int64_t q_stride,
                  Affine* affine, const Team& team) {
    float row[MAX_ROTATED];
    team.share(n_rows, [&](int64_t r) {
        if (rotated) {
            for (int64_t j = 0; j < n; j += VL) store(row + j, to_floats(x + r * stride + j));
            affine[r] = quantize_rotated(row, n, q + r * q_stride);
        } else {
            affine[r] = quantize(x + r * stride, n, q + r * q_stride);
        }
    });
}

}  // namespace

void linear_int8(const LinearInt8<float, float>& call, const Team& team) { run(call, team); }
void linear_int8(const LinearInt8<bf16, bf16>& call, const Team& team) { run(call, team); }
void linear_int8(const LinearInt8<bf16, float>& call, const Team& team) { run(call, team); }

// The number of elements in a packed weight.
EXPORT int64_t fastbert_packed_size_int8(int64_t n_columns, int64_t k_size) {
    return over(n_columns, COLUMNS) * COLUMNS * over(k_size, STEP_INT8) * STEP_INT8;
}

// The length of each part of `columns`.
EXPORT int64_t fastbert_padded_columns_int8(int64_t n_columns) { return over(n_columns, COLUMNS) * COLUMNS; }

// weight: (n_columns, k_size), contiguous.
EXPORT void fastbert_pack_int8(const int8_t* weight, int64_t n_columns, int64_t k_size, int8_t* packed) {
    const int64_t padded = over(k_size, STEP_INT8) * STEP_INT8;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < over(n_columns, COLUMNS); panel++)
        for (int64_t j = 0; j < COLUMNS; j++) {
            const int64_t column = panel * COLUMNS + j;
            int8_t* to = packed + panel * COLUMNS * padded + j * STEP_INT8;
            for (int64_t k = 0; k < padded; k++)
                to[k / STEP_INT8 * COLUMNS * STEP_INT8 + k % STEP_INT8] =
                    column < n_columns && k < k_size ? weight[column * k_size + k] : 0;
        }
}

// x: (n_rows, n) -> q: (n_rows, n) and a scale and an offset for each row. rotated: n is a multiple of ROTATION, at
// most MAX_ROTATED. Strides in elements.
#define QUANTIZE(name, T)                                                                                            \
    EXPORT void name(const T* x, int64_t stride, int64_t n_rows, int64_t n, int64_t rotated, uint8_t* q,             \
                     int64_t q_stride, Affine* affine) {                                                             \
        in_parallel(                                                                                                 \
            [&](const Team& team) { quantize_all(x, stride, n_rows, n, rotated != 0, q, q_stride, affine, team); }); \
    }

QUANTIZE(fastbert_quantize_float32, float)
QUANTIZE(fastbert_quantize_bfloat16, bf16)

#define LINEAR_INT8(name, T)                                                                                       \
    EXPORT void name(const uint8_t* x, int64_t x_stride, const Affine* affine, const int8_t* weight,               \
                     const float* columns, const T* residual, int64_t residual_stride, T* out, int64_t out_stride, \
                     int64_t n_rows, int64_t k_size, int64_t n_columns, int64_t activation) {                      \
        in_parallel([&](const Team& team) {                                                                        \
            linear_int8(LinearInt8<T, T>{x, affine, weight, columns, residual, out, x_stride, residual_stride,     \
                                         out_stride, n_rows, k_size, n_columns, activation},                       \
                        team);                                                                                     \
        });                                                                                                        \
    }

LINEAR_INT8(fastbert_linear_int8_float32, float)
LINEAR_INT8(fastbert_linear_int8_bfloat16, bf16)

#endif
