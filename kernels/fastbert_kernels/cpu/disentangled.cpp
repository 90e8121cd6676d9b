// Disentangled attention over packed sequences of different lengths, on CPUs.
//
//     out = softmax(scale (q_i k_j + q_i pk[b(i - j)] + k_j pq[b(i - j)])) v    within each sequence and head
//
// qkv: (T, 3 * N * D), laid out [q | k | v], each (N, D), in float32 or bfloat16. keys (pk) and queries (pq): (2R, N *
// D), of the same type, NULL for a missing term. b maps a distance in columns to one of their rows: rows_of, (2M + 1,),
// for the distances from -M to M, never decreases; farther ones have the row of the last. out: (T, N * D). Sums are
// float32.
//
// First the rows of pk and pq that a sequence of the batch needs are packed, once for all. A task is one head of up to
// CHUNK queries of one sequence, as in attention.cpp. The terms of distances in its scores go into lines of L keys:
//
//     k_j pq    for ROWS keys at a time, of the rows that its queries need, and from there to the places of the queries
//     q_i pk    for ROWS queries at a time; pk is in falling order, so that neighbouring keys have neighbouring places
//
// The lines are then the bias that attention adds. There is one for each query of a task, never for all pairs of a
// batch. Source: He et al., "DeBERTa", 2020, arXiv:2006.03654.
#include "disentangled.h"

#include "attention_rows.h"

#include <stdlib.h>

namespace {

// The rows that sequences of the batch need, packed for each head.
template <typename E>
struct Packed {
    E *keys, *queries;                   // [head][block of VL rows][depth][VL]; keys from high to low
    int64_t low, high, n_blocks, exact;  // as in DisentangledPlan
};

struct Extra {
    float *lines, *tile;  // (CHUNK, line_stride), (ROWS, tile_stride)
    int64_t line_stride, tile_stride;
};

// to[i][block * VL ...] = scale * x_i y^T for ROWS rows x and the blocks of packed rows y.
template <typename O>
INLINE void multiply(float* to, int64_t stride, const typename O::E* const* x, const typename O::E* y, int64_t n_blocks,
                     int64_t depth, float scale) {
    if (depth > DEPTH) {
        IN_VECTORS(n_blocks, at,
                   products_in_parts<N, O>(to + at * VL, stride, x, y + at * depth * VL, depth, depth, DEPTH, scale))
    } else {
        IN_VECTORS(n_blocks, at,
                   scores_of<N, O, false>(to + at * VL, stride, x, y + at * depth * VL, depth, scale, NULL, 0))
    }
}

// The rows of x from `row` on, with the last one repeated at the end; as floats if they are multiplied as floats.
template <typename O, typename T>
INLINE void point_to(const typename O::E** rows, const T* x, int64_t row, int n_rows, int64_t stride, int64_t size,
                     float* floats) {
    typedef typename O::E E;
    for (int i = 0; i < ROWS; i++) {
        const T* from = x + (row + (i < n_rows ? i : n_rows - 1)) * stride;
        rows[i] = (const E*)from;
        if (O::SIZE == 1 && sizeof(T) != sizeof(E)) {
            for (int64_t d = 0; d < size; d += VL) store(floats + i * size + d, to_floats(from + d));
            rows[i] = (const E*)(floats + i * size);
        }
    }
}

template <typename T, typename O, Mode MODE>
INLINE void run(const T* qkv, T* out, const Heads& shape, const Distances<T>& distances,
                const Packed<typename O::E>& packed, const AttentionPlan::Task& task, int64_t head, float* scratch,
                int64_t longest, const Extra& extra, const Dropout& dropout) {
    typedef typename O::E E;
    constexpr bool PAIRS = O::SIZE == 2;
    const int64_t size = shape.head_size, width = shape.n_heads * size, length = task.length;
    const int64_t n_blocks = over(length, VL), padded = n_blocks * VL, stride = shape.row_stride;
    const int64_t depth = size / O::SIZE, n_values = over(length, O::SIZE), of_head = packed.n_blocks * depth * VL;
    const T* q = qkv + task.first * stride + head * size;
    E *keys = (E*)scratch, *values = (E*)(scratch + longest * size);
    float *floats = scratch + 2 * longest * size, *scores = floats + ROWS * size;
    uint64_t* keep = (uint64_t*)(scores + ROWS * longest);
    const Masks masks(dropout, head);
    const int64_t n_words = over(length, 64);
    pack_keys<O>(keys, q + width, length, n_blocks, depth, stride);
    pack_values<O>(values, q + 2 * width, length, size, stride);
    const int32_t* columns = distances.columns == NULL ? NULL : distances.columns + task.first;
    const auto column = [&](int64_t row) -> int64_t { return columns == NULL ? row : columns[row]; };
    float* const lines = extra.lines - task.chunk * extra.line_stride;
    const int64_t end = task.end;

    if (distances.queries != NULL) {
        const E* tables = packed.queries + head * of_head;
        for (int64_t key = 0; key < length; key += ROWS) {
            const int n_keys = (int)least(length - key, ROWS);
            const E* rows[ROWS];
            point_to<O>(rows, q + width, key, n_keys, stride, size, floats);
            const int64_t first = (distances.row(column(task.chunk) - column(key + n_keys - 1)) - packed.low) / VL;
            const int64_t last = (distances.row(column(end - 1) - column(key)) - packed.low) / VL;
            multiply<O>(extra.tile, extra.tile_stride, rows, tables + first * depth * VL, last - first + 1, depth,
                        shape.scale);
            const int64_t start = packed.low + first * VL;
            for (int64_t row = task.chunk; row < end; row++)
                for (int i = 0; i < n_keys; i++)
                    lines[row * extra.line_stride + key + i] =
                        extra.tile[i * extra.tile_stride + distances.row(column(row) - column(key + i)) - start];
        }
    }

    for (int64_t row = task.chunk; row < end; row += ROWS) {
        const int n_rows = (int)least(end - row, ROWS);
        const E *queries[ROWS], *p[ROWS];
        float tops[ROWS], totals[ROWS];
        const float* bias[ROWS];
        point_to<O>(queries, q, row, n_rows, stride, size, floats);
        for (int i = 0; i < ROWS; i++) {
            const int last = i < n_rows ? i : n_rows - 1;
            p[i] = (const E*)(scores + last * padded);
            bias[i] = lines + (row + last) * extra.line_stride;
        }
        if (distances.keys != NULL) {
            const E* tables = packed.keys + head * of_head;
            const int64_t first = (packed.high - distances.row(column(row + n_rows - 1) - column(0))) / VL;
            const int64_t last = (packed.high - distances.row(column(row) - column(length - 1))) / VL;
            multiply<O>(extra.tile, extra.tile_stride, queries, tables + first * depth * VL, last - first + 1, depth,
                        shape.scale);
            const int64_t start = packed.high - first * VL;
            for (int i = 0; i < n_rows; i++) {
                float *line = lines + (row + i) * extra.line_stride, *tile = extra.tile + i * extra.tile_stride;
                for (int64_t key = 0; key < length; key += VL) {
                    const int64_t n = least(length - key, VL), farthest = row + i - key, nearest = farthest - n + 1;
                    if (columns == NULL && n == VL && farthest <= packed.exact && nearest >= -packed.exact) {
                        const vf terms = load<vf>(tile + start - distances.row(farthest));
                        store(line + key, distances.queries == NULL ? terms : load<vf>(line + key) + terms);
                        continue;
                    }
                    for (int64_t j = key; j < key + n; j++) {
                        const float term = tile[start - distances.row(column(row + i) - column(j))];
                        line[j] = distances.queries == NULL ? term : line[j] + term;
                    }
                }
            }
        }
        if (MODE == TRAINING_WITH_DROPOUT) draw(keep, n_words, masks, task.first + row, n_rows, 0, length);
#define ALL_KEYS(N)                                                                                                   \
    probabilities_of<N, O, MODE, true>(scores, padded, queries, keys, depth, shape.scale, length, keep, tops, totals, \
                                       bias)
        const int64_t n_in_registers = depth > DEPTH ? 0 : n_blocks;
        if (n_in_registers == 1) {
            ALL_KEYS(1);
        } else if (n_in_registers == 2) {
            ALL_KEYS(2);
        } else if (VECTORS == 4 && n_in_registers == 3) {
            ALL_KEYS(3);
        } else if (VECTORS == 4 && n_in_registers == 4) {
            ALL_KEYS(4);
        } else {
            if (depth > DEPTH) {
                multiply<O>(scores, padded, queries, keys, n_blocks, depth, shape.scale);
                for (int i = 0; i < n_rows; i++)
                    for (int64_t j = 0; j < padded; j++) scores[i * padded + j] += bias[i][j];
            } else {
                IN_VECTORS(n_blocks, at,
                           scores_of<N, O, true>(scores + at * VL, padded, queries, keys + at * depth * VL, depth,
                                                 shape.scale, bias, at))
            }
            for (int i = 0; i < n_rows; i++)
                softmax<PAIRS, MODE>(scores + i * padded, length, padded, keep + i * n_words, tops + i, totals + i);
        }
        if (MODE == TRAINING_WITH_DROPOUT)
            for (int i = 0; i < n_rows; i++) totals[i] /= dropout.scale();
        T* outs = out + (task.first + row) * shape.out_stride + head * size;
        IN_VECTORS(
            size / VL, at,
            outputs_of<N, O>(outs + at * VL, shape.out_stride, totals, p, values + at * VL, n_values, size, n_rows))
    }
}

template <typename T, typename O, Mode MODE>
void attend(const T* qkv, T* out, const Heads& shape, const AttentionPlan& plan, const DisentangledPlan& rows,
            const Distances<T>& distances, const Team& team, const Dropout& dropout) {
    typedef typename O::E E;
    const int64_t size = shape.head_size, n_heads = shape.n_heads, width = n_heads * size, depth = size / O::SIZE;
    const int64_t n_packed = rows.high - rows.low + 1, of_head = rows.n_blocks * depth * VL;
    const Packed<E> packed = {(E*)rows.keys, (E*)rows.queries, rows.low, rows.high, rows.n_blocks, rows.exact};
    team.each(2 * n_heads, [&](int64_t i) {
        const int64_t head = i / 2;
        if (i % 2 == 0 && distances.keys != NULL)
            pack_keys<O, true>(packed.keys + head * of_head, distances.keys + packed.high * width + head * size,
                               n_packed, packed.n_blocks, depth, -width);
        if (i % 2 == 1 && distances.queries != NULL)
            pack_keys<O, true>(packed.queries + head * of_head, distances.queries + packed.low * width + head * size,
                               n_packed, packed.n_blocks, depth, width);
    });
    float* own = rows.scratch(team.id);
    const Extra extra = {own, own + CHUNK * rows.line_stride, rows.line_stride, rows.tile_stride};
    const int64_t n_tasks = plan.n_tasks * n_heads;
    team.each(n_tasks + plan.n_rows - plan.n_tokens, [&](int64_t i) {
        if (i < n_tasks)
            run<T, O, MODE>(qkv, out, shape, distances, packed, plan.tasks[i / n_heads], i % n_heads,
                            plan.scratch(team.id), plan.padded, extra, dropout);
        else memset(out + (plan.n_tokens + i - n_tasks) * shape.out_stride, 0, width * sizeof(T));
    });
}

}  // namespace

DisentangledPlan::DisentangledPlan(const Buckets& buckets, const Heads& shape, const AttentionPlan& plan,
                                   const int32_t* cu_seqlens, int64_t n_seqs) {
    buckets.find_rows(&low, &high, cu_seqlens, n_seqs);
    while (exact < buckets.radius && buckets.row(exact + 1) - buckets.row(0) == exact + 1 &&
           buckets.row(0) - buckets.row(-exact - 1) == exact + 1)
        exact++;
    n_blocks = over(high - low + 1, VL);
    line_stride = plan.padded + VL;
    tile_stride = (n_blocks + 1) * VL;
    scratch_size = up(CHUNK * line_stride + ROWS * tile_stride, 64 / sizeof(float));
    const int64_t table = up(shape.n_heads * n_blocks * shape.head_size * VL, 64 / sizeof(float));
    keys = (float*)aligned_alloc(64, 2 * table * sizeof(float));
    memory = (float*)aligned_alloc(64, omp_get_max_threads() * scratch_size * sizeof(float));
    queries = keys + table;
    status = keys == NULL || memory == NULL;
}

DisentangledPlan::~DisentangledPlan() {
    free(keys);
    free(memory);
}

void disentangled_attention(const float* qkv, float* out, const Heads& heads, const AttentionPlan& plan,
                            const DisentangledPlan& rows, const Distances<float>& distances, const Team& team) {
    attend<float, Floats, INFERENCE>(qkv, out, heads, plan, rows, distances, team, {});
}

void disentangled_attention(const bf16* qkv, bf16* out, const Heads& heads, const AttentionPlan& plan,
                            const DisentangledPlan& rows, const Distances<bf16>& distances, const Team& team) {
    attend<bf16, BFloat16Operands, INFERENCE>(qkv, out, heads, plan, rows, distances, team, {});
}

// keys, queries, rows_of, radius, columns: the members of Distances; threshold, seed, site: those of Dropout.
#define DISENTANGLED(name, T, O)                                                                                 \
    EXPORT int name(const T* qkv, int64_t row_stride, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, \
                    int64_t n_heads, int64_t head_size, float scale, T* out, int64_t out_stride, const T* keys,  \
                    const T* queries, const int32_t* rows_of, int64_t radius, const int32_t* columns,            \
                    int64_t threshold, uint64_t seed, int64_t site) {                                            \
        const AttentionPlan plan(cu_seqlens, n_seqs, n_rows, head_size);                                         \
        if (plan.status != 0) return plan.status;                                                                \
        const Heads heads = {row_stride, n_heads, head_size, out_stride, scale, {}};                             \
        const Buckets buckets = {rows_of, radius, columns};                                                      \
        const DisentangledPlan rows(buckets, heads, plan, cu_seqlens, n_seqs);                                   \
        if (rows.status != 0) return rows.status;                                                                \
        const Distances<T> distances = {buckets, keys, queries};                                                 \
        const Dropout dropout = {threshold, seed, site};                                                         \
        in_parallel([&](const Team& team) {                                                                      \
            if (threshold > 0)                                                                                   \
                attend<T, O, TRAINING_WITH_DROPOUT>(qkv, out, heads, plan, rows, distances, team, dropout);      \
            else attend<T, O, INFERENCE>(qkv, out, heads, plan, rows, distances, team, dropout);                 \
        });                                                                                                      \
        return 0;                                                                                                \
    }

DISENTANGLED(fastbert_disentangled_attention_float32, float, Floats)
DISENTANGLED(fastbert_disentangled_attention_bfloat16, bf16, BFloat16Operands)
