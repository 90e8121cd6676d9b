// Bidirectional attention over packed sequences of different lengths, on CPUs.
//
//     out = softmax(scale q k^T + bias) v    within each sequence and head
//
// qkv: (T, 3 * N * D), laid out [q | k | v], each (N, D), in float32 or bfloat16. cu_seqlens: (B + 1,) int32. out: (T,
// N * D). Statistics, softmax and sums are float32. bfloat16 products use VDPBF16PS if the processor has it. Then the
// probabilities are rounded to bfloat16, as in the Triton kernel. On other processors they are float32 products.
//
// A task is one head of up to CHUNK queries of one sequence. It packs the keys and values of the sequence once:
//
//     keys     [block of VL keys][D][VL]     a vector holds one element of VL keys     (pairs of elements in bfloat16)
//     values   [L][D]                        a vector holds VL elements of one value   (pairs of values in bfloat16)
//
// and takes ROWS queries at a time: their scores with all L keys stay in the L1 cache, so the softmax needs one pass.
// Bytes moved, from and to main memory: 4 * N * D elements a token.
//
// A bias (PositionBias) is spread once a task along the distances between any query and key of the sequence. Then the
// numbers of one query's keys are neighbours, and a score costs one more load and addition.
//
// Within a window (window >= 0) a task packs only the keys that its queries can see, and ROWS queries take the blocks
// of keys that one of them sees. The bias removes keys that are too far from each query.
//
// In training it saves lse, (N, T) float32, the logarithm of the sum of exp(scale q k^T) over the keys, 0 in rows of no
// sequence, and applies dropout to the probabilities.
#include "attention.h"

#include "attention_bias.h"
#include "attention_rows.h"

#include <stdlib.h>

namespace {

struct Scratch {
    float *keys, *values, *queries, *scores;
    uint64_t* keep;  // ROWS rows
    float* bias;     // of all distances, or (ROWS, padded)
};

struct Training {
    float* lse;
    Dropout dropout;
};

// The natural logarithm, to 1 ulp, for numbers that are not subnormal. x = 2^n m with m around 1; log(m) by Cephes'
// polynomial.
INLINE vf log(vf x) {
    const vi n = ((vi)x - 0x3f3504f3) >> 23;
    const vf f = (vf)((vi)x - (n << 23)) - 1.0f, whole = __builtin_convertvector(n, vf);
    vf p = splat(7.0376836292e-2f) * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const vf tail = f * f * (p * f - 0.5f) - whole * 2.12194440e-4f;
    return x - x == 0.0f ? whole * 0.693359375f + (f + tail) : x;
}

// lse: (n,), the largest scores, become the logarithms of the sums. totals: the sums of exp(score - largest).
INLINE void finish_lse(float* lse, const float* totals, int64_t n) {
    for (int64_t i = 0; i < n; i += VL)
        from_floats(lse + i, to_floats(lse + i, n - i) + log(to_floats(totals + i, n - i)), n - i);
}

template <typename T, typename O, Mode MODE, bool BIASED>
INLINE void run(const T* qkv, T* out, const Heads& shape, const AttentionPlan::Task& task, int64_t window, int64_t head,
                const Scratch& scratch, const Training& training, int64_t n_rows_in_all) {
    typedef typename O::E E;
    constexpr bool PAIRS = O::SIZE == 2;
    const int64_t size = shape.head_size, width = shape.n_heads * size, depth = size / O::SIZE;
    const int64_t padded = up(task.length, VL);
    const T* q = qkv + task.first * shape.row_stride + head * size;
    E *all_keys = (E*)scratch.keys, *all_values = (E*)scratch.values;
    pack_keys<O>(all_keys, q + width, task.length, padded / VL, depth, shape.row_stride);
    pack_values<O>(all_values, q + 2 * width, task.length, size, shape.row_stride);

    const int32_t* columns = BIASED && shape.bias.columns != NULL ? shape.bias.columns + task.first : NULL;
    if (BIASED && columns == NULL) spread(scratch.bias, shape.bias, head, task.length, padded);

    const Masks masks(training.dropout, head);
    const float factor = training.dropout.scale();
    float* lse = MODE == INFERENCE ? NULL : training.lse + head * n_rows_in_all + task.first;
    float all_totals[CHUNK];
    const int64_t end = task.end;
    for (int64_t row = task.chunk; row < end; row += ROWS) {
        const int n_rows = (int)least(end - row, ROWS);
        const int64_t first = task.first + row;
        // The first key that one of them sees, rounded to a whole block, and the number of keys from it on.
        const int64_t from = BIASED && window >= 0 && row > window ? (row - window) / VL * VL : 0;
        const int64_t length = (BIASED && window >= 0 ? least(task.length, row + n_rows + window) : task.length) - from;
        const int64_t n_blocks = over(length, VL), n_values = over(length, O::SIZE);
        const E *keys = all_keys + from * depth, *values = all_values + from / O::SIZE * size;
        const E *queries[ROWS], *p[ROWS];
        float tops[ROWS], totals[ROWS];
        const float* bias[ROWS];
        for (int i = 0; i < ROWS; i++) {
            const int last = i < n_rows ? i : n_rows - 1;  // the last one again at the end
            if (BIASED && columns == NULL) {
                bias[i] = scratch.bias + task.length - 1 - row - last + from;
            } else if (BIASED) {
                float* line = scratch.bias + i * padded;
                spread_row(line, shape.bias, head, columns, row + last, from, from + length, n_blocks * VL);
                bias[i] = line;
            }
            const T* query = q + (row + last) * shape.row_stride;
            queries[i] = (const E*)query;
            p[i] = (const E*)(scratch.scores + last * padded);
            if (!PAIRS && sizeof(T) != sizeof(E)) {
                for (int64_t d = 0; d < size; d += VL) store(scratch.queries + i * size + d, to_floats(query + d));
                queries[i] = (const E*)(scratch.queries + i * size);
            }
        }
        const int64_t n_words = over(length, 64);
        if (MODE == TRAINING_WITH_DROPOUT)
            draw(scratch.keep, n_words, masks, first, n_rows, task.before + from, length);
#define ALL_KEYS(N)                                                                                         \
    probabilities_of<N, O, MODE, BIASED>(scratch.scores, padded, queries, keys, depth, shape.scale, length, \
                                         scratch.keep, tops, totals, bias)
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
                IN_VECTORS(n_blocks, at,
                           products_in_parts<N, O>(scratch.scores + at * VL, padded, queries, keys + at * depth * VL,
                                                   depth, depth, DEPTH, shape.scale))
                for (int i = 0; BIASED && i < n_rows; i++)
                    for (int64_t j = 0; j < n_blocks * VL; j++) scratch.scores[i * padded + j] += bias[i][j];
            } else {
                IN_VECTORS(n_blocks, at,
                           scores_of<N, O, BIASED>(scratch.scores + at * VL, padded, queries, keys + at * depth * VL,
                                                   depth, shape.scale, bias, at))
            }
            for (int i = 0; i < n_rows; i++)
                softmax<PAIRS, MODE>(scratch.scores + i * padded, length, n_blocks * VL, scratch.keep + i * n_words,
                                     tops + i, totals + i);
        }
        for (int i = 0; MODE != INFERENCE && i < n_rows; i++) {
            lse[row + i] = tops[i];
            all_totals[row - task.chunk + i] = totals[i];
        }
        if (MODE == TRAINING_WITH_DROPOUT)
            for (int i = 0; i < n_rows; i++) totals[i] /= factor;
        T* outs = out + first * shape.out_stride + head * size;
        IN_VECTORS(
            size / VL, at,
            outputs_of<N, O>(outs + at * VL, shape.out_stride, totals, p, values + at * VL, n_values, size, n_rows))
    }
    if (MODE != INFERENCE) finish_lse(lse + task.chunk, all_totals, end - task.chunk);
}

template <typename T, typename O, Mode MODE, bool BIASED>
void run_all(const T* qkv, T* out, const Heads& shape, const AttentionPlan& plan, const Team& team,
             const Training& training) {
    const int64_t size = shape.head_size, n_heads = shape.n_heads, n_tasks = plan.n_tasks * n_heads;
    float* memory = plan.scratch(team.id);
    const Scratch scratch = {memory,
                             memory + plan.padded * size,
                             memory + 2 * plan.padded * size,
                             memory + 2 * plan.padded * size + ROWS * size,
                             (uint64_t*)(memory + 2 * plan.padded * size + ROWS * (size + plan.padded)),
                             memory + 2 * plan.padded * size + ROWS * (size + plan.padded + 2 * over(plan.padded, 64))};
    team.each(n_tasks + plan.n_rows - plan.n_tokens, [&](int64_t i) {
        if (i < n_tasks) {
            run<T, O, MODE, BIASED>(qkv, out, shape, plan.tasks[i / n_heads], plan.window, i % n_heads, scratch,
                                    training, plan.n_rows);
            return;
        }
        const int64_t row = plan.n_tokens + i - n_tasks;  // that no sequence has
        memset(out + row * shape.out_stride, 0, n_heads * size * sizeof(T));
        if (MODE != INFERENCE)
            for (int64_t head = 0; head < n_heads; head++) training.lse[head * plan.n_rows + row] = 0.0f;
    });
}

}  // namespace

AttentionPlan::AttentionPlan(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows, int64_t head_size, bool biased,
                             int64_t window)
    : n_rows(n_rows), window(window), status(2) {
    int64_t longest = 0;
    if (n_seqs < 0 || cu_seqlens[0] != 0) return;
    for (int64_t b = 0; b < n_seqs; b++) {
        const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
        if (length < 0 || cu_seqlens[b + 1] > n_rows) return;
        n_tasks += over(length, CHUNK);
        const int64_t seen = window < 0 ? length : least(length, CHUNK + 2 * window + 7);
        longest = seen > longest ? seen : longest;
    }
    n_tokens = cu_seqlens[n_seqs];
    padded = up(longest, VL);
    const int64_t n_bias = biased ? ROWS * padded : 0;  // which is more than all distances
    scratch_size =
        up(2 * padded * head_size + ROWS * (head_size + padded + 2 * over(padded, 64)) + n_bias, 64 / sizeof(float));
    status = 0;
    if (n_tasks == 0) return;
    tasks = (Task*)malloc(n_tasks * sizeof(Task));
    memory = (float*)aligned_alloc(64, omp_get_max_threads() * scratch_size * sizeof(float));
    status = tasks == NULL || memory == NULL;
    if (status != 0) return;
    Task* task = tasks;
    for (int64_t b = 0; b < n_seqs; b++) {
        const int64_t first = cu_seqlens[b], length = cu_seqlens[b + 1] - first;
        for (int64_t chunk = 0; chunk < length; chunk += CHUNK) {
            const int64_t end = least(chunk + CHUNK, length);
            // The keys that a query can see. Eight columns share a draw of dropout.
            const int64_t from = window < 0 || chunk < window ? 0 : (chunk - window) / 8 * 8;
            const int64_t to = window < 0 ? length : least(end + window, length);
            *task++ = {first + from, to - from, chunk - from, end - from, from};
        }
    }
}

AttentionPlan::~AttentionPlan() {
    free(tasks);
    free(memory);
}

void attention(const float* qkv, float* out, const Heads& heads, const AttentionPlan& plan, const Team& team) {
    if (heads.bias.table != NULL) run_all<float, Floats, INFERENCE, true>(qkv, out, heads, plan, team, {});
    else run_all<float, Floats, INFERENCE, false>(qkv, out, heads, plan, team, {});
}

void attention(const bf16* qkv, bf16* out, const Heads& heads, const AttentionPlan& plan, const Team& team) {
    if (heads.bias.table != NULL) run_all<bf16, BFloat16Operands, INFERENCE, true>(qkv, out, heads, plan, team, {});
    else run_all<bf16, BFloat16Operands, INFERENCE, false>(qkv, out, heads, plan, team, {});
}

// table, radius, columns: the members of PositionBias.
#define ATTENTION(name, T)                                                                                           \
    EXPORT int name(const T* qkv, int64_t row_stride, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs,     \
                    int64_t n_heads, int64_t head_size, float scale, T* out, int64_t out_stride, const float* table, \
                    int64_t radius, const int32_t* columns, int64_t window) {                                        \
        const AttentionPlan plan(cu_seqlens, n_seqs, n_rows, head_size, table != NULL, window);                      \
        if (plan.status != 0) return plan.status;                                                                    \
        const Heads heads = {row_stride, n_heads, head_size, out_stride, scale, {table, radius, columns}};           \
        in_parallel([&](const Team& team) { attention(qkv, out, heads, plan, team); });                              \
        return 0;                                                                                                    \
    }

ATTENTION(fastbert_attention_float32, float)
ATTENTION(fastbert_attention_bfloat16, bf16)

namespace {
template <typename T, typename O, bool BIASED>
void train(const T* qkv, T* out, const Heads& heads, const AttentionPlan& plan, const Team& team,
           const Training& training) {
    if (training.dropout.threshold > 0)
        run_all<T, O, TRAINING_WITH_DROPOUT, BIASED>(qkv, out, heads, plan, team, training);
    else run_all<T, O, TRAINING, BIASED>(qkv, out, heads, plan, team, training);
}

}  // namespace

#define ATTENTION_TRAINING(name, T, O)                                                                           \
    EXPORT int name(const T* qkv, int64_t row_stride, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, \
                    int64_t n_heads, int64_t head_size, float scale, T* out, int64_t out_stride, float* lse,     \
                    int64_t threshold, uint64_t seed, int64_t site, const float* table, int64_t radius,          \
                    const int32_t* columns, int64_t window) {                                                    \
        const AttentionPlan plan(cu_seqlens, n_seqs, n_rows, head_size, table != NULL, window);                  \
        if (plan.status != 0) return plan.status;                                                                \
        const Heads heads = {row_stride, n_heads, head_size, out_stride, scale, {table, radius, columns}};       \
        const Training training = {lse, {threshold, seed, site}};                                                \
        in_parallel([&](const Team& team) {                                                                      \
            if (table != NULL) train<T, O, true>(qkv, out, heads, plan, team, training);                         \
            else train<T, O, false>(qkv, out, heads, plan, team, training);                                      \
        });                                                                                                      \
        return 0;                                                                                                \
    }

ATTENTION_TRAINING(fastbert_attention_training_float32, float, Floats)
ATTENTION_TRAINING(fastbert_attention_training_bfloat16, bf16, BFloat16Operands)
