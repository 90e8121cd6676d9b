// A linear layer with its bias, activation, factor and residual, on CPUs.
//
//     out = activation(x @ weight^T + bias) * factor + residual
//
// x: (T, K), weight: (M, K), bias: (M,), factor, residual, out: (T, M), all float32 or all bfloat16; sums are float32.
// The weight is packed once, by packing.cpp: [panel of COLUMNS][K][COLUMNS], bfloat16 in pairs along K. Training saves
// the input of the activation.
//
// A tile is ROWS x COLUMNS of out: sums in registers, over a PIECE of K at a time. Each piece is added to those before
// it. So rounding errors grow with K / PIECE + PIECE, not with K; a library with one chain of sums for all of K is less
// exact. A task is a few row blocks by a few panels, whose weights stay in the L2 cache: a quarter of it. The weights
// of the next task are loaded there meanwhile, a line or two for some steps of K, because few rows would wait for them.
//
// If no instruction multiplies pairs of bfloat16, or only a slow one, they are multiplied as floats: those of the
// weight become floats in registers, those of x a few columns at a time. That takes 54 instructions instead of 48.
//
// The threads of a team (team.h) take the tasks. FLOPs: 2 T K M. Bytes, at least: those of x, weight and out, once.
#include "linear.h"

#include <unistd.h>

#include "activations.h"
#include "panels.h"

namespace {

constexpr int64_t PIECE = 128;  // of float32; bfloat16 is less exact than any chain of its products
constexpr int64_t SHORT_K = 320,
                  SHORT_PIECE = 32;  // a library has more chains for few rows: with a short K it shows
constexpr int AHEAD = 40;            // steps of K: few rows wait for weights that no cache near them holds
constexpr int UNROLLED = 4;          // steps of K
constexpr int64_t WIDENED = 256;     // columns of bfloat16 rows that are made floats at a time
#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_PAIRS = true;
#else
constexpr bool MULTIPLIES_PAIRS = false;
#endif
constexpr int ANY = -1;  // an activation that is known at run time only
const int64_t L2_BYTES = greatest(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);  // some systems say 0
const int64_t PANEL_BYTES = L2_BYTES / 4, ROW_BYTES = L2_BYTES / 4;          // of a task's weights and rows
constexpr int64_t TASKS = 8;                                                 // at least, for each thread
constexpr int64_t LINE = 64;                                                 // bytes of a line of the cache

// The steps after the product. n_of(j): how many columns of vector j exist, VL or more for all of them.
template <typename T, int A, bool SAVE, int R, typename N>
INLINE void finish(const Linear<T>& call, const vf (&sums)[R][VECTORS], int64_t row, int64_t column, N n_of) {
    for (int j = 0; j < VECTORS; j++, column += VL) {
        const int64_t n = n_of(j);
        const vf bias = call.bias == NULL ? vf{} : to_floats(call.bias + column, n);
        for (int i = 0; i < R; i++) {
            const vf x = sums[i][j] + bias;
            if (SAVE) from_floats(call.pre + (row + i) * call.pre_stride + column, x, n);
            vf y = activate<T>(x, A == ANY ? call.activation : A);
            if (call.factor != NULL) y *= to_floats(call.factor + (row + i) * call.factor_stride + column, n);
            if (call.residual != NULL) y += to_floats(call.residual + (row + i) * call.residual_stride + column, n);
            from_floats(call.out + (row + i) * call.out_stride + column, y, n);
        }
    }
}

// The data that `finish` reads and writes are fetched into the cache while the tile is multiplied.
template <typename T, bool SAVE, int R>
INLINE void fetch_ends(const Linear<T>& call, int64_t row, int64_t column) {
    for (int i = 0; i < R; i++)
        for (int64_t j = 0; j < COLUMNS; j += LINE / sizeof(T)) {
            __builtin_prefetch(call.out + (row + i) * call.out_stride + column + j, 1);
            if (SAVE) __builtin_prefetch(call.pre + (row + i) * call.pre_stride + column + j, 1);
            if (call.residual != NULL)
                __builtin_prefetch(call.residual + (row + i) * call.residual_stride + column + j);
        }
}

// Lines that are fetched into the L2 cache for later, from `at` on: `pace` bytes, two lines, one or none, for UNROLLED
// steps of K.
struct Later {
    const char* at;
    int64_t pace;

    __attribute__((always_inline)) void fetch() {
        __builtin_prefetch(at, 0, 2);
        if (pace > LINE) __builtin_prefetch(at + LINE, 0, 2);
        at += pace;
    }
};

// sums += x @ weight^T in floats. x: k_size columns of R rows; weight: pairs, of a panel.
template <int R>
INLINE void products_as_floats(vf (&sums)[R][VECTORS], const bf16* x, int64_t x_stride, const int32_t* weight,
                               int64_t k_size, Later& later) {
    float floats[R][WIDENED];
    for (int64_t start = 0; start < k_size; start += WIDENED) {
        const int64_t n = least(k_size - start, WIDENED);
        for (int i = 0; i < R; i++)
            for (int64_t j = 0; j < n; j += VL) store(floats[i] + j, to_floats(x + i * x_stride + start + j, n - j));
        for (int64_t k = 0; k < n; k += 2) {
            const int32_t* pairs = weight + (start + k) / 2 * COLUMNS;
            if (k / 2 % UNROLLED == 0) later.fetch();
            for (int odd = 0; odd < 2; odd++) {
                vf right[VECTORS];
                for (int j = 0; j < VECTORS; j++) {
                    const vi pair = load<vi>(pairs + j * VL);
                    right[j] = (vf)(odd ? pair & (int32_t)0xffff0000 : pair << 16);
                    if (odd) __builtin_prefetch(pairs + AHEAD * COLUMNS + j * VL);
                }
                for (int i = 0; i < R; i++) {
                    const vf left = splat(floats[i][k + odd]);
                    for (int j = 0; j < VECTORS; j++) sums[i][j] = multiply_add(sums[i][j], left, right[j]);
                }
            }
        }
    }
}

// sums += x @ weight^T over n steps of K, for R rows and a panel.
template <typename O, int R>
INLINE void add_products(vf (&sums)[R][VECTORS], const typename O::E* const (&x)[R], const typename O::E* weight,
                         int64_t n, Later& later) {
    const int64_t whole = n / UNROLLED * UNROLLED;
    const typename O::E* at[R];
    for (int64_t k = 0; k < whole; k += UNROLLED) {
        later.fetch();
#pragma GCC unroll 4
        for (int u = 0; u < UNROLLED; u++) {
            for (int i = 0; i < R; i++) at[i] = x[i] + k + u;
            products<R, VECTORS, O, AHEAD>(sums, at, weight + (k + u) * COLUMNS, 1, COLUMNS, VL);
        }
    }
    for (int i = 0; i < R; i++) at[i] = x[i] + whole;
    products<R, VECTORS, O, AHEAD>(sums, at, weight + whole * COLUMNS, n - whole, COLUMNS, VL);
}

// sums = x @ weight^T for R rows and a panel.
template <typename O, typename T, int R>
INLINE void multiply(vf (&sums)[R][VECTORS], const Linear<T>& call, int64_t row, int64_t panel, Later later) {
    typedef typename O::E E;
    const int64_t depth = over(call.k_size, O::SIZE);
    const E* weight = (const E*)call.weight + panel * COLUMNS * depth;
    if constexpr (O::SIZE == 2 && !MULTIPLIES_PAIRS) {
        for (int i = 0; i < R; i++)
            for (int j = 0; j < VECTORS; j++) sums[i][j] = vf{};
        products_as_floats(sums, call.x + row * call.x_stride, call.x_stride, weight, call.k_size, later);
    } else {
        const int64_t piece = O::SIZE != 1 ? depth : call.k_size < SHORT_K ? SHORT_PIECE : PIECE;
        const E* x[R];
        for (int i = 0; i < R; i++) x[i] = (const E*)(call.x + (row + i) * call.x_stride);
        for (int64_t start = 0; start == 0 || start < depth; start += piece) {
            vf part[R][VECTORS] = {};
            add_products<O>(part, x, weight + start * COLUMNS, least(depth - start, piece), later);
            for (int i = 0; i < R; i++) x[i] += piece;
            for (int i = 0; i < R; i++)
                for (int j = 0; j < VECTORS; j++) sums[i][j] = start == 0 ? part[i][j] : sums[i][j] + part[i][j];
        }
    }
}

template <typename T, typename O, int A, bool SAVE, int R>
void tile(const Linear<T>& call, int64_t row, int64_t panel, Later later) {
    fetch_ends<T, SAVE, R>(call, row, panel * COLUMNS);
    vf sums[R][VECTORS];
    multiply<O>(sums, call, row, panel, later);
    const int64_t column = panel * COLUMNS, left = call.n_columns - column;
    if (left >= COLUMNS) finish<T, A, SAVE, R>(call, sums, row, column, [](int) { return VL; });
    else finish<T, A, SAVE, R>(call, sums, row, column, [left](int j) { return left - j * VL; });
}

template <typename T>
using Tile = void (*)(const Linear<T>&, int64_t, int64_t, Later);

// By number of rows.
template <typename T, typename O, int A, bool SAVE>
const Tile<T>* tiles_with() {
    static const Tile<T> tiles[] = {
        NULL,
        tile<T, O, A, SAVE, 1>,
        tile<T, O, A, SAVE, 2>,
        tile<T, O, A, SAVE, 3>,
        tile<T, O, A, SAVE, 4>,
        tile<T, O, A, SAVE, 5>,
        tile<T, O, A, SAVE, 6>,
#if VL == 16
        tile<T, O, A, SAVE, 7>,
        tile<T, O, A, SAVE, 8>,
#endif
    };
    return tiles;
}

template <typename T, typename O>
void run(const Linear<T>& call, const Team& team) {
    const bool gelu = call.activation == GELU;
    const Tile<T>* tiles = call.pre != NULL ? gelu ? tiles_with<T, O, GELU, true>() : tiles_with<T, O, ANY, true>()
                           : call.activation == NONE ? tiles_with<T, O, NONE, false>()
                           : gelu                    ? tiles_with<T, O, GELU, false>()
                                                     : tiles_with<T, O, ANY, false>();
    const int64_t n_blocks = over(call.n_rows, ROWS), n_panels = over(call.n_columns, COLUMNS);
    const int64_t k_bytes = at_least_1(call.k_size * sizeof(T));
    int64_t panels = at_least_1(PANEL_BYTES / (COLUMNS * k_bytes)), blocks = at_least_1(ROW_BYTES / (ROWS * k_bytes));
    const int64_t wanted = TASKS * team.size;
    while (over(n_panels, panels) * over(n_blocks, blocks) < wanted && (panels > 1 || blocks > 1))
        (panels == 1 || (blocks > 1 && blocks * ROWS >= panels * COLUMNS) ? blocks : panels) /= 2;
    const int64_t n_across = over(n_panels, panels), n_down = over(n_blocks, blocks);
    panels = over(n_panels, at_least_1(n_across));  // of equal size
    blocks = over(n_blocks, at_least_1(n_down));
    // Lines of the next task's weights that are fetched into the L2 cache during UNROLLED steps of a tile, if there is
    // room.
    const int64_t panel_bytes = over(call.k_size, O::SIZE) * COLUMNS * sizeof(typename O::E);
    const int64_t lines = 2 * panels * panel_bytes > L2_BYTES / 4 * 3
                              ? 0
                              : least(2, over(UNROLLED * COLUMNS * sizeof(typename O::E) / LINE, at_least_1(blocks)));
    const int64_t bytes_of_tile = over(call.k_size, O::SIZE) / UNROLLED * lines * LINE;
    team.each(n_across * n_down, [&](int64_t task) {
        const int64_t first_block = task % n_down * blocks, first_panel = task / n_down * panels;
        // How many panels farther this thread's next task will probably be.
        const int64_t ahead = (task + team.size) / n_down * panels - first_panel;
        for (int64_t b = first_block; b < least(first_block + blocks, n_blocks); b++) {
            const Tile<T> run_tile = tiles[least(call.n_rows - b * ROWS, ROWS)];
            const int64_t done = (b - first_block) * bytes_of_tile;
            for (int64_t p = first_panel; p < least(first_panel + panels, n_panels); p++) {
                const bool more = ahead > 0 && p + ahead < n_panels && done < panel_bytes;
                const char* at = (const char*)call.weight + p * panel_bytes + (more ? ahead * panel_bytes + done : 0);
                run_tile(call, b * ROWS, p, {at, more ? lines * LINE : 0});
            }
        }
    });
}

}  // namespace

void linear(const Linear<float>& call, const Team& team) { run<float, Floats>(call, team); }
void linear(const Linear<bf16>& call, const Team& team) { run<bf16, Pairs>(call, team); }

// weight: packed; activation: one of enum Activation. Strides in elements; the last axis is contiguous. k_size is even
// in bfloat16.
#define LINEAR(name, T)                                                                                               \
    EXPORT void name(const T* x, int64_t x_stride, const T* weight, const T* bias, const T* residual,                 \
                     int64_t residual_stride, T* pre, int64_t pre_stride, T* out, int64_t out_stride, int64_t n_rows, \
                     int64_t k_size, int64_t n_columns, int64_t activation) {                                         \
        in_parallel([&](const Team& team) {                                                                           \
            linear(Linear<T>{x, weight, bias, residual, out, x_stride, residual_stride, out_stride, n_rows, k_size,   \
                             n_columns, activation, pre, pre_stride},                                                 \
                   team);                                                                                             \
        });                                                                                                           \
    }

LINEAR(fastbert_linear_float32, float)
LINEAR(fastbert_linear_bfloat16, bf16)
