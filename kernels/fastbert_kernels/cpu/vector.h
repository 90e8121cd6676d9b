// Vectors of VL floats: 16 with AVX-512, 8 with AVX2. GCC's and Clang's vector extensions, and intrinsics where those
// have no words for an instruction.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define VL 16
#else
#define VL 8
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));  // VL elements of bfloat16
typedef uint16_t bf16;

template <typename V, typename E>
INLINE V load(const E* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <typename V, typename E>
INLINE void store(E* p, V v) {
    memcpy(p, &v, sizeof v);
}

// The first n floats at p, 0 in the other lanes; all for n of VL or more, none below 1.
INLINE vf load_some(const float* p, int n) {
    vf x = {};
    if (n >= VL) return load<vf>(p);
    if (n > 0) memcpy(&x, p, n * sizeof(float));
    return x;
}

INLINE void store_some(float* p, vf x, int n) {
    if (n >= VL) store(p, x);
    else if (n > 0) memcpy(p, &x, n * sizeof(float));
}

INLINE vf splat(float x) { return x - (vf){}; }

// VL elements as floats, and back. To bfloat16 by round to nearest even; NaN stays NaN.
INLINE vf to_floats(const float* p) { return load<vf>(p); }
INLINE vf to_floats(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vi) << 16); }
INLINE void from_floats(float* p, vf x) { store(p, x); }
INLINE void from_floats(bf16* p, vf x) {
#ifdef __AVX512BF16__
    store(p, _mm512_cvtneps_pbh((__m512)x));
#else
    vi bits = (vi)x;
    vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store(p, __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, vh));
#endif
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// 2^x. EXACT: to 1.5 ulp; otherwise to 3e-6, for what is rounded to bfloat16. 0 below 2^-126; NaN for NaN.
// 2^x = 2^n 2^f with n = round(x); 2^f by a minimax polynomial of degree 6 or 4.
template <bool EXACT>
INLINE vf exp2(vf x) {
#ifdef __AVX512F__
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf n = (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    vf f = x - n, p;
    if (EXACT) {
        p = splat(1.5353362e-4f) * f + 1.3398875e-3f;
        p = p * f + 9.618437e-3f;
        p = p * f + 5.5503324e-2f;
        p = p * f + 2.4022648e-1f;
        p = p * f + 6.931472e-1f;
    } else {
        p = splat(9.582852e-3f) * f + 5.5906426e-2f;
        p = p * f + 2.4024099e-1f;
        p = p * f + 6.931242e-1f;
    }
    p = p * f + 1.0f;
#ifdef __AVX512F__
    p = (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
    return x < -126.0f ? (vf){} : p;
#else
    vf scale = (vf)((__builtin_convertvector(max(min(n, splat(127.0f)), splat(-126.0f)), vi) + 127) << 23);
    return x < -126.0f ? (vf){} : p * scale;
#endif
}

INLINE float sum(vf x) {
    float total = 0.0f;
    for (int i = 0; i < VL; i++) total += x[i];
    return total;
}

INLINE float largest(vf x) {
    float found = x[0];
    for (int i = 1; i < VL; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// Rows become columns: VL vectors of VL 32-bit lanes, in log2(VL) perfect shuffles of vectors i and i + VL / 2.
INLINE void transpose(vi* rows) {
    vi next[VL];
    for (int step = 1; step < VL; step *= 2) {
        for (int i = 0; i < VL / 2; i++) {
            vi a = rows[i], b = rows[i + VL / 2];
#if VL == 16
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
            next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        for (int i = 0; i < VL; i++) rows[i] = next[i];
    }
}
