// The tiles of attention's kernels on GPUs, listed on the host. fastbert_kernels/work_list.py describes them.
#include "work_list.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t SPAN_BITS = 16;

// Neighbours that form a tile, or the slices of one sequence: sequences first to end.
struct Run {
    int32_t first, end;
};

bool chosen(const int32_t* offsets, int64_t seq, const Cutting& cutting) {
    int64_t length = offsets[seq + 1] - offsets[seq];
    return length > cutting.longer_than && length <= cutting.up_to;
}

// The next run from `seq` on, or one without sequences at the end. Empty sequences are skipped, or within a run.
Run next_run(const int32_t* offsets, int64_t n_seqs, int64_t seq, const Cutting& cutting) {
    while (seq < n_seqs && !chosen(offsets, seq, cutting)) seq++;
    if (seq == n_seqs) return {(int32_t)seq, (int32_t)seq};
    int64_t first = seq++, limit = offsets[first] + cutting.block_q;
    if (cutting.share)
        for (int64_t i = seq; i < n_seqs && offsets[i + 1] <= limit; i++)
            if (offsets[i + 1] > offsets[i]) seq = i + 1;
    return {(int32_t)first, (int32_t)seq};
}

bool is_shared(const int32_t* offsets, Run run) {
    for (int64_t seq = run.first + 1; seq < run.end; seq++)
        if (offsets[seq + 1] > offsets[seq]) return true;
    return false;
}

void write_spans(const int32_t* offsets, Run run, bool shared, int32_t* row_spans) {
    int64_t start = offsets[run.first];
    for (int64_t seq = run.first; seq < run.end; seq++) {
        uint32_t begin = offsets[seq] - start, end = offsets[seq + 1] - start;
        int32_t span = shared ? (int32_t)(begin | end << SPAN_BITS) : 0;
        std::fill(row_spans + offsets[seq], row_spans + offsets[seq + 1], span);
    }
}

}  // namespace

int64_t count_tiles(const int32_t* offsets, int64_t n_seqs, const Cutting& cutting) {
    int64_t n_tiles = 0;
    for (Run run = next_run(offsets, n_seqs, 0, cutting); run.first < run.end;
         run = next_run(offsets, n_seqs, run.end, cutting))
        n_tiles += over(offsets[run.end] - offsets[run.first], cutting.block_q);
    return n_tiles;
}

int64_t write_tiles(const int32_t* offsets, int64_t n_seqs, const Cutting& cutting, int32_t* tiles, int64_t room,
                    int32_t* row_spans, bool* any_shared) {
    // Runs, and their order: the longest first, and equal ones as they come. A key has both in one number.
    static thread_local std::vector<Run> runs;
    static thread_local std::vector<uint64_t> order;
    runs.clear(), order.clear();
    int64_t n_tiles = 0;
    for (Run run = next_run(offsets, n_seqs, 0, cutting); run.first < run.end;
         run = next_run(offsets, n_seqs, run.end, cutting)) {
        uint32_t length = offsets[run.end] - offsets[run.first];
        n_tiles += over(length, cutting.block_q);
        order.push_back((uint64_t)~length << 32 | runs.size());
        runs.push_back(run);
    }
    if (n_tiles > room) return TOO_MANY_TILES;
    if (!std::is_sorted(order.begin(), order.end())) std::sort(order.begin(), order.end());
    *any_shared = false;
    for (uint64_t key : order) {
        Run run = runs[(uint32_t)key];
        int32_t start = offsets[run.first], end = offsets[run.end];
        bool shared = is_shared(offsets, run);
        *any_shared |= shared;
        for (int64_t first = start; first < end; first += cutting.block_q, tiles += N_COLUMNS) {
            tiles[0] = first, tiles[1] = least(first + cutting.block_q, end);
            tiles[2] = start, tiles[3] = end, tiles[4] = shared;
        }
        if (row_spans != nullptr) write_spans(offsets, run, shared, row_spans);
    }
    return n_tiles;
}

// The list of a batch: 2 n + s for n tiles, s = 1 if one of them is shared, or TOO_MANY_TILES.
EXPORT int64_t fastbert_work_list(const int32_t* offsets, int64_t n_seqs, int64_t block_q, int64_t share,
                                  int64_t longer_than, int64_t up_to, int32_t* tiles, int64_t room,
                                  int32_t* row_spans) {
    bool any_shared = false;
    Cutting cutting{block_q, share, longer_than, up_to};
    int64_t n_tiles = write_tiles(offsets, n_seqs, cutting, tiles, room, row_spans, &any_shared);
    return n_tiles == TOO_MANY_TILES ? n_tiles : 2 * n_tiles + any_shared;
}

// The sizes of large and of small tiles, and the most tokens of a batch, or of a text on average over tokens, that
// takes the small ones. small_q is 0 if there are none. batches.py has the same members.
struct TileChoice {
    int64_t block_q, share, small_q, share_small, few_tokens, short_texts;
};

// Chooses the tiles of a batch, and returns their number: 2 n + s, s = 1 for the small ones.
EXPORT int64_t fastbert_suitable_tiles(const int32_t* offsets, int64_t n_seqs, const TileChoice* choice) {
    int64_t n_tokens = offsets[n_seqs], squares = 0;
    bool small = choice->small_q != 0 && n_tokens <= choice->few_tokens;
    if (choice->small_q != 0 && !small) {
        for (int64_t seq = 0; seq < n_seqs; seq++) {
            int64_t length = offsets[seq + 1] - offsets[seq];
            squares += length * length;
        }
        small = squares <= choice->short_texts * n_tokens;
    }
    Cutting cutting{small ? choice->small_q : choice->block_q, small ? choice->share_small : choice->share, 0,
                    INT64_MAX};
    return 2 * count_tiles(offsets, n_seqs, cutting) + small;
}
