// The functions of attention.cpp for the other kernels.
#pragma once

#include "attention_bias.h"
#include "team.h"

struct Heads {
    int64_t row_stride, n_heads, head_size, out_stride;  // of qkv and out, in elements
    float scale;
    PositionBias bias;
};

// The plan of attention for one batch, for all layers: its tasks, and memory for each thread.
class AttentionPlan {
   public:
    struct Task {
        int64_t first, length, chunk, end;  // a sequence, or a part of one, and its queries from chunk to end
        int64_t before;                     // tokens of the sequence before the first one, a multiple of 8
    };
    Task* tasks = NULL;
    int64_t n_tasks = 0, n_tokens = 0, n_rows, padded = 0;  // padded: the longest sequence, in whole vectors
    const int64_t window;
    int status;  // 0, or 1 for too little memory, or 2 if cu_seqlens does not go from 0 to at most n_rows

    AttentionPlan(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows, int64_t head_size, bool biased = false,
                  int64_t window = -1);
    ~AttentionPlan();
    AttentionPlan(const AttentionPlan&) = delete;
    float* scratch(int thread) const { return memory + thread * scratch_size; }

   private:
    float* memory = NULL;
    int64_t scratch_size = 0;
};

// qkv: (n_rows, 3 * N * D) -> out: (n_rows, N * D); see attention.cpp. The plan's status is 0.
void attention(const float* qkv, float* out, const Heads& heads, const AttentionPlan& plan, const Team& team);
void attention(const bf16* qkv, bf16* out, const Heads& heads, const AttentionPlan& plan, const Team& team);
