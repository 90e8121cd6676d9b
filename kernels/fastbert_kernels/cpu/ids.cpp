// The check that ids are within their table, on CPUs: one pass, no branches, no memory.
#include "vector.h"

// ids: (n,). 1 if one of them is below 0 or not below size, else 0.
EXPORT int fastbert_ids_outside(const int64_t* ids, int64_t n, int64_t size) {
    uint64_t outside = 0;
    for (int64_t i = 0; i < n; i++) outside |= (uint64_t)ids[i] >= (uint64_t)size;
    return outside != 0;
}
