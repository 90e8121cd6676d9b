// The plan of attention's backward pass for one batch: its tasks, and memory for each thread.
#pragma once

#include <stdlib.h>

#include <initializer_list>

#include "attention_bias.h"
#include "attention_tiles.h"
#include "team.h"

namespace {

constexpr int64_t QUERIES = 12 * ROWS, KEYS = 512;  // of a tile, at most
constexpr int64_t STRIDE = KEYS + VL;               // of its rows: no power of two, whose lines would share few sets
constexpr int64_t SUMS = QUERIES + STRIDE;          // distances in a tile, in whole vectors, and more
constexpr int64_t PIECE = 128;                      // the longest chain of sums, so that its rounding does not grow
constexpr int64_t PART = 8;                         // blocks of queries in a task for some of a long sequence's queries

struct Call {
    int64_t n_rows, qkv_stride, dout_stride, out_stride, n_heads, head_size;
    float scale;
    Dropout dropout;
    PositionBias bias;
    int64_t window;  // how many tokens a query sees on either side, beyond which the bias leaves nothing; -1 for all
    bool windowed() const { return window >= 0; }
    bool has_table() const { return bias.table != NULL && !windowed(); }  // one that has a gradient
};

// Blocks of equal size, at most `most`. They follow from the length alone, and so do all sums.
struct Blocks {
    int64_t n, size;
    Blocks(int64_t length, int64_t most, int64_t step) : size(up(over(length, over(length, most)), step)) {
        n = over(length, size);
    }
};

// The blocks from begin to end: those of queries that see some of n keys from `first` on, or the other way round.
struct Near {
    int64_t begin, end;
    Near(const Call& call, const Blocks& blocks, int64_t first, int64_t n, int64_t length) : begin(0), end(blocks.n) {
        if (!call.windowed()) return;
        begin = first > call.window ? (first - call.window) / blocks.size : 0;
        end = over(least(first + n + call.window, length), blocks.size);
    }
};

// Blocks of keys and of queries of one sequence. With dk_dv they are all queries, with dq all keys.
struct Task {
    int64_t first, length;
    int64_t key_block, key_end, query_block, query_end;
    bool dk_dv, dq;
    int64_t part;  // the number of its sequence's first PART blocks of queries among those of all sequences
};

class Plan {
   public:
    Task* tasks = NULL;
    int64_t n_tasks = 0, n_tokens = 0, longest = 0, n_parts = 0;
    float* bias_parts = NULL;  // (n_parts, N, width): sums of the bias's gradient, over one part's queries each
    int status = 2;            // as AttentionPlan's

    Plan(const int32_t* cu_seqlens, int64_t n_seqs, const Call& call);
    ~Plan() {
        free(tasks);
        free(memory);
        free(bias_parts);
    }
    Plan(const Plan&) = delete;
    float* scratch(int thread) const { return memory + thread * scratch_size; }

   private:
    float* memory = NULL;
    int64_t scratch_size = 0;

    void add_tasks(int64_t first, int64_t length, bool in_parts);
    void add(const Task& task) {
        if (tasks != NULL) tasks[n_tasks] = task;
        n_tasks++;
    }
};

// A thread's memory: tiles, and dq and delta of a whole sequence. Rows of p and dp hold STRIDE numbers.
struct Scratch {
    float *p, *dp, *ds, *k_columns, *v_columns, *k_rows, *dk, *dv, *q_rows, *dout_rows, *delta, *dq;
    float *line, *sums;  // of a bias: its value at each distance, and the sums of ds at each distance in a tile
    uint64_t* keep;      // rows of KEYS bits

    Scratch(float* memory, int64_t head_size, int64_t longest, bool biased) {
        const int64_t n_keys = keys_of(longest);
        const auto take = [&](int64_t n) { return memory += n, memory - n; };
        for (float** tile : {&p, &dp, &ds}) *tile = take(QUERIES * STRIDE);
        for (float** rows : {&k_columns, &v_columns, &k_rows, &dk, &dv}) *rows = take(n_keys * head_size);
        for (float** rows : {&q_rows, &dout_rows}) *rows = take(QUERIES * head_size);
        keep = (uint64_t*)take(QUERIES * KEYS / 32);
        delta = take(up(longest, 16));
        dq = take(longest * head_size);
        if (biased) sums = take(SUMS + STRIDE), line = take(line_size(longest));
    }
    // The same memory from a key on, a whole number of vectors after the first. pair: elements in one element of a
    // product.
    Scratch from(int64_t key, int64_t head_size, int64_t pair) const {
        Scratch part = *this;
        for (float** rows : {&part.k_columns, &part.v_columns, &part.k_rows}) *rows += key * head_size / pair;
        for (float** rows : {&part.dk, &part.dv}) *rows += key * head_size;
        return part;
    }
    static int64_t line_size(int64_t longest) { return 2 * up(longest, 16) + 2 * VL; }
    static int64_t keys_of(int64_t longest) { return least(KEYS, up(longest, VL)); }
    static int64_t size(int64_t head_size, int64_t longest, bool biased) {
        return (biased ? SUMS + STRIDE + line_size(longest) : 0) + 3 * QUERIES * STRIDE + QUERIES * KEYS / 32 +
               (5 * keys_of(longest) + 2 * QUERIES + longest) * head_size + up(longest, 16);
    }
};

inline void Plan::add_tasks(int64_t first, int64_t length, bool in_parts) {
    const Blocks keys(length, KEYS, VL), queries(length, QUERIES, ROWS);
    const int64_t part = n_parts;
    n_parts += over(queries.n, PART);
    if (!in_parts) return add({first, length, 0, keys.n, 0, queries.n, true, true, part});
    for (int64_t i = 0; i < keys.n; i++) add({first, length, i, i + 1, 0, queries.n, true, false, part});
    for (int64_t i = 0; i < queries.n; i += PART)
        add({first, length, 0, keys.n, i, least(i + PART, queries.n), false, true, part});
}

inline Plan::Plan(const int32_t* cu_seqlens, int64_t n_seqs, const Call& call) {
    if (n_seqs < 0 || cu_seqlens[0] != 0) return;
    double work = 0;
    for (int64_t b = 0; b < n_seqs; b++) {
        const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
        if (length < 0 || cu_seqlens[b + 1] > call.n_rows) return;
        longest = length > longest ? length : longest;
        work += (double)length * length * call.n_heads;
    }
    n_tokens = cu_seqlens[n_seqs];
    status = 0;
    if (n_tokens == 0) return;
    const int64_t n_threads = omp_get_max_threads();
    const auto in_parts = [&](double length) { return length > KEYS && length * length * n_threads > work; };
    for (int turn = 0; turn < 2; turn++) {  // count the tasks, then list them
        n_tasks = n_parts = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const int64_t first = cu_seqlens[b], length = cu_seqlens[b + 1] - first;
            if (length > 0) add_tasks(first, length, in_parts(length));
        }
        if (turn == 0) tasks = (Task*)malloc(n_tasks * sizeof(Task));
        if (tasks == NULL) break;
    }
    scratch_size = Scratch::size(call.head_size, longest, call.bias.table != NULL);
    memory = (float*)aligned_alloc(64, n_threads * scratch_size * sizeof(float));
    status = tasks == NULL || memory == NULL;
    if (!call.has_table()) return;
    bias_parts = (float*)calloc(n_parts * call.n_heads * call.bias.width(), sizeof(float));
    status |= bias_parts == NULL;
}

}  // namespace
