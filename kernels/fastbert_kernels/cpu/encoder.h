// Both encoders in one call, in floats and in 8 bits, share this: a layer's features beyond its weights, and a batch.
#pragma once

#include <optional>

#include "convolution.h"
#include "disentangled.h"
#include "rotary.h"

// The features of a layer beyond BERT's weights.
struct Traits {
    const float* bias;           // the table of a PositionBias, which within a window is the window's own; or NULL
    int64_t radius;              // of the table
    int64_t window;              // the number of tokens that attention reaches on either side, -1 for all
    int64_t angles;              // the number of the angles that rotate queries and keys, -1 for none
    int64_t pre_norm;            // whether the norms are on the input of each part
    const void *keys, *queries;  // of Distances, for disentangled attention; NULL for missing terms
};

// The settings of the scores in all layers. rows_of, radius: the members of Buckets; NULL without disentangled
// attention.
struct Scores {
    float scale;  // 0 for 1 / sqrt(D)
    const int32_t* rows_of;
    int64_t radius;
};

// The common settings of the layers, and the convolution beside the first one. W: of the convolution's product.
template <typename T, typename W = T>
struct Common {
    Scores scores;
    Convolution<T, W> convolution;
};

// The lengths of one batch's texts, the plans of attention for them, and the rows' angles.
class Batch {
   public:
    // angles: of each base two tables, cosines and sines, (T, D / 2). columns: a member of PositionBias.
    Batch(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows, int64_t n_heads, int64_t head_size, bool biased,
          int64_t window, const float* const* angles, const int32_t* columns, const Scores& scores)
        : places{cu_seqlens, n_seqs, columns},
          n_heads(n_heads),
          head_size(head_size),
          scale(scores.scale > 0.0f ? scores.scale : 1.0f / sqrtf((float)head_size)),
          angles(angles),
          buckets{scores.rows_of, scores.radius, columns},
          windowed(window >= 0 && longest(cu_seqlens, n_seqs) > window + 1),
          all(cu_seqlens, n_seqs, n_rows, head_size, biased),
          near(windowed ? cu_seqlens : NONE_OF_THEM, windowed ? n_seqs : 0, n_rows, head_size, true, window) {
        if (scores.rows_of != NULL && status() == 0) apart.emplace(buckets, heads(), all, cu_seqlens, n_seqs);
    }

    int status() const {
        if (all.status != 0) return all.status;
        return near.status != 0 || !apart ? near.status : apart->status;
    }

    // A layer's attention. If no text is longer than the window, attention without a window gives the same bits.
    template <typename T>
    void attend(const T* qkv, T* context, const Traits& layer, const Team& team) const {
        if (layer.keys != NULL || layer.queries != NULL) {
            const Distances<T> distances = {buckets, (const T*)layer.keys, (const T*)layer.queries};
            return disentangled_attention(qkv, context, heads(), all, *apart, distances, team);
        }
        const bool within = layer.window >= 0 && windowed;
        PositionBias bias = {layer.bias, layer.radius, places.columns};
        if (layer.window >= 0 && !windowed) bias.table = NULL;
        attention(qkv, context, heads(bias), within ? near : all, team);
    }

    // Rotates queries and keys of rows first to first + n; the first row is at qkv.
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

    const Places places;

   private:
    static constexpr int32_t NONE_OF_THEM[] = {0};
    const int64_t n_heads, head_size;
    const float scale;
    const float* const* angles;
    const Buckets buckets;
    const bool windowed;
    const AttentionPlan all, near;
    std::optional<DisentangledPlan> apart;

    Heads heads(const PositionBias& bias = {}) const {
        const int64_t width = n_heads * head_size;
        return {3 * width, n_heads, head_size, width, scale, bias};
    }

    static int64_t longest(const int32_t* cu_seqlens, int64_t n_seqs) {
        int64_t most = 0;
        for (int64_t b = 0; b < n_seqs; b++) {
            const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
            most = length > most ? length : most;
        }
        return most;
    }
};

// The window of the layers, or -1. biased: set to whether a layer without a window has a position bias.
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
