// The gradients of attention.cpp's attention, on CPUs: packed, with the same bits for any number of threads.
//
//     p = exp(scale q k^T + bias - lse)    keep: the mask of dropout    factor: the factor of kept elements
//     dp = keep * (dout v^T)        delta = sum over keys of p * dp  =  sum over a head's elements of dout * out /
//     factor
//     ds = p * (dp - delta)
//     dv = factor (keep * p)^T dout    dq = factor scale ds k    dk = factor scale ds^T q    dbias = factor ds
//
// qkv, grad_qkv: (T, 3 * N * D); out, dout: (T, N * D); all of one dtype, float32 or bfloat16. lse: (N, T) float32.
// Statistics and sums are float32. bfloat16 products use VDPBF16PS if the processor has it, and then p and ds are
// rounded to bfloat16. On other processors they are float32 products.
//
// A task is one head of one sequence. It takes tiles of p and ds that stay in the caches: one block of keys after the
// other, and for each of them one block of queries after the other. dk and dv are sums over the blocks of queries, dq
// is one over the blocks of keys, always in the order of the tokens. In a tile with all keys of a text, p is divided by
// its sum, because that is not exactly 1 with a rounded lse. The heads of a long sequence may be too few for all
// threads. Then there are tasks for the dk and dv of some keys, and others for the dq of some queries: seven products
// instead of five, and the same sums.
//
// The gradient of a bias's table (attention_bias.h) is the sum of dbias over all pairs of tokens at the same distance:
// first along the diagonals of a tile, then for PART blocks of queries, and at the end over these, in their order.
// Within a window a block of queries takes from each block of keys those that one of the queries sees, in whole
// vectors. The bias removes keys that are too far from each query. The time grows with the window, not with the square
// of the length. Bytes moved, from and to main memory: 8 * N * D elements a token.
#include "attention_backward.h"

namespace {

// Statements for n_vectors vectors, N of them at a time from `at` on, in parts that differ by one at most.
#define IN_EQUAL_PARTS(n_vectors, at, ...)                                              \
    for (int64_t at = 0; at < (n_vectors);) {                                           \
        const int64_t left = (n_vectors) - at, width = over(left, over(left, VECTORS)); \
        if (VECTORS == 4 && width == 4) {                                               \
            constexpr int N = VECTORS;                                                  \
            __VA_ARGS__;                                                                \
        } else if (VECTORS == 4 && width == 3) {                                        \
            constexpr int N = VECTORS == 4 ? 3 : 1;                                     \
            __VA_ARGS__;                                                                \
        } else if (width == 2) {                                                        \
            constexpr int N = 2;                                                        \
            __VA_ARGS__;                                                                \
        } else {                                                                        \
            constexpr int N = 1;                                                        \
            __VA_ARGS__;                                                                \
        }                                                                               \
        at += width;                                                                    \
    }

// x, rounded, so that no sum fuses with the product in x.
INLINE vf rounded(vf x) {
    asm("" : "+v"(x));
    return x;
}

// to[i][j] = finish(i, j, x_i y_j) for ROWS rows and N vectors of columns, in chains of at most `most` sums.
template <int N, typename O, typename F>
INLINE void product_of(float* to, const typename O::E* const* x, const typename O::E* columns, int64_t depth,
                       int64_t most, F finish) {
    const int64_t start = (over(depth, most) - 1) * most;
    if (start > 0) products_in_parts<N, O>(to, STRIDE, x, columns, depth, start, most, 1.0f);
    const typename O::E* from[ROWS];
    for (int i = 0; i < ROWS; i++) from[i] = x[i] + start;
    vf sums[ROWS][N] = {};
    products<ROWS, N, O>(sums, from, columns + start * VL, depth - start, VL, depth * VL);
#pragma GCC unroll 6
    for (int i = 0; start > 0 && i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) sums[i][j] = load<vf>(to + i * STRIDE + j * VL) + sums[i][j];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) store(to + i * STRIDE + j * VL, finish(i, j, sums[i][j]));
}

// A block of queries and one of keys, in memory.
template <typename T>
struct Tile {
    const T *q, *dout;
    const float* lse;
    int64_t q_stride, dout_stride, n_queries, n_keys, size;
    float scale;
    const PositionBias& bias;
    const int32_t* columns;            // of the sequence, or NULL
    int64_t head, query, key, length;  // of the first query and key in the sequence
};

// p and dp before the mask. It is not inlined, as the functions below, so that each has all registers.
template <typename T, typename O, bool BIASED>
__attribute__((noinline)) void probabilities_and_products(const Tile<T>& tile, const Scratch& s) {
    typedef typename O::E E;
    const int64_t depth = tile.size / O::SIZE, n_blocks = over(tile.n_keys, VL);
    IN_EQUAL_PARTS(n_blocks, at, {
        const E *keys = (E*)s.k_columns + at * depth * VL, *values = (E*)s.v_columns + at * depth * VL;
        for (int64_t row = 0; row < tile.n_queries; row += ROWS) {
            const E *q[ROWS], *dout[ROWS];
            float lse[ROWS], rows[BIASED ? ROWS : 1][N * VL];
            const float* bias[ROWS];
            for (int i = 0; i < ROWS; i++) {
                const int64_t r = least(row + i, tile.n_queries - 1);  // the last one again at the end
                if (BIASED && tile.columns == NULL) {
                    bias[i] = s.line + tile.length - 1 - (tile.query + r) + tile.key + at * VL;
                } else if (BIASED) {
                    spread_row(rows[i], tile.bias, tile.head, tile.columns, tile.query + r, tile.key + at * VL,
                               tile.length, N * VL);
                    bias[i] = rows[i];
                }
                q[i] = O::SIZE == 2 ? (const E*)(tile.q + r * tile.q_stride) : (E*)s.q_rows + r * tile.size;
                dout[i] = O::SIZE == 2 ? (const E*)(tile.dout + r * tile.dout_stride) : (E*)s.dout_rows + r * tile.size;
                lse[i] = tile.lse[r];
            }
            float *p = s.p + row * STRIDE + at * VL, *dp = s.dp + row * STRIDE + at * VL;
            product_of<N, O>(p, q, keys, depth, DEPTH, [&](int i, int j, vf sum) {
                vf score = sum * tile.scale;
                if (BIASED) score += load<vf>(bias[i] + j * VL);
                score = rounded(score) - lse[i];
                if (j == N - 1) score = cut(score, tile.n_keys - (at + j) * VL);
                return exp2<O::SIZE == 1>(score * LOG2_E);
            });
            product_of<N, O>(dp, dout, values, depth, DEPTH / 2, [](int, int, vf sum) { return sum; });
        }
    })
}

// The destination of a sum over blocks: it is kept in `sums`, and after the last block written, times `factor`, to out.
template <typename T>
struct Sums {
    float* sums;
    T* out;
    int64_t out_stride, size;
    float factor;
    bool first, last;
};

// N vectors of a head's elements, in n_rows rows from `row` on: += x^T y, the sum over n rows of y.
template <int N, typename O, typename T>
INLINE void add_products(const Sums<T>& to, int64_t row, int64_t at, int n_rows, const typename O::E* const* x,
                         int64_t x_stride, const typename O::E* y, int64_t n) {
    vf sums[ROWS][N] = {};
    products<ROWS, N, O>(sums, x, y + at, n, to.size, VL, x_stride);
    float* kept = to.sums + row * to.size + at;
    T* out = to.out + row * to.out_stride + at;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        if (i >= n_rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            vf sum = sums[i][j];
            if (!to.first) sum += load<vf>(kept + i * to.size + j * VL);
            if (to.last) from_floats(out + i * to.out_stride + j * VL, sum * to.factor);
            else store(kept + i * to.size + j * VL, sum);
        }
    }
}

// The same for all elements of n_rows rows. Element k of row i of x is at x + i * STEP + k * X_STRIDE.
template <int64_t STEP, int64_t X_STRIDE, typename O, typename T>
__attribute__((noinline)) void add_piece(const Sums<T>& to, int64_t n_rows, const typename O::E* x,
                                         const typename O::E* y, int64_t n) {
    for (int64_t row = 0; row < n_rows; row += ROWS) {
        const int rows = (int)least(n_rows - row, ROWS);
        const typename O::E* from[ROWS];
        for (int i = 0; i < ROWS; i++) from[i] = x + (row + (i < rows ? i : rows - 1)) * STEP;
        IN_EQUAL_PARTS(to.size / VL, at, add_products<N, O>(to, row, at * VL, rows, from, X_STRIDE, y, n))
    }
}

template <int64_t STEP, int64_t X_STRIDE, typename O, typename T>
INLINE void add_all(const Sums<T>& to, int64_t n_rows, const float* x, const float* y, int64_t n) {
    typedef typename O::E E;
    for (int64_t start = 0; start < n; start += PIECE) {
        Sums<T> piece = to;
        piece.first &= start == 0;
        piece.last &= start + PIECE >= n;
        add_piece<STEP, X_STRIDE, O>(piece, n_rows, (const E*)x + start * X_STRIDE, (const E*)y + start * to.size,
                                     least(n - start, PIECE));
    }
}

// VL elements of rows i and i + 1, as bfloat16: p in pairs, ds in pairs and in rows.
INLINE void store_pairs(const Scratch& s, int64_t i, int64_t j, vf p, vf next_p, vf ds, vf next_ds) {
#ifdef __AVX512BF16__
    vi order = {};
    for (int lane = 0; lane < VL; lane++) order[lane] = lane | (lane + VL) << 16;
    const __m512i p_rows = (__m512i)_mm512_cvtne2ps_pbh((__m512)next_p, (__m512)p);
    const __m512i ds_rows = (__m512i)_mm512_cvtne2ps_pbh((__m512)next_ds, (__m512)ds);
    store(s.p + i / 2 * STRIDE + j, _mm512_permutexvar_epi16((__m512i)order, p_rows));
    store(s.dp + i / 2 * STRIDE + j, _mm512_permutexvar_epi16((__m512i)order, ds_rows));
    store((bf16*)s.ds + i * STRIDE + j, _mm512_castsi512_si256(ds_rows));
    store((bf16*)s.ds + (i + 1) * STRIDE + j, _mm512_extracti64x4_epi64(ds_rows, 1));
#endif
}

// Row i of a tile.
template <bool DROPOUT>
struct Row {
    float *p, *dp;
    const uint64_t* keep;
    float inverse = 1.0f, delta = 0.0f;

    Row(const Scratch& s, int64_t i) : p(s.p + i * STRIDE), dp(s.dp + i * STRIDE), keep(s.keep + i * (KEYS / 64)) {}
    __attribute__((always_inline)) vf masked(vf x, int64_t j) const { return DROPOUT ? where(keep, j, x) : x; }

    // For a row with all keys, whose p have a sum of 1 except for the rounding of lse.
    __attribute__((always_inline)) void sum_up(int64_t n_keys) {
        vf total = {}, dot = {};
        for (int64_t first = 0; first < n_keys; first += 64) {  // two short chains of sums, not a long one
            vf some_total = {}, some_dot = {};
            for (int64_t j = first; j < least(first + 64, n_keys); j += VL) {
                const vf some = load<vf>(p + j);
                some_total += some;
                some_dot += some * masked(load<vf>(dp + j), j);
            }
            total += some_total;
            dot += some_dot;
        }
        inverse = 1.0f / sum(total);
        delta = sum(dot) * inverse;
    }

    // keep * p and ds of VL keys.
    __attribute__((always_inline)) void finish(int64_t j, vf* kept, vf* ds) const {
        const vf some = load<vf>(p + j) * inverse;
        *ds = some * (masked(load<vf>(dp + j), j) - delta);
        *kept = masked(some, j);
    }
};

// The sums of a tile's ds for the gradient of a bias.
struct BiasSums {
    float *line, *row;  // sums at each distance, from that of the first key and the last query on; one row of ds
    float* part;        // the sums for the head and the part of the queries
    const PositionBias& bias;
    const int32_t* columns;  // of the sequence, or NULL
    int64_t query, key, n_queries, n_keys;
    float factor;

    __attribute__((always_inline)) void add(int64_t i) const {  // row, of query i
        if (columns == NULL) {
            float* at = line + n_queries - 1 - i;
            for (int64_t j = 0; j < n_keys; j += VL) store(at + j, load<vf>(at + j) + load<vf>(row + j));
        } else {
            for (int64_t j = 0; j < n_keys; j++)
                part[bias.place((int64_t)columns[key + j] - columns[query + i])] += factor * row[j];
        }
    }
    void start() const {
        if (columns == NULL) memset(line, 0, (n_queries + n_keys + VL) * sizeof(float));
    }
    void finish() const {
        for (int64_t i = 0; columns == NULL && i < n_queries + n_keys - 1; i++)
            part[bias.place(key - query + i - n_queries + 1)] += factor * line[i];
    }
};

// p and dp before the mask -> keep * p and ds, in place: as floats, or as pairs of queries, and then ds as bfloat16 in
// rows as well. delta is NULL if the tile has all keys that its queries see: then it is summed here.
template <typename O, bool DROPOUT, bool BIASED>
__attribute__((noinline)) void differences(const Scratch& s, int64_t n_queries, int64_t n_keys, const float* delta,
                                           const BiasSums* sums) {
    for (int64_t i = 0; i < n_queries; i += O::SIZE) {
        Row<DROPOUT> row(s, i), next(s, i + 1);
        const bool pair = O::SIZE == 2 && i + 1 < n_queries;
        if (delta == NULL) {
            row.sum_up(n_keys);
            if (pair) next.sum_up(n_keys);
        } else {
            row.delta = delta[i];
            if (pair) next.delta = delta[i + 1];
        }
        if (BIASED) {
            vf p, ds;
            for (int which = 0; which < (pair ? 2 : 1); which++) {
                for (int64_t j = 0; j < n_keys; j += VL) {
                    (which == 0 ? row : next).finish(j, &p, &ds);
                    store(sums->row + j, ds);
                }
                sums->add(i + which);
            }
        }
        for (int64_t j = 0; j < n_keys; j += VL) {
            vf p, ds;
            row.finish(j, &p, &ds);
            if (O::SIZE == 1) {
                store(row.p + j, p);
                store(row.dp + j, ds);
            } else {
                vf next_p = {}, next_ds = {};
                if (pair) next.finish(j, &next_p, &next_ds);
                store_pairs(s, i, j, p, next_p, ds, next_ds);
            }
        }
    }
}

// delta of the queries from begin to end: the sum of dout * out, over the factor of dropout.
template <typename T>
INLINE void deltas_of(float* delta, const T* dout, const T* out, const Call& call, int64_t begin, int64_t end) {
    const float rate = 1.0f - (float)call.dropout.threshold / 65536;
    for (int64_t i = begin; i < end; i++) {
        vf total = {};
        for (int64_t d = 0; d < call.head_size; d += VL)
            total += to_floats(dout + i * call.dout_stride + d) * to_floats(out + i * call.out_stride + d);
        delta[i] = sum(total) * rate;
    }
}

template <typename T, typename O, bool DROPOUT, bool BIASED>
INLINE void run(const T* qkv, const T* douts, const T* outs, const float* lse, T* grads, const Call& call,
                const Task& task, int64_t head, const Scratch& s, float* bias_parts) {
    typedef typename O::E E;
    const int64_t size = call.head_size, width = call.n_heads * size, depth = size / O::SIZE, length = task.length;
    const T* q = qkv + task.first * call.qkv_stride + head * size;
    const T* dout = douts + task.first * call.dout_stride + head * size;
    T* grad = grads + task.first * 3 * width + head * size;
    const float* head_lse = lse + head * call.n_rows + task.first;
    const Masks masks(call.dropout, head);
    const float factor = DROPOUT ? call.dropout.scale() : 1.0f;
    const Blocks keys(length, KEYS, VL), queries(length, QUERIES, ROWS);
    const int64_t begin = task.query_block * queries.size;
    const int32_t* columns = BIASED && call.bias.columns != NULL ? call.bias.columns + task.first : NULL;
    if (BIASED && columns == NULL) spread(s.line, call.bias, head, length, up(length, VL) + VL);
    if (keys.n > 1)
        deltas_of(s.delta, dout, outs + task.first * call.out_stride + head * size, call, begin,
                  least(task.query_end * queries.size, length));

    const bool windowed = BIASED && call.windowed(), sum_bias = BIASED && !windowed && task.dq;
    const int64_t grad_stride = 3 * width;
    for (int64_t block = task.key_block; block < task.key_end; block++) {
        const int64_t key = block * keys.size, n_keys = least(length - key, keys.size), n_blocks = over(n_keys, VL);
        const T* k = q + width + key * call.qkv_stride;
        const Near near(call, queries, key, n_keys, length);
        T* key_grad = grad + width + key * grad_stride;
        pack_keys<O>((E*)s.k_columns, k, n_keys, n_blocks, depth, call.qkv_stride);
        pack_keys<O, true>((E*)s.v_columns, k + width, n_keys, n_blocks, depth, call.qkv_stride);
        pack_values<O>((E*)s.k_rows, k, n_keys, size, call.qkv_stride);
        if (windowed && task.dk_dv) {  // each block of queries adds to other keys
            memset(s.dk, 0, n_keys * size * sizeof(float));
            memset(s.dv, 0, n_keys * size * sizeof(float));
        }
        for (int64_t query_block = greatest(task.query_block, near.begin);
             query_block < least(task.query_end, near.end); query_block++) {
            const int64_t query = query_block * queries.size, n_queries = least(length - query, queries.size);
            const T *q_rows = q + query * call.qkv_stride, *dout_rows = dout + query * call.dout_stride;
            // From the block's keys, those that one of the queries sees: `skipped` are before them.
            const int64_t skipped = windowed ? greatest(0, query - call.window - key) / VL * VL : 0;
            const int64_t seen = (windowed ? least(n_keys, query + n_queries + call.window - key) : n_keys) - skipped;
            const Scratch part_of = s.from(skipped, size, O::SIZE);
            pack_values<O>((E*)s.q_rows, q_rows, n_queries, size, call.qkv_stride);
            pack_values<O>((E*)s.dout_rows, dout_rows, n_queries, size, call.dout_stride);
            probabilities_and_products<T, O, BIASED>(
                {q_rows, dout_rows, head_lse + query, call.qkv_stride, call.dout_stride, n_queries, seen, size,
                 call.scale, call.bias, columns, head, query, key + skipped, length},
                part_of);
            if (DROPOUT) draw(s.keep, KEYS / 64, masks, task.first + query, n_queries, key + skipped, seen);
            const float* delta = keys.n > 1 ? s.delta + query : NULL;
            if (BIASED && sum_bias) {
                const int64_t part = task.part + query_block / PART;
                const BiasSums sums = {
                    s.sums,    s.sums + SUMS, bias_parts + (part * call.n_heads + head) * call.bias.width(),
                    call.bias, columns,       query,
                    key,       n_queries,     n_keys,
                    factor};
                sums.start();
                differences<O, DROPOUT, true>(s, n_queries, n_keys, delta, &sums);
                sums.finish();
            } else {
                differences<O, DROPOUT, false>(s, n_queries, seen, delta, NULL);
            }
            const int64_t n = over(n_queries, O::SIZE);
            const bool first = !windowed && query_block == 0, last = !windowed && query_block == queries.n - 1;
            T* seen_grad = key_grad + skipped * grad_stride;
            if (task.dk_dv) {
                add_all<1, STRIDE, O>(Sums<T>{part_of.dv, seen_grad + width, grad_stride, size, factor, first, last},
                                      seen, s.p, s.dout_rows, n);
                add_all<1, STRIDE, O>(
                    Sums<T>{part_of.dk, seen_grad, grad_stride, size, factor * call.scale, first, last}, seen, s.dp,
                    s.q_rows, n);
            }
            const Near with(call, keys, query, n_queries, length);
            if (task.dq)
                add_all<STRIDE / O::SIZE, 1, O>(
                    Sums<T>{s.dq + (query - begin) * size, grad + query * grad_stride, grad_stride, size,
                            factor * call.scale, block == with.begin, block == with.end - 1},
                    n_queries, O::SIZE == 2 ? s.ds : s.dp, part_of.k_rows, over(seen, O::SIZE));
        }
        if (windowed && task.dk_dv)
            for (int64_t i = 0; i < n_keys; i++)
                for (int64_t d = 0; d < size; d += VL) {
                    T* to = key_grad + i * grad_stride + d;
                    from_floats(to, load<vf>(s.dk + i * size + d) * (factor * call.scale));
                    from_floats(to + width, load<vf>(s.dv + i * size + d) * factor);
                }
    }
}

template <typename T, typename O, bool DROPOUT, bool BIASED>
void run_all(const T* qkv, const T* dout, const T* out, const float* lse, T* grad, const Call& call, const Plan& plan,
             const Team& team) {
    const int64_t n_tasks = plan.n_tasks * call.n_heads, width = 3 * call.n_heads * call.head_size;
    const Scratch scratch(plan.scratch(team.id), call.head_size, plan.longest, BIASED);
    team.each(n_tasks + call.n_rows - plan.n_tokens, [&](int64_t i) {
        if (i < n_tasks)
            run<T, O, DROPOUT, BIASED>(qkv, dout, out, lse, grad, call, plan.tasks[i / call.n_heads], i % call.n_heads,
                                       scratch, plan.bias_parts);
        else  // a row that no sequence has
            memset(grad + (plan.n_tokens + i - n_tasks) * width, 0, width * sizeof(T));
    });
}

template <typename T, typename O, bool BIASED>
void run_with(const T* qkv, const T* dout, const T* out, const float* lse, T* grad, const Call& call, const Plan& plan,
              const Team& team) {
    if (call.dropout.threshold > 0) run_all<T, O, true, BIASED>(qkv, dout, out, lse, grad, call, plan, team);
    else run_all<T, O, false, BIASED>(qkv, dout, out, lse, grad, call, plan, team);
}

// grad_table: (N, width), the sums over all parts.
void add_parts(float* grad_table, const Call& call, const Plan& plan, const Team& team) {
    const int64_t n = call.bias.width();
    team.each(call.n_heads, [&](int64_t head) {
        float* to = grad_table + head * n;
        memset(to, 0, n * sizeof(float));
        for (int64_t part = 0; part < plan.n_parts; part++) {
            const float* from = plan.bias_parts + (part * call.n_heads + head) * n;
            for (int64_t i = 0; i < n; i++) to[i] += from[i];
        }
    });
}

}  // namespace

// Returns the status of Plan. table, radius, columns: the members of PositionBias. grad_table: as table. window: the
// number of tokens that a query sees on either side; -1 for all. Beyond it the table leaves nothing, and then has no
// gradient.
#define ATTENTION_BACKWARD(name, T, O)                                                                               \
    EXPORT int name(const T* qkv, int64_t qkv_stride, const T* dout, int64_t dout_stride, const T* out,              \
                    int64_t out_stride, const float* lse, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, \
                    int64_t n_heads, int64_t head_size, float scale, int64_t threshold, uint64_t seed, int64_t site, \
                    T* grad, const float* table, int64_t radius, const int32_t* columns, float* grad_table,          \
                    int64_t window) {                                                                                \
        const Call call = {n_rows,                                                                                   \
                           qkv_stride,                                                                               \
                           dout_stride,                                                                              \
                           out_stride,                                                                               \
                           n_heads,                                                                                  \
                           head_size,                                                                                \
                           scale,                                                                                    \
                           {threshold, seed, site},                                                                  \
                           {table, radius, columns},                                                                 \
                           window};                                                                                  \
        const Plan plan(cu_seqlens, n_seqs, call);                                                                   \
        if (plan.status != 0) return plan.status;                                                                    \
        in_parallel([&](const Team& team) {                                                                          \
            if (table != NULL) run_with<T, O, true>(qkv, dout, out, lse, grad, call, plan, team);                    \
            else run_with<T, O, false>(qkv, dout, out, lse, grad, call, plan, team);                                 \
        });                                                                                                          \
        if (call.has_table()) in_parallel([&](const Team& team) { add_parts(grad_table, call, plan, team); });       \
        return 0;                                                                                                    \
    }

ATTENTION_BACKWARD(fastbert_attention_backward_float32, float, Floats)
ATTENTION_BACKWARD(fastbert_attention_backward_bfloat16, bf16, BFloat16Operands)
