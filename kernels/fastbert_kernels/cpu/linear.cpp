// A float32 linear layer with what follows it, on CPUs.
//
//     out = activation(x @ weight^T + bias) + residual
//
// x: (T, K), weight: (M, K), bias: (M,), residual, out: (T, M), all float32. The weight is packed once, in panels of
// COLUMNS of its rows, laid out [panel][K][COLUMNS] and filled up with zeros.
//
// A tile is ROWS x COLUMNS of out: sums in registers, over a PIECE of K at a time. Each piece is added to those before it,
// so that rounding errors grow with K / PIECE + PIECE, not with K: a library that keeps one chain of sums for all of K is
// less exact. A task is a few row blocks by a few panels, whose weights stay in the L2 cache.
// FLOPs: 2 T K M. Bytes, at least: 4 (T K + M K + T M).
#include <omp.h>

#include "vector.h"

namespace {

constexpr int VECTORS = VL == 16 ? 3 : 2;
constexpr int COLUMNS = VECTORS * VL;
constexpr int ROWS = VL == 16 ? 8 : 6;
constexpr int64_t PIECE = 128;
constexpr int64_t PANEL_FLOATS = 1 << 16, ROW_FLOATS = 1 << 15;  // of a task's weights and rows: 256 and 128 KiB
constexpr int64_t TASKS = 4;                                     // at least, for each thread

enum Activation { NONE, GELU, GELU_TANH, RELU };

struct Call {
    const float *x, *weight, *bias, *residual;
    float* out;
    int64_t x_stride, residual_stride, out_stride;
    int64_t n_rows, k_size, n_columns;
    int64_t activation;
};

// x (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. log2(erfc) on [0, 5] is a polynomial of degree
// 10, fitted to the error of erfc itself: of the GELU of normal numbers 3e-8 (RMS over RMS), where PyTorch's has 6e-8.
INLINE vf gelu(vf x) {
    vf size = min(abs(x), splat(7.0710678f));  // beyond, what is subtracted is 0 beside x
    size = x == x ? size : x;
    vf t = size * 0.70710678f;
    vf q = splat(-6.399504854925908e-07f) * t + 1.4849088074697647e-05f;
    q = q * t - 1.4513160567730665e-04f;
    q = q * t + 7.584238774143159e-04f;
    q = q * t - 2.0200866274535656e-03f;
    q = q * t - 2.646475040819496e-04f;
    q = q * t + 2.7978168800473213e-02f;
    q = q * t - 1.484028398990631e-01f;
    q = q * t - 9.184267520904541e-01f;
    q = q * t - 1.6279081106185913f;
    return max(x, vf{}) - 0.5f * size * exp2<true>(q * t);
}

// x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(u)) / 2 is a logistic function.
INLINE vf gelu_tanh(vf x) {
    vf u = x * (0.79788456f + 0.03567741f * x * x);
    return x / (1.0f + exp2<true>(min(u * -2.8853901f, splat(127.0f))));
}

INLINE vf activate(vf x, int64_t activation) {
    switch (activation) {
        case GELU: return gelu(x);
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return x < 0.0f ? vf{} : x;
        default: return x;
    }
}

// What follows the product. n_of(j): how many columns of vector j are there, VL or more for all of them.
template <int R, typename N>
INLINE void finish(const Call& call, const vf (&sums)[R][VECTORS], int64_t row, int64_t column, N n_of) {
    for (int j = 0; j < VECTORS; j++, column += VL) {
        const int n = n_of(j);
        const vf bias = call.bias == NULL ? vf{} : load_some(call.bias + column, n);
        for (int i = 0; i < R; i++) {
            vf y = activate(sums[i][j] + bias, call.activation);
            if (call.residual != NULL) y += load_some(call.residual + (row + i) * call.residual_stride + column, n);
            store_some(call.out + (row + i) * call.out_stride + column, y, n);
        }
    }
}

template <int R>
INLINE void tile(const Call& call, int64_t row, int64_t panel) {
    vf sums[R][VECTORS];
    const float* x = call.x + row * call.x_stride;
    const float* weight = call.weight + panel * COLUMNS * call.k_size;
    for (int64_t start = 0; start == 0 || start < call.k_size; start += PIECE) {
        const int64_t end = start + PIECE < call.k_size ? start + PIECE : call.k_size;
        vf part[R][VECTORS] = {};
        for (int64_t k = start; k < end; k++) {
            vf right[VECTORS];
            for (int j = 0; j < VECTORS; j++) right[j] = load<vf>(weight + k * COLUMNS + j * VL);
            for (int i = 0; i < R; i++) {
                const vf left = splat(x[i * call.x_stride + k]);
                for (int j = 0; j < VECTORS; j++) part[i][j] = left * right[j] + part[i][j];
            }
        }
        for (int i = 0; i < R; i++)
            for (int j = 0; j < VECTORS; j++) sums[i][j] = start == 0 ? part[i][j] : sums[i][j] + part[i][j];
    }
    const int64_t column = panel * COLUMNS, left = call.n_columns - column;
    if (left >= COLUMNS)
        finish<R>(call, sums, row, column, [](int) { return VL; });
    else
        finish<R>(call, sums, row, column, [left](int j) { return (int)(left - j * VL); });
}

typedef void (*Tile)(const Call&, int64_t, int64_t);

template <int R>
void tile_of(const Call& call, int64_t row, int64_t panel) { tile<R>(call, row, panel); }

constexpr Tile TILES[] = {
    NULL, tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>,
#if VL == 16
    tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>,
#endif
};

INLINE int64_t over(int64_t n, int64_t step) { return (n + step - 1) / step; }
INLINE int64_t at_least_1(int64_t n) { return n < 1 ? 1 : n; }

}  // namespace

EXPORT int64_t fastbert_packed_floats(int64_t n_columns, int64_t k_size) {
    return over(n_columns, COLUMNS) * COLUMNS * k_size;
}

EXPORT void fastbert_pack_float32(const float* weight, int64_t stride, int64_t n_columns, int64_t k_size, float* packed) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < over(n_columns, COLUMNS); panel++)
        for (int64_t k = 0; k < k_size; k++)
            for (int64_t j = 0; j < COLUMNS; j++) {
                const int64_t column = panel * COLUMNS + j;
                packed[(panel * k_size + k) * COLUMNS + j] = column < n_columns ? weight[column * stride + k] : 0.0f;
            }
}

// activation: 0 none, 1 GELU, 2 its tanh approximation, 3 ReLU. Strides in elements.
EXPORT void fastbert_linear_float32(const float* x, int64_t x_stride, const float* weight, const float* bias,
                                        const float* residual, int64_t residual_stride, float* out, int64_t out_stride,
                                        int64_t n_rows, int64_t k_size, int64_t n_columns, int64_t activation) {
    const Call call = {x, weight, bias, residual, out, x_stride, residual_stride, out_stride, n_rows, k_size, n_columns,
                       activation};
    const int64_t n_blocks = over(n_rows, ROWS), n_panels = over(n_columns, COLUMNS);
    int64_t panels = at_least_1(PANEL_FLOATS / (COLUMNS * at_least_1(k_size)));  // of a task
    int64_t blocks = at_least_1(ROW_FLOATS / (ROWS * at_least_1(k_size)));
    const int64_t wanted = TASKS * omp_get_max_threads();
    while (over(n_panels, panels) * over(n_blocks, blocks) < wanted && (panels > 1 || blocks > 1))
        (panels == 1 || blocks * ROWS >= panels * COLUMNS ? blocks : panels) /= 2;
    const int64_t n_across = over(n_panels, panels), n_down = over(n_blocks, blocks);
    panels = over(n_panels, at_least_1(n_across));  // of equal size
    blocks = over(n_blocks, at_least_1(n_down));
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < n_across * n_down; task++) {
        const int64_t first_block = task % n_down * blocks, first_panel = task / n_down * panels;
        for (int64_t b = first_block; b < first_block + blocks && b < n_blocks; b++) {
            const int64_t left = n_rows - b * ROWS;
            const Tile run = TILES[left < ROWS ? left : ROWS];
            for (int64_t p = first_panel; p < first_panel + panels && p < n_panels; p++) run(call, b * ROWS, p);
        }
    }
}
