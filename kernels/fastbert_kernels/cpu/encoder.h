// What both encoders in one call, in floats and in 8 bits, share: what a layer has beyond its weights, and a batch.
#pragma once

#include "attention.h"
#include "rotary.h"

// What a layer has beyond BERT's weights.
struct Traits {
    const float* bias;  // the table of a PositionBias, which within a window is the window's own; or NULL
    int64_t radius;     // of the table
    int64_t window;     // how many tokens attention reaches on either side, -1 for all
    int64_t angles;     // the number of the angles by which queries and keys turn, -1 for none
    int64_t pre_norm;   // whether the norms are of what each part reads
};

// The lengths of one batch's texts, the plans of attention for them, and the rows' angles.
class Batch {
   public:
    // angles: of each base two tables, cosines and sines, (T, D / 2). columns: a member of PositionBias.
    Batch(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows, int64_t n_heads, int64_t head_size, bool biased,
          int64_t window, const float* const* angles, const int32_t* columns)
        : n_heads(n_heads),
          head_size(head_size),
          angles(angles),
          columns(columns),
          windowed(window >= 0 && longest(cu_seqlens, n_seqs) > window + 1),
          all(cu_seqlens, n_seqs, n_rows, head_size, biased),
          near(windowed ? cu_seqlens : NONE_OF_THEM, windowed ? n_seqs : 0, n_rows, head_size, true, window) {}

    int status() const { return all.status != 0 ? all.status : near.status; }

    // A layer's attention. Where no text is longer than the window, the one without a window gives the same bits.
    template <typename T>
    void attend(const T* qkv, T* context, const Traits& layer, const Team& team) const {
        const bool within = layer.window >= 0 && windowed;
        PositionBias bias = {layer.bias, layer.radius, columns};
        if (layer.window >= 0 && !windowed) bias.table = NULL;
        const int64_t width = n_heads * head_size;
        const Heads heads = {3 * width, n_heads, head_size, width, 1.0f / sqrtf((float)head_size), bias};
        attention(qkv, context, heads, within ? near : all, team);
    }

    // Turns queries and keys of rows first to first + n, whose first one is at qkv.
    template <typename T>
    void turn(T* qkv, int64_t first, int64_t n, const Traits& layer, const Team& team) const {
        if (layer.angles < 0) return;
        const int64_t half = head_size / 2;
        const float *cos = angles[2 * layer.angles], *sin = angles[2 * layer.angles + 1];
        team.share(n, [&](int64_t i) {
            T* row = qkv + i * 6 * n_heads * half;
            rotate_row(row, row, cos + (first + i) * half, sin + (first + i) * half, n_heads, half);
        });
    }

   private:
    static constexpr int32_t NONE_OF_THEM[] = {0};
    const int64_t n_heads, head_size;
    const float* const* angles;
    const int32_t* columns;
    const bool windowed;
    const AttentionPlan all, near;

    static int64_t longest(const int32_t* cu_seqlens, int64_t n_seqs) {
        int64_t most = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
            most = length > most ? length : most;
        }
        return most;
    }
};

// The window that layers have, or -1. biased: becomes whether one without a window has a position bias.
template <typename L>
int64_t window_of(const L* layers, int64_t n_layers, bool* biased) {
    int64_t window = -1;
    *biased = false;
    for (int64_t i = 0; i < n_layers; i++) {
        const Traits& traits = layers[i].traits;
        if (traits.window >= 0) window = traits.window;
        else *biased |= traits.bias != NULL;
    }
    return window;
}
