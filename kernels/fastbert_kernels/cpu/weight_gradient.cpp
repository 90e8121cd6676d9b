// The gradients of a linear layer's weight and bias, on CPUs.
//
//     weight = grad^T @ x        bias = the sums of grad's columns
//
// grad: (T, M), x: (T, K), both float32 or both bfloat16; weight: (M, K), float32 or their dtype; bias: (M,) float32.
//
// A step of the sums is one row of grad and x, or two in bfloat16 if the processor multiplies pairs. The sums go over a
// PIECE of steps at a time; each piece is added to those before it, as in linear.cpp. A chunk of a few pieces is packed
// as in panels.h, x in panels of COLUMNS and grad in panels of BLOCKS of ROWS; a tile of the weight is ROWS x COLUMNS.
// The threads of a team (team.h) multiply a chunk and pack the next. Chunks, tasks and threads do not change the order
// of the sums.
//
// FLOPs: 2 T M K. Bytes, at least: those of grad, x and weight, once.
#include "panels.h"
#include "team.h"

namespace {

constexpr int64_t PIECE = 128;            // steps; so many of a panel of x stay in the L1 cache
constexpr int64_t BIAS_PIECE = 16;        // rows of the shortest sums for the bias
constexpr int64_t BIAS_PIECES = 16;       // pieces of the longer ones
constexpr int64_t CHUNK_BYTES = 1 << 20;  // of what is packed
constexpr int64_t BLOCK_BYTES = 1 << 18;  // of a task's blocks, in one piece
constexpr int64_t TILE_BYTES = 1 << 18;   // of a task's part of the weight
constexpr int64_t TASKS = 4;              // at least, for each thread
constexpr int BLOCKS = 2;                 // in a panel of grad
constexpr int WIDTH = BLOCKS * ROWS;      // of a panel of grad
constexpr int STRIP = 4;                  // panels of grad that a task packs
static_assert(STRIP * WIDTH % VL == 0, "the bias is summed in whole vectors of a strip");

template <typename T, typename G>
struct Gradient {
    const T *grad, *x;
    G* weight;
    float* sums;       // (M, K): the weight up to now, which is the weight itself if that is float32
    float* bias;       // or NULL
    float* bias_sums;  // (M,): the bias' latest sums
    int64_t grad_stride, x_stride, n_rows, m_size, k_size;
};

// The division of the work. Sizes are in words, of a float or two bfloat16.
struct Cuts {
    int64_t n_steps, n_blocks, n_lefts, n_rights;   // panels of grad on the left, of x on the right
    int64_t n_pieces, piece_size, chunk, n_chunks;  // chunk: pieces of one

    Cuts(int64_t n_rows, int64_t m_size, int64_t k_size, int64_t rows_of_step)
        : n_steps(over(n_rows, rows_of_step)),
          n_blocks(over(m_size, ROWS)),
          n_lefts(over(m_size, WIDTH)),
          n_rights(over(k_size, COLUMNS)) {
        n_pieces = at_least_1(over(n_steps, PIECE));
        piece_size = PIECE * (n_lefts * WIDTH + n_rights * COLUMNS);
        chunk = least(n_pieces, at_least_1(CHUNK_BYTES / (4 * at_least_1(piece_size))));
        n_chunks = over(n_pieces, chunk);
    }

    int64_t size() const { return least(n_chunks, 2) * chunk * piece_size; }  // two chunks are there at a time
    int64_t left(int64_t piece, int64_t i) const { return piece % (2 * chunk) * piece_size + i * PIECE * WIDTH; }
    int64_t right(int64_t piece, int64_t i) const { return left(piece, n_lefts) + i * PIECE * COLUMNS; }
    int64_t block(int64_t piece, int64_t b) const { return left(piece, b / BLOCKS) + b % BLOCKS * ROWS; }
    int64_t steps(int64_t piece) const { return least(n_steps - piece * PIECE, PIECE); }
    int64_t end(int64_t c) const { return least((c + 1) * chunk, n_pieces); }
};

// The products of a chunk, cut into tasks of equal size: each takes `blocks` blocks by `rights` panels of x.
struct Tasks {
    int64_t blocks, rights, n_down, n_across;

    Tasks(const Cuts& cuts, int64_t wanted)
        : blocks(least(BLOCK_BYTES / (4 * PIECE * ROWS), at_least_1(cuts.n_blocks))),
          rights(at_least_1(TILE_BYTES / (4 * blocks * ROWS * COLUMNS))) {
        while (over(cuts.n_blocks, blocks) * over(cuts.n_rights, rights) < wanted && (blocks > 1 || rights > 1))
            (rights == 1 || (blocks > 1 && blocks * ROWS > rights * COLUMNS) ? blocks : rights) /= 2;
        n_down = at_least_1(over(cuts.n_blocks, blocks));
        n_across = over(cuts.n_rights, rights);
        blocks = over(cuts.n_blocks, n_down);
        rights = over(cuts.n_rights, at_least_1(n_across));
    }
};

// totals += the sums of V vectors of grad's columns over n rows from `grad` on. n_columns: the number of existing
// columns.
template <int V, typename T>
INLINE void add_columns(float* totals, bool first, const T* grad, int64_t stride, int64_t n, int64_t n_columns) {
    vf total[V] = {};
    for (int64_t start = 0; start < n; start += BIAS_PIECE) {
        vf part[V] = {};
        for (int64_t t = start; t < least(start + BIAS_PIECE, n); t++)
            for (int j = 0; j < V; j++) part[j] += to_floats(grad + t * stride + j * VL, n_columns - j * VL);
        for (int j = 0; j < V; j++) total[j] += part[j];
    }
    for (int j = 0; j < V; j++) {
        float* to = totals + j * VL;
        from_floats(to, first ? total[j] : to_floats(to, n_columns - j * VL) + total[j], n_columns - j * VL);
    }
}

// to = from + the sum over n steps of left[i] * right[j], for a tile of rows `stride` apart. from: NULL for 0.
template <typename O, typename G>
__attribute__((noinline)) void tile(const typename O::E* left, const typename O::E* right, int64_t n, const float* from,
                                    G* to, int64_t stride) {
    const G* end = to;  // fetched into the cache meanwhile
    for (int i = 0; i < ROWS; i++, end += stride)
        for (int64_t j = 0; j < COLUMNS; j += 64 / sizeof(G)) __builtin_prefetch(end + j, 1);
    vf sums[ROWS][VECTORS] = {};
    for (const typename O::E* last = left + n * WIDTH; left < last; left += WIDTH, right += COLUMNS) {
        typename O::V y[VECTORS];
        for (int j = 0; j < VECTORS; j++) y[j] = load<typename O::V>(right + j * VL);
        for (int i = 0; i < ROWS; i++) {
            const typename O::V x = splat_of(left + i);
            for (int j = 0; j < VECTORS; j++) sums[i][j] = multiply_add(sums[i][j], x, y[j]);
        }
    }
    // Unrolled by name, because otherwise GCC moves the sums out of their registers.
    if (from != NULL)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++, from += stride)
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; j++) sums[i][j] = to_floats(from + j * VL) + sums[i][j];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++, to += stride)
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; j++) from_floats(to + j * VL, sums[i][j]);
}

template <typename T, typename G, typename O>
struct Work {
    typedef typename O::E E;
    const Gradient<T, G>& call;
    const Cuts& cuts;
    E* packed;

    int64_t first_row(int64_t piece) const { return piece * PIECE * O::SIZE; }
    int64_t rows(int64_t piece) const { return least(call.n_rows - first_row(piece), PIECE * O::SIZE); }

    void pack_left(int64_t piece, int64_t strip) const {
        for (int64_t i = strip * STRIP; i < least((strip + 1) * STRIP, cuts.n_lefts); i++) {
            const T* grad = call.grad + i * WIDTH;
            const auto row = [&](int64_t t) { return grad + t * call.grad_stride; };
            pack_rows<WIDTH, O>(packed + cuts.left(piece, i), row, first_row(piece), rows(piece),
                                call.m_size - i * WIDTH);
        }
        if (call.bias != NULL) add_to_bias(piece, strip * STRIP * WIDTH);
    }

    void pack_right(int64_t piece, int64_t i) const {
        const T* x = call.x + i * COLUMNS;
        const auto row = [&](int64_t t) { return x + t * call.x_stride; };
        pack_rows<COLUMNS, O>(packed + cuts.right(piece, i), row, first_row(piece), rows(piece),
                              call.k_size - i * COLUMNS);
    }

    // BIAS_PIECES pieces are summed up before they are added to the bias.
    void add_to_bias(int64_t piece, int64_t column) const {
        constexpr int64_t ALL = STRIP * WIDTH;
        const int64_t n_columns = least(call.m_size - column, ALL);
        const T* grad = call.grad + first_row(piece) * call.grad_stride;
        const bool first = piece % BIAS_PIECES == 0;
        if (n_columns == ALL)
            add_columns<ALL / VL>(call.bias_sums + column, first, grad + column, call.grad_stride, rows(piece), ALL);
        else
            for (int64_t j = column; j < column + n_columns; j += VL)
                add_columns<1>(call.bias_sums + j, first, grad + j, call.grad_stride, rows(piece), call.m_size - j);
        if (piece % BIAS_PIECES == BIAS_PIECES - 1 || piece == cuts.n_pieces - 1)
            for (int64_t j = column; j < column + n_columns; j++)
                call.bias[j] = piece < BIAS_PIECES ? call.bias_sums[j] : call.bias[j] + call.bias_sums[j];
    }

    // A piece of a tile's sums is added to those before it and stored, in `sums` or, the last one, in `weight`.
    template <typename P>
    void add(int64_t piece, int64_t b, int64_t p, P* to) const {
        const int64_t stride = call.k_size, n_steps = cuts.steps(piece), at = b * ROWS * stride + p * COLUMNS;
        const int64_t n_rows = least(call.m_size - b * ROWS, ROWS), n_columns = least(stride - p * COLUMNS, COLUMNS);
        const E *left = packed + cuts.block(piece, b), *right = packed + cuts.right(piece, p);
        const float* from = piece == 0 ? NULL : call.sums + at;
        to += at;
        if (n_rows == ROWS && n_columns == COLUMNS) return tile<O>(left, right, n_steps, from, to, stride);
        float part[ROWS * COLUMNS];
        tile<O>(left, right, n_steps, NULL, part, COLUMNS);
        for (int i = 0; i < n_rows; i++)
            for (int j = 0; j < n_columns; j += VL) {
                const int64_t k = i * stride + j, n = n_columns - j;
                const vf sum = load<vf>(part + i * COLUMNS + j);
                from_floats(to + k, from == NULL ? sum : to_floats(from + k, n) + sum, n);
            }
    }

    void multiply(int64_t chunk, const Tasks& tasks, int64_t task) const {
        const int64_t first = task % tasks.n_down * tasks.blocks, first_right = task / tasks.n_down * tasks.rights;
        for (int64_t piece = chunk * cuts.chunk; piece < cuts.end(chunk); piece++)
            for (int64_t p = first_right; p < least(first_right + tasks.rights, cuts.n_rights); p++)
                for (int64_t b = first; b < least(first + tasks.blocks, cuts.n_blocks); b++)
                    if (piece < cuts.n_pieces - 1) add(piece, b, p, call.sums);
                    else add(piece, b, p, call.weight);
    }

    int64_t n_strips() const { return over(cuts.n_lefts, STRIP); }
    void pack(int64_t chunk, int64_t task) const {
        for (int64_t piece = chunk * cuts.chunk; piece < cuts.end(chunk); piece++)
            if (task < n_strips()) pack_left(piece, task);
            else pack_right(piece, task - n_strips());
    }
};

template <typename T, typename G, typename O>
void run(const Gradient<T, G>& call, void* packed, const Cuts& cuts, const Team& team) {
    const Work<T, G, O> work = {call, cuts, (typename O::E*)packed};
    const Tasks tasks(cuts, TASKS * team.size);
    for (int64_t chunk = -1; chunk < cuts.n_chunks; chunk++) {  // -1: only the first one is packed
        const int64_t n_products = chunk < 0 ? 0 : tasks.n_down * tasks.n_across;
        const int64_t n_packs = chunk + 1 < cuts.n_chunks ? work.n_strips() + cuts.n_rights : 0;
        team.each(n_products + n_packs, [&](int64_t task) {
            if (task < n_products) work.multiply(chunk, tasks, task);
            else work.pack(chunk + 1, task - n_products);
        });
    }
}

}  // namespace

// Bytes of scratch. size: of an element of grad and x; rounded: whether the weight is bfloat16.
EXPORT int64_t fastbert_weight_gradient_bytes(int64_t n_rows, int64_t m_size, int64_t k_size, int64_t size,
                                              int64_t rounded) {
    const int64_t rows_of_step = size == sizeof(bf16) ? BFloat16Operands::SIZE : 1;
    return 4 * (Cuts(n_rows, m_size, k_size, rows_of_step).size() + m_size + (rounded ? m_size * k_size : 0));
}

// bias may be NULL. Strides in elements; the last axis of grad and x is contiguous, and the weight all of it.
#define WEIGHT_GRADIENT(name, T, G, O)                                                                            \
    EXPORT void name(const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, G* weight, float* bias,    \
                     float* scratch, int64_t n_rows, int64_t m_size, int64_t k_size) {                            \
        const Cuts cuts(n_rows, m_size, k_size, O::SIZE);                                                         \
        float *bias_sums = scratch + cuts.size(), *sums = sizeof(G) == 4 ? (float*)weight : bias_sums + m_size;   \
        in_parallel([&](const Team& team) {                                                                       \
            run<T, G, O>({grad, x, weight, sums, bias, bias_sums, grad_stride, x_stride, n_rows, m_size, k_size}, \
                         scratch, cuts, team);                                                                    \
        });                                                                                                       \
    }

WEIGHT_GRADIENT(fastbert_weight_gradient_float32_float32, float, float, Floats)
WEIGHT_GRADIENT(fastbert_weight_gradient_bfloat16_float32, bf16, float, BFloat16Operands)
WEIGHT_GRADIENT(fastbert_weight_gradient_bfloat16_bfloat16, bf16, bf16, BFloat16Operands)
