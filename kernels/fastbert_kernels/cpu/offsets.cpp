// The check that offsets of sequences are right, and the longest length, on CPUs.
#include "vector.h"

namespace {

template <typename T>
int64_t longest(const T* offsets, int64_t n, int64_t n_tokens) {
    if (offsets[0] != 0 || offsets[n - 1] != n_tokens) return -1;
    int64_t most = 0;
    for (int64_t i = 1; i < n; i++) {
        if (offsets[i] < offsets[i - 1]) return -1;
        int64_t length = (int64_t)offsets[i] - offsets[i - 1];
        if (length > most) most = length;
    }
    return most;
}

}  // namespace

// offsets: (n,), n > 0, of integers of so many bytes, 4 or 8. -1 if they do not start at 0, decrease, or do not end at
// n_tokens.
EXPORT int64_t fastbert_longest(const void* offsets, int64_t bytes, int64_t n, int64_t n_tokens) {
    if (bytes == 4) return longest((const int32_t*)offsets, n, n_tokens);
    return longest((const int64_t*)offsets, n, n_tokens);
}
