// Tiles of attention's kernels on GPUs, as fastbert_kernels/work_list.py describes them.
#pragma once

#include "vector.h"

constexpr int64_t N_COLUMNS = 5;        // of a tile: first row, end row, first key, end key, shared
constexpr int64_t TOO_MANY_TILES = -1;  // instead of a number of tiles

// The rule that cuts sequences. share: whether neighbours that fit a tile of block_q rows share one. Only sequences of
// more than longer_than and of at most up_to tokens are in the list; all of them if neighbours share tiles.
struct Cutting {
    int64_t block_q, share, longer_than, up_to;
};

// Writes the tiles of sequences, those with the most keys first, and the span of each row in its tile. Returns the
// number of tiles. For more than `room` tiles it writes nothing and returns TOO_MANY_TILES. offsets: (n_seqs + 1,).
// tiles: (room, N_COLUMNS). row_spans: (T,), or null if neighbours do not share tiles. any_shared: set to whether a
// tile is shared.
int64_t write_tiles(const int32_t* offsets, int64_t n_seqs, const Cutting& cutting, int32_t* tiles, int64_t room,
                    int32_t* row_spans, bool* any_shared);

// The number of tiles that write_tiles writes.
int64_t count_tiles(const int32_t* offsets, int64_t n_seqs, const Cutting& cutting);
