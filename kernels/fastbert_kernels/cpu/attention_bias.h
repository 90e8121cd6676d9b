// A bias on the scores of attention, by the number of columns that the key is after the query.
#pragma once

#include "vector.h"

// table: (N, 2 * radius + 1), for the distances from -radius to radius; farther keys have the number of the farthest.
// NULL for no bias. columns: (T,), or NULL if the tokens of each sequence are neighbours.
struct PositionBias {
    const float* table;
    int64_t radius;
    const int32_t* columns;
    int64_t width() const { return 2 * radius + 1; }
    int64_t place(int64_t distance) const {
        return distance < -radius ? 0 : distance > radius ? 2 * radius : distance + radius;
    }
    const float* of_head(int64_t head) const { return table + head * width(); }
};

// line[length - 1 + d]: the bias of the distance d, from that of the first key and the last query to padded - 1.
INLINE void spread(float* line, const PositionBias& bias, int64_t head, int64_t length, int64_t padded) {
    const float* table = bias.of_head(head);
    for (int64_t i = 0; i < length + padded - 1; i++) line[i] = table[bias.place(i - length + 1)];
}

// row[j]: the bias of key `first + j` for a query, both of a sequence of so many tokens with these columns; 0 from the
// last key to n.
INLINE void spread_row(float* row, const PositionBias& bias, int64_t head, const int32_t* columns, int64_t query,
                       int64_t first, int64_t length, int64_t n) {
    const float* table = bias.of_head(head);
    for (int64_t j = 0; j < n; j++)
        row[j] = first + j < length ? table[bias.place((int64_t)columns[first + j] - columns[query])] : 0.0f;
}
