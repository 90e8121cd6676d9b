// What attention.cpp offers to the other kernels.
#pragma once

#include "vector.h"

struct Heads {
    int64_t row_stride, n_heads, head_size, out_stride;  // of qkv and out, in elements
    float scale;
};

// qkv: (n_rows, 3 * N * D), cu_seqlens: (n_seqs + 1,) -> out: (n_rows, N * D); see attention.cpp. 0, or 1 where there is
// too little memory, or 2 where cu_seqlens does not go from 0 to at most n_rows.
int attention(const float* qkv, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, float* out, const Heads& heads);
int attention(const bf16* qkv, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, bf16* out, const Heads& heads);
