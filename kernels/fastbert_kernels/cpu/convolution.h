// The convolution over columns beside the first layer of some encoders, on CPUs.
//
//     x = LayerNorm(y + activation(conv(x)))    x: the layer's input, (T, H); y: its output
//
// A convolution of `size` columns is a product with the joined rows of as many columns, with zeros for a column without
// a token. The rows are joined for ROWS_BESIDE tokens at a time.
#pragma once

#include <algorithm>

#include "linear.h"

constexpr int64_t ROWS_BESIDE = 256;

// T: of rows and the norm; W: of the product. size is odd.
template <typename T, typename W = T>
struct Convolution {
    const W *weight, *bias;  // (H, size * H), packed, and (H,); NULL without a convolution
    const T *norm, *norm_bias;
    int64_t size, activation;

    // Elements of W that `convolve` needs in addition to its result.
    static int64_t room(int64_t n_rows, int64_t hidden, int64_t size) {
        return least(n_rows, ROWS_BESIDE) * size * hidden;
    }
};

// The places of a batch's tokens: cu_seqlens, (B + 1,); columns, (T,), or NULL if those of a sequence are neighbours.
struct Places {
    const int32_t* cu_seqlens;
    int64_t n_seqs;
    const int32_t* columns;

    // The row of the token `offset` columns after that of row r, whose sequence is from first to end; -1 for none.
    int64_t beside(int64_t r, int64_t offset, int64_t first, int64_t end) const {
        const int64_t step = offset < 0 ? -1 : 1;
        int64_t at = columns == NULL ? r + offset : r;
        if (columns != NULL)
            while (at >= first && at < end && (columns[at] - columns[r] - offset) * step < 0) at += step;
        return at >= first && at < end && (columns == NULL || columns[at] - columns[r] == offset) ? at : -1;
    }
};

// x: (T, H) -> out: activation(conv(x)), (T, H). room: as many elements as `room` says.
template <typename T, typename W>
void convolve(const T* x, W* out, W* room, const Convolution<T, W>& conv, const Places& places, int64_t n_rows,
              int64_t hidden, const Team& team) {
    const int32_t *offsets = places.cu_seqlens, *last = offsets + places.n_seqs + 1;
    const int64_t width = conv.size * hidden;
    for (int64_t start = 0; start < n_rows; start += ROWS_BESIDE) {
        const int64_t n = least(ROWS_BESIDE, n_rows - start);
        team.share(n, [&](int64_t i) {
            const int64_t r = start + i;
            const int32_t* end = std::upper_bound(offsets, last, (int32_t)r);
            for (int64_t j = 0; j < conv.size; j++) {
                const int64_t at = end == last ? -1 : places.beside(r, j - conv.size / 2, end[-1], *end);
                W* to = room + i * width + j * hidden;
                for (int64_t d = 0; d < hidden; d += VL)
                    from_floats(to + d, at < 0 ? vf{} : to_floats(x + at * hidden + d, hidden - d), hidden - d);
            }
        });
        linear(Linear<W>{room, conv.weight, conv.bias, NULL, out + start * hidden, width, 0, hidden, n, width, hidden,
                         conv.activation},
               team);
    }
}
