// A dropout mask by itself, on CPUs, for operations that no kernel here fuses with it.
#include "philox.h"
#include "team.h"

// keep: (n_heads, n_rows, n_columns), 1 where an element is kept, else 0; rows from first_row on.
EXPORT void fastbert_dropout_mask(int64_t first_row, int64_t n_rows, int64_t n_columns, int64_t n_heads,
                                  int64_t threshold, uint64_t seed, int64_t site, uint8_t* keep) {
    const Dropout dropout = {threshold, seed, site};
    in_parallel([&](const Team& team) {
        team.share(n_heads * n_rows, [&](int64_t i) {
            const Masks masks(dropout, i / n_rows);
            for (int64_t j = 0; j < n_columns; j += 64) {
                const uint64_t bits = masks(first_row + i % n_rows, j / 64);
                const int64_t n = least(64, n_columns - j);
                for (int64_t e = 0; e < n; e++) keep[i * n_columns + j + e] = bits >> e & 1;
            }
        });
    });
}
