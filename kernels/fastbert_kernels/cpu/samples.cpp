// A digest of numbers at any addresses in memory: it shows whether one of them has changed.
#include <cstring>

#include "vector.h"

namespace {

template <typename Word>
uint64_t digest(const uintptr_t* addresses, int64_t n) {
    uint64_t sum = 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < n; i++) {
        Word word;
        std::memcpy(&word, reinterpret_cast<const void*>(addresses[i]), sizeof word);
        sum = (sum ^ word) * 0x100000001b3u;
        sum ^= sum >> 29;
    }
    return sum;
}

}  // namespace

// addresses: (n,) of words of `size` bytes, 1, 2, 4 or 8. If exactly one word differs, the digest differs.
EXPORT uint64_t fastbert_digest(const uintptr_t* addresses, int64_t n, int64_t size) {
    switch (size) {
        case 1: return digest<uint8_t>(addresses, n);
        case 2: return digest<uint16_t>(addresses, n);
        case 4: return digest<uint32_t>(addresses, n);
        default: return digest<uint64_t>(addresses, n);
    }
}
