// The gradients of disentangled.cpp's attention, on CPUs, with the same bits for any number of threads.
//
//     s_ij = scale (q_i k_j + q_i pk[b(i - j)] + k_j pq[b(i - j)])    p = softmax of s over the keys
//     dp = keep (dout v^T)    ds = p (dp - sum over keys of p dp)     keep, factor: of dropout
//     c_ir = sum of ds_ij over the keys j with b(i - j) = r           e_jr = the same sum over the queries i
//     dq = factor scale (ds k + c pk)      dk = factor scale (ds^T q + e pq)      dv = factor (keep p)^T dout
//     dpk = factor scale c^T q             dpq = factor scale e^T k
//
// qkv, grad_qkv: (T, 3 * N * D); dout: (T, N * D); pk, pq and their gradients: (2R, N * D); all of one dtype, float32
// or bfloat16. Products and sums are float32. Only the inputs of the forward pass are kept.
//
// The sequences of a batch are split into PARTS of about equal work, by their lengths alone. A task is one head of a
// part. Its dpk and dpq are sums in the order of the tokens, and in the end the parts are added in their order. A task
// takes a block of queries of a sequence with all keys at a time: (queries, keys) numbers of p and ds, (queries, rows)
// of c, and of e (CHUNK keys, rows). Each of these needs few rows more than there are queries. Bytes moved, from and to
// main memory: 8 * N * D elements a token, and 2 * PARTS times pk and pq.
#include "attention_rows.h"
#include "disentangled.h"

#include <stdlib.h>

#include <initializer_list>

namespace {

constexpr int64_t PARTS = 8;
constexpr int64_t CHAIN = 64;              // the longest chain of sums, so that its rounding does not grow
constexpr int64_t KEYS = 4 * ROWS;         // of a tile of e
constexpr int64_t QUERIES = 16 * ROWS;     // of a block, at most
constexpr int64_t SCORES = 512 * QUERIES;  // of a block, at most, if it has more than 2 * ROWS queries

INLINE int64_t queries_of(int64_t length) {
    const int64_t fitting = SCORES / length / ROWS * ROWS;
    return fitting < 2 * ROWS ? 2 * ROWS : least(fitting, QUERIES);
}

// to[i][j] += sum over k < n of x[i * step + k * x_stride] * y[k * y_stride + j] for ROWS rows, of which the last may
// be missing, and N vectors.
template <int N>
INLINE void add_tile(float* to, int64_t stride, const float* x, int64_t step, int64_t x_stride, const float* y,
                     int64_t y_stride, int n_rows, int64_t n) {
    const float* from[ROWS];
    for (int i = 0; i < ROWS; i++) from[i] = x + (i < n_rows ? i : n_rows - 1) * step;
    vf sums[ROWS][N] = {};
    products<ROWS, N, Floats>(sums, from, y, n, y_stride, VL, x_stride);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        if (i >= n_rows) break;
        for (int j = 0; j < N; j++) store(to + i * stride + j * VL, load<vf>(to + i * stride + j * VL) + sums[i][j]);
    }
}

// The same for all rows and for columns in whole vectors, in chains of at most CHAIN sums.
__attribute__((noinline)) void add_product(float* to, int64_t stride, const float* x, int64_t step, int64_t x_stride,
                                           const float* y, int64_t y_stride, int64_t n_rows, int64_t n_columns,
                                           int64_t n) {
    for (int64_t start = 0; start < n; start += CHAIN) {
        const int64_t some = least(n - start, CHAIN);
        for (int64_t row = 0; row < n_rows; row += ROWS) {
            const int rows = (int)least(n_rows - row, ROWS);
            const float *from = x + row * step + start * x_stride, *right = y + start * y_stride;
            float* out = to + row * stride;
            if (x_stride == 1) {
                IN_VECTORS(over(n_columns, VL), at,
                           add_tile<N>(out + at * VL, stride, from, step, 1, right + at * VL, y_stride, rows, some))
            } else {
                IN_VECTORS(over(n_columns, VL), at,
                           add_tile<N>(out + at * VL, stride, from, 1, x_stride, right + at * VL, y_stride, rows, some))
            }
        }
    }
}

// Rows of a head -> floats, (n, size).
template <typename T>
INLINE void copy_rows(float* to, const T* from, int64_t stride, int64_t n, int64_t size) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < size; d += VL) store(to + i * size + d, to_floats(from + i * stride + d));
}

// Rows (n, size) -> columns, (size, stride), zeros from the n-th on.
INLINE void turn_rows(float* to, int64_t stride, const float* from, int64_t n, int64_t size) {
    for (int64_t i = 0; i < stride; i += VL)
        for (int64_t d = 0; d < size; d += VL) {
            vi tile[VL] = {};
            for (int64_t row = 0; row < VL && i + row < n; row++) tile[row] = load<vi>(from + (i + row) * size + d);
            transpose(tile);
            for (int64_t j = 0; j < VL; j++) store(to + (d + j) * stride + i, tile[j]);
        }
}

INLINE void clear(float* to, int64_t n) { memset(to, 0, n * sizeof(float)); }

struct Sizes {
    int64_t size, longest, n_rows;  // of a head; tokens of the longest sequence; rows of pk and pq that it needs

    // Rows with a number for each key, or for each row of pk.
    static int64_t stride(int64_t length) { return up(length, VL) + VL; }
    int64_t row_stride() const { return up(n_rows, VL) + VL; }
};

// A thread's memory.
struct Scratch {
    float *q, *dout, *k, *k_columns, *v_columns, *dq, *dk, *dv, *p, *ds;
    float *pk, *pq, *pk_columns, *pq_columns;  // the rows that the batch needs
    float *c, *e;                              // or q pk, and k pq
    uint64_t* keep;
    int32_t* places;  // of each query and key, less the first row; without columns one line for all

    static int64_t layout(Scratch* s, float* memory, const Sizes& sizes) {
        int64_t n = 0;
        const auto take = [&](int64_t count) {
            n += up(count, 16);
            return memory + n - up(count, 16);
        };
        const int64_t size = sizes.size, row_stride = sizes.row_stride(), stride = Sizes::stride(sizes.longest);
        const int64_t n_queries = least(QUERIES, sizes.longest), whole = n_queries * stride;
        const int64_t most = least(whole, 2 * ROWS * stride + SCORES + 2 * VL * QUERIES);  // of any length
        for (float** rows : {&s->q, &s->dout, &s->dq}) *rows = take(n_queries * size);
        for (float** rows : {&s->k, &s->dk, &s->dv}) *rows = take(sizes.longest * size);
        for (float** columns : {&s->k_columns, &s->v_columns}) *columns = take(size * stride);
        for (float** tile : {&s->p, &s->ds}) *tile = take(most);
        for (float** rows : {&s->pk, &s->pq}) *rows = take(sizes.n_rows * size);
        for (float** columns : {&s->pk_columns, &s->pq_columns}) *columns = take(size * row_stride);
        s->c = take(n_queries * row_stride);
        s->e = take(KEYS * row_stride);
        s->keep = (uint64_t*)take(2 * n_queries * over(sizes.longest, 64));
        s->places = (int32_t*)take(most > 2 * stride ? most : 2 * stride);
        return n;
    }
};

struct Call {
    int64_t n_rows, qkv_stride, dout_stride, n_heads, head_size;
    float scale;
    Dropout dropout;
};

// Row i of a block: scores without their scale -> keep * p, and dp -> ds.
template <bool DROPOUT>
INLINE void finish(float* p, float* dp, int64_t length, float scale, const uint64_t* keep) {
    const int64_t padded = up(length, VL), last = padded - VL;
    for (int64_t j = 0; j < last; j += VL) store(p + j, load<vf>(p + j) * scale);
    store(p + last, cut(load<vf>(p + last) * scale, length - last));
    vf high = load<vf>(p);
    for (int64_t j = VL; j < padded; j += VL) high = max(high, load<vf>(p + j));
    const float top = largest(high);
    vf total = {}, dot = {};
    for (int64_t first = 0; first < padded; first += 16 * VL) {  // short chains of sums
        vf some_total = {}, some_dot = {};
        for (int64_t j = first; j < least(first + 16 * VL, padded); j += VL) {
            const vf some = exp2<true>((load<vf>(p + j) - top) * LOG2_E);
            const vf own = DROPOUT ? where(keep, j, load<vf>(dp + j)) : load<vf>(dp + j);
            some_total += some;
            some_dot += some * own;
            store(p + j, some);
            store(dp + j, own);
        }
        total += some_total;
        dot += some_dot;
    }
    const float inverse = 1.0f / sum(total), delta = sum(dot) * inverse;
    for (int64_t j = 0; j < padded; j += VL) {
        const vf some = load<vf>(p + j) * inverse;
        store(dp + j, some * (load<vf>(dp + j) - delta));
        store(p + j, DROPOUT ? where(keep, j, some) : some);
    }
}

// One sequence's head: its part of grad, and of the sums of dpk and dpq, (rows, size), before their factor.
template <typename T, bool DROPOUT>
void run(const T* qkv, const T* douts, T* grads, const Call& call, const Distances<T>& distances, const Sizes& sizes,
         int64_t low, int64_t first, int64_t length, int64_t head, float* key_sums, float* query_sums,
         const Scratch& s) {
    const int64_t size = call.head_size, width = call.n_heads * size, block = queries_of(length);
    const int64_t stride = Sizes::stride(length), row_stride = sizes.row_stride(), n_words = over(length, 64);
    const T* q = qkv + first * call.qkv_stride + head * size;
    const T* dout = douts + first * call.dout_stride + head * size;
    T* grad = grads + first * 3 * width + head * size;
    const Masks masks(call.dropout, head);
    const float factor = DROPOUT ? call.dropout.scale() : 1.0f, grad_factor = factor * call.scale;
    const int32_t* columns = distances.columns == NULL ? NULL : distances.columns + first;
    const auto column = [&](int64_t row) -> int64_t { return columns == NULL ? row : columns[row]; };
    const auto place = [&](int64_t distance) { return distances.row(distance) - low; };

    copy_rows(s.k, q + 2 * width, call.qkv_stride, length, size);
    turn_rows(s.v_columns, stride, s.k, length, size);
    copy_rows(s.k, q + width, call.qkv_stride, length, size);
    turn_rows(s.k_columns, stride, s.k, length, size);
    clear(s.dk, length * size);
    clear(s.dv, length * size);
    if (columns == NULL)
        for (int64_t i = 0; i < 2 * length - 1; i++) s.places[i] = (int32_t)place(length - 1 - i);

    for (int64_t query = 0; query < length; query += block) {
        const int64_t n = least(length - query, block), last = query + n - 1;
        const int32_t* places[QUERIES];
        for (int64_t i = 0; i < n; i++) {
            places[i] = columns == NULL ? s.places + length - 1 - query - i : s.places + i * stride;
            for (int64_t j = 0; columns != NULL && j < length; j++)
                s.places[i * stride + j] = (int32_t)place((int64_t)columns[query + i] - columns[j]);
        }
        copy_rows(s.q, q + query * call.qkv_stride, call.qkv_stride, n, size);
        copy_rows(s.dout, dout + query * call.dout_stride, call.dout_stride, n, size);
        clear(s.p, n * stride);
        clear(s.ds, n * stride);
        add_product(s.p, stride, s.q, size, 1, s.k_columns, stride, n, length, size);
        add_product(s.ds, stride, s.dout, size, 1, s.v_columns, stride, n, length, size);

        // The rows of pk that these queries need, and those of pq for some keys and these queries.
        const int64_t from = place(column(query) - column(length - 1)),
                      n_places = place(column(last) - column(0)) + 1 - from;
        const auto from_of = [&](int64_t key) { return place(column(query) - column(least(key + KEYS, length) - 1)); };
        const auto end_of = [&](int64_t key) { return place(column(last) - column(key)) + 1; };
        if (distances.keys != NULL) {
            clear(s.c, n * row_stride);
            add_product(s.c, row_stride, s.q, size, 1, s.pk_columns + from, row_stride, n, n_places, size);
            for (int64_t i = 0; i < n; i++) {
                float *to = s.p + i * stride, *terms = s.c + i * row_stride - from;
                const int32_t* at = places[i];
                for (int64_t j = 0; j < length; j++) to[j] += terms[at[j]];
            }
        }
        for (int64_t key = 0; distances.queries != NULL && key < length; key += KEYS) {
            const int64_t m = least(length - key, KEYS), start = from_of(key);
            clear(s.e, m * row_stride);
            add_product(s.e, row_stride, s.k + key * size, size, 1, s.pq_columns + start, row_stride, m,
                        end_of(key) - start, size);
            for (int64_t i = 0; i < n; i++) {
                float *to = s.p + i * stride + key, *terms = s.e - start;
                const int32_t* at = places[i] + key;
                for (int64_t j = 0; j < m; j++) to[j] += terms[j * row_stride + at[j]];
            }
        }

        if (DROPOUT) draw(s.keep, n_words, masks, first + query, n, 0, length);
        for (int64_t i = 0; i < n; i++)
            finish<DROPOUT>(s.p + i * stride, s.ds + i * stride, length, call.scale, s.keep + i * n_words);
        add_product(s.dv, size, s.p, 1, stride, s.dout, size, length, size, n);
        add_product(s.dk, size, s.ds, 1, stride, s.q, size, length, size, n);
        clear(s.dq, n * size);
        add_product(s.dq, size, s.ds, stride, 1, s.k, size, n, size, length);

        if (distances.keys != NULL) {
            clear(s.c, n * row_stride);
            for (int64_t i = 0; i < n; i++) {
                float *sums = s.c + i * row_stride - from, *ds = s.ds + i * stride;
                for (int64_t j = 0; j < length; j++) sums[places[i][j]] += ds[j];
            }
            add_product(s.dq, size, s.c, row_stride, 1, s.pk + from * size, size, n, size, n_places);
            add_product(key_sums + from * size, size, s.c, 1, row_stride, s.q, size, n_places, size, n);
        }
        for (int64_t key = 0; distances.queries != NULL && key < length; key += KEYS) {
            const int64_t m = least(length - key, KEYS), start = from_of(key), n_own = end_of(key) - start;
            clear(s.e, m * row_stride);
            for (int64_t i = 0; i < n; i++) {
                float *sums = s.e - start, *ds = s.ds + i * stride + key;
                const int32_t* at = places[i] + key;
                for (int64_t j = 0; j < m; j++) sums[j * row_stride + at[j]] += ds[j];
            }
            add_product(s.dk + key * size, size, s.e, row_stride, 1, s.pq + start * size, size, m, size, n_own);
            add_product(query_sums + start * size, size, s.e, 1, row_stride, s.k + key * size, size, n_own, size, m);
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < size; d += VL)
                from_floats(grad + (query + i) * 3 * width + d, load<vf>(s.dq + i * size + d) * grad_factor);
    }
    for (int64_t j = 0; j < length; j++)
        for (int64_t d = 0; d < size; d += VL) {
            T* to = grad + j * 3 * width + width + d;
            from_floats(to, load<vf>(s.dk + j * size + d) * grad_factor);
            from_floats(to + width, load<vf>(s.dv + j * size + d) * factor);
        }
}

// The sequences of each part, from starts[i] to starts[i + 1], and the longest one. They follow from the lengths.
struct Parts {
    int64_t starts[PARTS + 1], n_tokens = 0, longest = 1;
    int status = 2;  // as AttentionPlan's

    Parts(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows) {
        if (n_seqs < 0 || cu_seqlens[0] != 0) return;
        double total = 0, work = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
            if (length < 0 || cu_seqlens[b + 1] > n_rows) return;
            longest = length > longest ? length : longest;
            total += work_of(length);
        }
        int64_t part = 0;
        starts[0] = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const double own = work_of(cu_seqlens[b + 1] - cu_seqlens[b]);
            for (; part < PARTS - 1 && (work + own / 2) * PARTS >= total * (part + 1); part++) starts[part + 1] = b;
            work += own;
        }
        while (part < PARTS) starts[++part] = n_seqs;
        n_tokens = cu_seqlens[n_seqs];
        status = 0;
    }
    static double work_of(int64_t length) { return (double)length * (double)(length + 64); }
};

// grad, (2R, N * D): the sums of all parts, zeros in rows that no sequence needs. parts: [part][head][row][size].
template <typename T>
void add_parts(T* grad, const float* parts, const Parts& plan, const Call& call, const Sizes& sizes, int64_t low,
               int64_t n_table, float factor, const Team& team) {
    const int64_t size = call.head_size, width = call.n_heads * size;
    team.share(n_table * call.n_heads, [&](int64_t i) {
        const int64_t row = i / call.n_heads - low, head = i % call.n_heads;
        T* to = grad + (row + low) * width + head * size;
        if (row < 0 || row >= sizes.n_rows) {
            memset(to, 0, size * sizeof(T));
            return;
        }
        for (int64_t d = 0; d < size; d += VL) {
            vf total = {};
            for (int64_t part = 0; part < PARTS; part++)
                if (plan.starts[part] < plan.starts[part + 1])
                    total += load<vf>(parts + ((part * call.n_heads + head) * sizes.n_rows + row) * size + d);
            from_floats(to + d, total * factor);
        }
    });
}

template <typename T>
int backward(const T* qkv, const T* dout, T* grad, T* grad_keys, T* grad_queries, const Call& call,
             const Distances<T>& distances, int64_t n_table, const int32_t* cu_seqlens, int64_t n_seqs) {
    const Parts plan(cu_seqlens, n_seqs, call.n_rows);
    if (plan.status != 0) return plan.status;
    const int64_t size = call.head_size, n_heads = call.n_heads, width = n_heads * size;
    int64_t low, high;
    distances.find_rows(&low, &high, cu_seqlens, n_seqs);
    const Sizes sizes = {size, plan.longest, high - low + 1};
    Scratch none;
    const int64_t own = Scratch::layout(&none, NULL, sizes), n_sums = PARTS * n_heads * sizes.n_rows * size;
    float* memory = (float*)aligned_alloc(64, omp_get_max_threads() * own * sizeof(float));
    float* sums = (float*)calloc(2 * n_sums, sizeof(float));
    const bool enough = memory != NULL && sums != NULL;
    const float factor = (call.dropout.threshold > 0 ? call.dropout.scale() : 1.0f) * call.scale;
    if (enough)
        in_parallel([&](const Team& team) {
            Scratch s;
            Scratch::layout(&s, memory + team.id * own, sizes);
            team.each(PARTS * n_heads, [&](int64_t i) {
                const int64_t part = i / n_heads, head = i % n_heads;
                if (plan.starts[part] == plan.starts[part + 1]) return;
                if (distances.keys != NULL) {
                    copy_rows(s.pk, distances.keys + low * width + head * size, width, sizes.n_rows, size);
                    turn_rows(s.pk_columns, sizes.row_stride(), s.pk, sizes.n_rows, size);
                }
                if (distances.queries != NULL) {
                    copy_rows(s.pq, distances.queries + low * width + head * size, width, sizes.n_rows, size);
                    turn_rows(s.pq_columns, sizes.row_stride(), s.pq, sizes.n_rows, size);
                }
                float* to = sums + i * sizes.n_rows * size;
                for (int64_t b = plan.starts[part]; b < plan.starts[part + 1]; b++) {
                    const int64_t first = cu_seqlens[b], length = cu_seqlens[b + 1] - first;
                    if (length == 0) continue;
                    if (call.dropout.threshold > 0)
                        run<T, true>(qkv, dout, grad, call, distances, sizes, low, first, length, head, to, to + n_sums,
                                     s);
                    else
                        run<T, false>(qkv, dout, grad, call, distances, sizes, low, first, length, head, to,
                                      to + n_sums, s);
                }
            });
            team.share(call.n_rows - plan.n_tokens, [&](int64_t i) {  // rows that no sequence has
                memset(grad + (plan.n_tokens + i) * 3 * width, 0, 3 * width * sizeof(T));
            });
            if (grad_keys != NULL) add_parts(grad_keys, sums, plan, call, sizes, low, n_table, factor, team);
            if (grad_queries != NULL)
                add_parts(grad_queries, sums + n_sums, plan, call, sizes, low, n_table, factor, team);
        });
    free(memory);
    free(sums);
    return enough ? 0 : 1;
}

}  // namespace

// Returns the status of Parts. keys, queries, rows_of, radius, columns: the members of Distances; the first two are
// (n_table, N * D), and so are their gradients, which are NULL if they are NULL.
#define DISENTANGLED_BACKWARD(name, T)                                                                                \
    EXPORT int name(const T* qkv, int64_t qkv_stride, const T* dout, int64_t dout_stride, int64_t n_rows,             \
                    const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_heads, int64_t head_size, float scale,       \
                    int64_t threshold, uint64_t seed, int64_t site, const T* keys, const T* queries, int64_t n_table, \
                    const int32_t* rows_of, int64_t radius, const int32_t* columns, T* grad, T* grad_keys,            \
                    T* grad_queries) {                                                                                \
        const Call call = {n_rows, qkv_stride, dout_stride, n_heads, head_size, scale, {threshold, seed, site}};      \
        return backward<T>(qkv, dout, grad, grad_keys, grad_queries, call,                                            \
                           {{rows_of, radius, columns}, keys, queries}, n_table, cu_seqlens, n_seqs);                 \
    }

DISENTANGLED_BACKWARD(fastbert_disentangled_backward_float32, float)
DISENTANGLED_BACKWARD(fastbert_disentangled_backward_bfloat16, bf16)
