// The functions of disentangled.cpp for the other kernels.
#pragma once

#include "attention.h"

// The map from distances in columns to rows of pk and pq: rows_of, (2 * radius + 1,), for those from -radius to radius,
// never decreases. columns: (T,), or NULL if the tokens of each sequence are neighbours.
struct Buckets {
    const int32_t* rows_of;
    int64_t radius;
    const int32_t* columns;

    int64_t row(int64_t distance) const {
        return rows_of[(distance < -radius ? -radius : distance > radius ? radius : distance) + radius];
    }

    // The rows that the longest sequence needs, by its columns: from low to high.
    void find_rows(int64_t* low, int64_t* high, const int32_t* cu_seqlens, int64_t n_seqs) const {
        int64_t span = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const int64_t first = cu_seqlens[b], last = cu_seqlens[b + 1] - 1;
            if (last < first) continue;
            const int64_t apart = columns == NULL ? last - first : columns[last] - columns[first];
            span = apart > span ? apart : span;
        }
        *low = row(-span);
        *high = row(span);
    }
};

// keys (pk), queries (pq): (2R, N * D) of one layer, or NULL for a missing term.
template <typename T>
struct Distances : Buckets {
    const T *keys, *queries;
};

// The plan of disentangled attention for one batch, for all layers, beside AttentionPlan: memory for the needed rows of
// distances, packed for each head, and for a thread's additions to scores. The layers use it in turn.
class DisentangledPlan {
   public:
    float *keys, *queries;
    int64_t low = 0, high = 0, n_blocks = 0;   // the rows from low to high, in blocks of VL
    int64_t exact = 0;                         // up to this number of columns apart, each distance has its own row
    int64_t line_stride = 0, tile_stride = 0;  // of what scratch holds: (CHUNK, line_stride) and (ROWS, tile_stride)
    int status;                                // 0, or 1 for too little memory

    DisentangledPlan(const Buckets& buckets, const Heads& heads, const AttentionPlan& plan, const int32_t* cu_seqlens,
                     int64_t n_seqs);
    ~DisentangledPlan();
    DisentangledPlan(const DisentangledPlan&) = delete;
    float* scratch(int thread) const { return memory + thread * scratch_size; }

   private:
    float* memory;
    int64_t scratch_size = 0;
};

// qkv: (n_rows, 3 * N * D) -> out: (n_rows, N * D); see disentangled.cpp. The status of both plans is 0; plan is one
// without a bias and a window.
void disentangled_attention(const float* qkv, float* out, const Heads& heads, const AttentionPlan& plan,
                            const DisentangledPlan& rows, const Distances<float>& distances, const Team& team);
void disentangled_attention(const bf16* qkv, bf16* out, const Heads& heads, const AttentionPlan& plan,
                            const DisentangledPlan& rows, const Distances<bf16>& distances, const Team& team);
