// The mean of each sequence's rows, on CPUs, with optional L2 normalisation.
//
//     out = sum(rows) / n  or  sum(rows) / sqrt(n),    then  out / max(||out||_2, 1e-12)  if wanted
//
// hidden: (T, H), float32 or bfloat16; cu_seqlens: (B + 1,) int32; out: (B, H) float32, zeros for one of length 0.
// Rows are added up PIECE at a time, so that a long text does not lose its tail.
// Bytes moved: T * H elements in, 4 * B * H out.
#include "vector.h"

namespace {

constexpr int64_t PIECE = 16;
constexpr int64_t ALONE_BELOW = 1 << 16;  // elements; one thread takes less time for them than to wake another thread

template <typename T>
void pool(const T* hidden, int64_t row_stride, const int32_t* cu_seqlens, int64_t n_seqs, int64_t size, bool root,
          bool unit, float* out) {
    const bool many = n_seqs > 1 && cu_seqlens[n_seqs] * size >= ALONE_BELOW;
#pragma omp parallel for schedule(dynamic) if (many)
    for (int64_t b = 0; b < n_seqs; b++) {
        const int64_t first = cu_seqlens[b], last = cu_seqlens[b + 1], n = last - first;
        const float divisor = n <= 0 ? 1.0f : root ? sqrtf((float)n) : (float)n;
        float* to = out + b * size;
        vf squares = {};
        for (int64_t j = 0; j < size; j += VL) {
            vf total = {};
            for (int64_t start = first; start < last; start += PIECE) {
                vf part = {};
                for (int64_t row = start; row < least(start + PIECE, last); row++)
                    part += to_floats(hidden + row * row_stride + j, size - j);
                total += part;
            }
            total /= divisor;
            squares += total * total;  // 0 in lanes beyond the row
            from_floats(to + j, total, size - j);
        }
        if (!unit) continue;
        const float norm = sqrtf(sum(squares)), length = norm < 1e-12f ? 1e-12f : norm;
        for (int64_t j = 0; j < size; j++) to[j] /= length;
    }
}

bool in_order(const int32_t* cu_seqlens, int64_t n_seqs, int64_t n_rows) {
    if (cu_seqlens[0] != 0 || cu_seqlens[n_seqs] > n_rows) return false;
    for (int64_t b = 0; b < n_seqs; b++)
        if (cu_seqlens[b] > cu_seqlens[b + 1]) return false;
    return true;
}

}  // namespace

// root: divide by the root of the length. unit: normalise. Returns 0; or 2, with nothing done, if cu_seqlens are not
// offsets from 0 to at most n_rows that never decrease.
#define POOL(name, T)                                                                                               \
    EXPORT int name(const T* hidden, int64_t row_stride, int64_t n_rows, const int32_t* cu_seqlens, int64_t n_seqs, \
                    int64_t size, int root, int unit, float* out) {                                                 \
        if (!in_order(cu_seqlens, n_seqs, n_rows)) return 2;                                                        \
        pool(hidden, row_stride, cu_seqlens, n_seqs, size, root, unit, out);                                        \
        return 0;                                                                                                   \
    }

POOL(fastbert_pool_float32, float)
POOL(fastbert_pool_bfloat16, bf16)
