// The words that a CUDA graph reads of a batch, written to pinned memory in one pass.
#include <algorithm>
#include <cstring>

#include "work_list.h"

namespace {

// A row of n ids, or none where they are null, and zeros up to T'.
void put(int64_t* row, const int64_t* ids, int64_t n, int64_t bucket) {
    if (ids == nullptr) n = 0;
    if (n > 0) memcpy(row, ids, n * sizeof(int64_t));
    memset(row + n, 0, (bucket - n) * sizeof(int64_t));
}

// A list of tiles in static memory: the cutting of its sequences, its beginning, and the most tiles that it can hold.
struct StaticList {
    Cutting cutting;
    int64_t start, room;
};

// Zeros from the end of a part to the next multiple of 16 bytes, where another may begin.
void align(int32_t* integers, int64_t end) { std::fill(integers + end, integers + 4 * over(end, 4), 0); }

}  // namespace

// The layout of a graph's integers in static memory: one or two lists of tiles, the spans of rows, offsets, the columns
// of rows, and, from the next multiple of 16 bytes, their sequences. row_spans is -1 if neighbours do not share tiles;
// columns is -1 if they are not read. batches.py has the same members.
struct StaticIntegers {
    int64_t n_lists;
    StaticList lists[2];
    int64_t row_spans, cu_seqlens, columns;
};

namespace {

bool put_integers(int32_t* out, const StaticIntegers& parts, const int32_t* offsets, int64_t n_seqs, int64_t bucket) {
    int64_t n_tokens = offsets[n_seqs];
    for (int64_t i = 0; i < parts.n_lists; i++) {
        const StaticList& list = parts.lists[i];
        int32_t* tiles = out + list.start;
        int32_t* row_spans = i == 0 && parts.row_spans >= 0 ? out + parts.row_spans : nullptr;
        bool any_shared;
        int64_t n_tiles = write_tiles(offsets, n_seqs, list.cutting, tiles, list.room, row_spans, &any_shared);
        if (n_tiles == TOO_MANY_TILES) return false;
        std::fill(tiles + n_tiles * N_COLUMNS, tiles + list.room * N_COLUMNS, 0);
        align(out, list.start + list.room * N_COLUMNS);
    }
    if (parts.row_spans >= 0) {
        std::fill(out + parts.row_spans + n_tokens, out + parts.row_spans + bucket, 0);
        align(out, parts.row_spans + bucket);
    }
    int32_t* cu_seqlens = out + parts.cu_seqlens;
    memcpy(cu_seqlens, offsets, (n_seqs + 1) * sizeof(int32_t));
    std::fill(cu_seqlens + n_seqs + 1, cu_seqlens + bucket + 1, (int32_t)n_tokens);  // the other sequences are empty
    align(out, parts.cu_seqlens + bucket + 1);
    if (parts.columns >= 0) {
        int64_t start = 4 * over(parts.columns + bucket, 4);
        std::fill(out + parts.columns, out + start, 0);
        int32_t* seq_ids = out + start;
        for (int64_t seq = 0; seq < n_seqs; seq++)
            std::fill(seq_ids + offsets[seq], seq_ids + offsets[seq + 1], (int32_t)seq);
        std::fill(seq_ids + n_tokens, seq_ids + bucket, (int32_t)bucket);
        align(out, start + bucket);
    }
    return true;
}

void put_positions(int64_t* row, const int32_t* offsets, int64_t n_seqs, int64_t bucket) {
    for (int64_t seq = 0; seq < n_seqs; seq++)
        for (int64_t i = offsets[seq]; i < offsets[seq + 1]; i++) row[i] = i - offsets[seq];
    std::fill(row + offsets[n_seqs], row + bucket, 0);
}

}  // namespace

// words: three rows of `bucket` ids (input_ids, token_type_ids, position_ids), the number of the batch, its tokens, and
// the integers of attention. offsets: (n_seqs + 1,) with at most `bucket` sequences and tokens. Ids are (T,), or null:
// then they are zeros, and positions count from 0 in each sequence. Returns 0 if a list is too small.
EXPORT int64_t fastbert_fill_words(int64_t* words, int64_t bucket, const StaticIntegers* parts, const int32_t* offsets,
                                   int64_t n_seqs, int64_t number, const int64_t* input_ids,
                                   const int64_t* token_type_ids, const int64_t* position_ids) {
    int64_t n_tokens = offsets[n_seqs];
    int32_t* integers = (int32_t*)(words + 3 * bucket + 2);
    if (!put_integers(integers, *parts, offsets, n_seqs, bucket)) return 0;
    put(words, input_ids, n_tokens, bucket);
    put(words + bucket, token_type_ids, n_tokens, bucket);
    if (position_ids == nullptr) put_positions(words + 2 * bucket, offsets, n_seqs, bucket);
    else put(words + 2 * bucket, position_ids, n_tokens, bucket);
    words[3 * bucket] = number, words[3 * bucket + 1] = n_tokens;
    return 1;
}
