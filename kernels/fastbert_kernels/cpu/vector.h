// Vectors of VL floats: 16 with AVX-512, 8 with AVX2. They are GCC's and Clang's vector extensions, with intrinsics for
// instructions that the extensions lack.
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

INLINE int64_t over(int64_t n, int64_t step) { return (n + step - 1) / step; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

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

INLINE vf splat(float x) { return x - (vf){}; }

// VL elements as floats, and back. To bfloat16 by round to nearest even; NaN stays NaN.
INLINE vf to_floats(const float* p) { return load<vf>(p); }
#ifdef __AVX512F__
INLINE vf to_floats(const bf16* p) { return (vf)((vi)_mm512_cvtepu16_epi32((__m256i)load<vh>(p)) << 16); }
#else
INLINE vf to_floats(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vi) << 16); }
#endif
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

// The first n elements at p as floats, 0 in the other lanes, and back; all for n of VL or more, none below 1.
template <typename T>
INLINE vf to_floats(const T* p, int64_t n) {
    if (n >= VL) return to_floats(p);
    T some[VL] = {};
    if (n > 0) memcpy(some, p, n * sizeof(T));
    return to_floats(some);
}

template <typename T>
INLINE void from_floats(T* p, vf x, int64_t n) {
    if (n >= VL) return from_floats(p, x);
    T some[VL];
    from_floats(some, x);
    if (n > 0) memcpy(p, some, n * sizeof(T));
}

// The second if one is NaN, or if both are 0.
#ifdef __AVX512F__
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// 2^x. EXACT: to 1.5 ulp; otherwise to 3e-6, for results that are rounded to bfloat16. 0 below 2^-126, unless no x is
// (FLUSH false); NaN for NaN. 2^x = 2^n 2^f with n = round(x); 2^f by a minimax polynomial of degree 6 or 4.
template <bool EXACT, bool FLUSH = true>
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
    if (!FLUSH) return p;
    return x < -126.0f ? (vf){} : p;
#else
    vf scale = (vf)((__builtin_convertvector(max(min(n, splat(127.0f)), splat(-126.0f)), vi) + 127) << 23);
    return x < -126.0f ? (vf){} : p * scale;
#endif
}

// f of all lanes, halved step by step: one lane after the other would take VL waits.
template <typename F>
INLINE float of_lanes(vf x, F f) {
#if VL == 16
    x = f(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
    x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
    return x[0];
}

INLINE float sum(vf x) {
    return of_lanes(x, [](vf a, vf b) { return a + b; });
}

INLINE float largest(vf x) {
    return of_lanes(x, [](vf a, vf b) { return max(a, b); });
}

// Rows become columns: VL vectors of VL 32-bit lanes, in log2(VL) perfect shuffles of vectors i and i + VL / 2.
INLINE void transpose(vi* rows) {
    vi next[VL];
    for (int step = 1; step < VL; step *= 2) {
        for (int i = 0; i < VL / 2; i++) {
            vi a = rows[i], b = rows[i + VL / 2];
#if VL == 16
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] =
                __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
            next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        for (int i = 0; i < VL; i++) rows[i] = next[i];
    }
}

// The elements of products: floats, or, if the processor multiplies them, pairs of bfloat16.
struct Floats {
    typedef float E;
    typedef vf V;
    static constexpr int SIZE = 1;  // elements in an E
};

struct Pairs {
    typedef int32_t E;
    typedef vi V;
    static constexpr int SIZE = 2;
};

#ifdef __AVX512BF16__
typedef Pairs BFloat16Operands;
#else
typedef Floats BFloat16Operands;  // converted to floats first
#endif

INLINE vf splat_of(const float* p) { return splat(*p); }
INLINE vi splat_of(const int32_t* p) { return *p - (vi){}; }

// Fused by name: a compiler with a choice could fuse them in the tile of one number of rows, and not in that of
// another.
#ifdef __AVX512F__
INLINE vf multiply_add(vf sum, vf x, vf y) { return (vf)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum); }
#else
INLINE vf multiply_add(vf sum, vf x, vf y) { return (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum); }
#endif

#ifdef __AVX512BF16__
// sum + x[0] y[0] + x[1] y[1] in each lane.
INLINE vf multiply_add(vf sum, vi x, vi y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
#endif

// sums[i][j] += sum over k < n of x_i[k] * y[k][j]; x_i[k] at x[i] + k * x_stride, y[k][j] at y + k * y_stride + j *
// y_step.
// AHEAD: if not 0, y[k + AHEAD] is fetched into the cache beside the work on y[k].
template <int ROWS, int N, typename O, int AHEAD = 0>
INLINE void products(vf (&sums)[ROWS][N], const typename O::E* const* x, const typename O::E* y, int64_t n,
                     int64_t y_stride, int64_t y_step, int64_t x_stride = 1) {
    for (int64_t k = 0; k < n; k++) {
        typename O::V right[N];
        for (int j = 0; j < N; j++) {
            right[j] = load<typename O::V>(y + k * y_stride + j * y_step);
            if (AHEAD > 0) __builtin_prefetch(y + (k + AHEAD) * y_stride + j * y_step);
        }
        for (int i = 0; i < ROWS; i++) {
            const typename O::V left = splat_of(x[i] + k * x_stride);
            for (int j = 0; j < N; j++) sums[i][j] = multiply_add(sums[i][j], left, right[j]);
        }
    }
}
