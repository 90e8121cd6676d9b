// Dropout masks by Philox4x32-7, on CPUs: functions of a seed, a site and a position, as masks.py defines them.
//
// A lane of 64 bits holds a word of one group of eight columns, in its low half. VPMULUDQ reads only this half, so the
// rest in the high half does no harm. A round takes two products, two shifts and two sums.
#pragma once

#include "vector.h"

// See Dropout in masks.py. threshold: 0 to 65,536; at 0 nothing is dropped.
struct Dropout {
    int64_t threshold;
    uint64_t seed;
    int64_t site;

    // The factor of kept elements.
    float scale() const { return threshold >= 65536 ? 0.0f : (float)(65536.0 / (double)(65536 - threshold)); }
};

typedef uint64_t vg __attribute__((vector_size(4 * VL)));  // a word of VL / 2 groups
typedef uint16_t vn __attribute__((vector_size(4 * VL)));  // their numbers

INLINE vg low_product(vg x, uint32_t y) {
#if VL == 16
    return (vg)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#else
    return (vg)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#endif
}

// The numbers of two words in their order in memory, one group after the other in each half of the lanes.
INLINE vg both_words(vg first, vg second) { return (first & 0xFFFFFFFF) | second << 32; }

// The masks of one site, and in attention of one head.
class Masks {
   public:
    Masks(const Dropout& dropout, int64_t head = 0) : threshold(dropout.threshold), head(head), site(dropout.site) {
        uint32_t low = (uint32_t)dropout.seed, high = (uint32_t)(dropout.seed >> 32);
        for (int i = 0; i < ROUNDS; i++, low += 0x9E3779B9, high += 0xBB67AE85) keys[i][0] = low, keys[i][1] = high;
    }

    // Bit i tells whether column 64 * block + i of a row is kept. About 50 instructions.
    __attribute__((always_inline)) uint64_t operator()(int64_t row, int64_t block) const {
        return from(row, 64 * block);
    }

    // Bit i tells whether column first + i is kept; first is a multiple of 8.
    __attribute__((always_inline)) uint64_t from(int64_t row, int64_t first) const {
        const uint64_t group = first / 8;
#if VL == 16
        const vg order = {0, 4, 1, 5, 2, 6, 3, 7};  // unpacking takes each other lane
        return of_groups(row, order + group);
#else
        const vg order = {0, 1, 2, 3};
        return of_groups(row, order + group) | of_groups(row, order + (group + 4)) << 32;
#endif
    }

   private:
    static constexpr int ROUNDS = 7;
    int64_t threshold, head, site;
    uint64_t keys[ROUNDS][2];

    __attribute__((always_inline)) uint64_t of_groups(int64_t row, vg groups) const {
        vg c0 = groups, c1 = row - (vg){}, c2 = head - (vg){}, c3 = site - (vg){};
#pragma GCC unroll 7
        for (int i = 0; i < ROUNDS; i++) {
            const vg a = low_product(c0, 0xD2511F53), b = low_product(c2, 0xCD9E8D57);
            c0 = b >> 32 ^ c1 ^ keys[i][0];
            c1 = b;
            c2 = a >> 32 ^ c3 ^ keys[i][1];
            c3 = a;
        }
        return kept(both_words(c0, c1), both_words(c2, c3));
    }

    // Numbers are compared with threshold - 1, since 65,536 is no 16-bit number.
    __attribute__((always_inline)) uint64_t kept(vg low, vg high) const {
        const uint64_t all = threshold <= 0 ? ~0ull : 0;
#if VL == 16
        const __m512i least = _mm512_set1_epi16((short)(threshold - 1));
        const uint64_t first = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64((__m512i)low, (__m512i)high), least);
        const uint64_t second = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64((__m512i)low, (__m512i)high), least);
        return first | second << 32 | all;
#else
        const vn least = (uint16_t)(threshold - 1) - (vn){};
        const vn first = (vn)_mm256_unpacklo_epi64((__m256i)low, (__m256i)high);
        const vn second = (vn)_mm256_unpackhi_epi64((__m256i)low, (__m256i)high);
        const __m256i both = _mm256_packs_epi16((__m256i)(first > least), (__m256i)(second > least));
        return (uint32_t)_mm256_movemask_epi8(both) | (all & 0xFFFFFFFF);
#endif
    }
};

// x in the lanes whose bit is 1, and 0 in the others. Bits from VL on are not read.
INLINE vf where(uint64_t bits, vf x) {
#if VL == 16
    return (vf)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
#else
    const vi lanes = {1, 2, 4, 8, 16, 32, 64, 128};
    return (vf)((vi)x & (((int32_t)bits & lanes) == lanes));
#endif
}
