// Weights in the layout from which linear.cpp multiplies (panels.h), on CPUs.
//
//     x @ weight^T:    panels of the weight's rows, steps along K      each VL x VL block of words is transposed
//     x @ weight:      panels of its columns, steps along its rows     blocks of columns are copied
//
// weight: (M, K), float32 or bfloat16, or several with the same K, which count as one with their rows one after the
// other. The packed weight has their dtype, or is bfloat16 from float32. Bytes: those of the weight and of the packed
// weight.
#include "panels.h"

namespace {

template <typename T>
struct Weights {
    const T* const* first;  // addresses
    const int64_t *strides, *n_rows;
    int64_t n, k_size;

    int64_t total_rows() const {
        int64_t total = 0;
        for (int64_t w = 0; w < n; w++) total += n_rows[w];
        return total;
    }
    const T* row(int64_t i) const {
        int64_t w = 0;
        for (; i >= n_rows[w]; w++) i -= n_rows[w];
        return first[w] + i * strides[w];
    }
};

// VL words along a row at p, which has n more elements.
INLINE vi words_along(Floats, const float* p, int64_t n) { return (vi)to_floats(p, n); }

INLINE vi words_along(Pairs, const bf16* p, int64_t n) {
    if (n >= 2 * VL) return load<vi>(p);
    vi words = {};
    memcpy(&words, p, n * sizeof(bf16));
    return words;
}

INLINE vi words_along(Pairs, const float* p, int64_t n) {
    bf16 some[2 * VL];
    from_floats(some, to_floats(p, n));
    from_floats(some + VL, n > VL ? to_floats(p + VL, n - VL) : vf{});
    return load<vi>(some);
}

// VL columns of a panel, which are rows of the weights from `row` on.
template <typename O, typename T>
void pack_columns(const Weights<T>& weights, int64_t row, int64_t total_rows, typename O::E* to) {
    const int64_t n_steps = over(weights.k_size, O::SIZE);
    const T* from[VL];
    for (int i = 0; i < VL; i++) from[i] = row + i < total_rows ? weights.row(row + i) : NULL;
    for (int64_t s = 0; s < n_steps; s += VL) {
        const int64_t k = s * O::SIZE;
        vi words[VL];
        for (int i = 0; i < VL; i++)
            words[i] = from[i] == NULL ? vi{} : words_along(O(), from[i] + k, weights.k_size - k);
        transpose(words);
        for (int i = 0; i < least(VL, n_steps - s); i++) store(to + (s + i) * COLUMNS, words[i]);
    }
}

template <typename O, typename T>
void pack(const Weights<T>& weights, typename O::E* packed) {
    const int64_t n_columns = weights.total_rows(), panel_size = over(weights.k_size, O::SIZE) * COLUMNS;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < over(n_columns, COLUMNS) * VECTORS; i++)
        pack_columns<O>(weights, i * VL, n_columns, packed + i / VECTORS * panel_size + i % VECTORS * VL);
}

template <typename O, typename T>
void pack_transposed(const Weights<T>& weights, typename O::E* packed) {
    const int64_t n_rows = weights.total_rows(), panel_size = over(n_rows, O::SIZE) * COLUMNS;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < over(weights.k_size, COLUMNS); panel++) {
        const int64_t column = panel * COLUMNS;
        pack_rows<COLUMNS, O>(
            packed + panel * panel_size, [&](int64_t i) { return weights.row(i) + column; }, 0, n_rows,
            weights.k_size - column);
    }
}

}  // namespace

// The number of elements in a weight that is packed for a product with n_columns columns.
EXPORT int64_t fastbert_packed_size(int64_t n_columns, int64_t k_size) {
    return over(n_columns, COLUMNS) * COLUMNS * over(k_size, 2) * 2;
}

// weights: addresses of n weights, (n_rows[i], k_size) with rows strides[i] apart.
#define PACK(name, T, O)                                                                                \
    EXPORT void name(const T* const* weights, const int64_t* strides, const int64_t* n_rows, int64_t n, \
                     int64_t k_size, int64_t transposed, void* packed) {                                \
        const Weights<T> all = {weights, strides, n_rows, n, k_size};                                   \
        if (transposed) pack_transposed<O>(all, (O::E*)packed);                                         \
        else pack<O>(all, (O::E*)packed);                                                               \
    }

PACK(fastbert_pack_float32_float32, float, Floats)
PACK(fastbert_pack_bfloat16_bfloat16, bf16, Pairs)
PACK(fastbert_pack_float32_bfloat16, float, Pairs)
