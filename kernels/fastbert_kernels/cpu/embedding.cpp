// Embeddings for training, on CPUs, in one pass; and dropout of rows.
//
//     total = word[ids] + token_type[types] + position[positions],    y = dropout(LayerNorm(total))
//
// Ids: (T,) int64, checked by the caller. Tables: (V, H), (types, H), (P, H) in S; without ids, word holds the rows.
// y: (T, H) S; total, low: (T, H) C; see residual_norm.cpp. Bytes moved: read T * H elements, write 2 * T * H.
#include "residual_norm.h"

namespace {

template <typename T>
struct Table {
    const T* rows;  // or NULL
    int64_t stride;
    const int64_t* ids;  // or NULL: row r is the table's

    __attribute__((always_inline)) const T* at(int64_t r) const {
        return rows == NULL ? NULL : rows + (ids == NULL ? r : ids[r]) * stride;
    }
};

template <bool DROPOUT, typename C, typename S>
void embed(const Table<S>& words, const Table<S>& types, const Table<S>& positions, const Dropout& dropout,
           const NormRows<C, S>& out) {
    const int64_t n = out.n_columns;
    in_parallel([&](const Team& team) {
        NormRoom room;
        out.weight.read(room.weight, n);
        out.ln_bias.read(room.ln_bias, n);
        const Masks masks(dropout);
        RowMask<DROPOUT> mask;
        team.share(out.n_rows, [&](int64_t r) {
            mask.draw(masks, dropout.scale(), r, n);
            const S *word = words.at(r), *type = types.at(r), *position = positions.at(r);
            const auto total = [&](int64_t j) {
                const vf both = to_floats(word + j, n - j) + to_floats(position + j, n - j);
                return type == NULL ? both : both + to_floats(type + j, n - j);
            };
            norm_row(total, mask, out, r, room);
        });
    });
}

template <typename T>
void drop(const T* x, int64_t stride, const Dropout& dropout, int64_t n_rows, int64_t n, T* out) {
    in_parallel([&](const Team& team) {
        const Masks masks(dropout);
        const float scale = dropout.scale();
        team.share(n_rows, [&](int64_t r) {
            for (int64_t block = 0; block < over(n, 64); block++) {
                const uint64_t bits = masks(r, block);
                for (int64_t j = block * 64; j < least(block * 64 + 64, n); j += VL)
                    from_floats(out + r * n + j, where(bits >> (j % 64), to_floats(x + r * stride + j, n - j) * scale),
                                n - j);
            }
        });
    });
}

}  // namespace

// ids, types, token_type, low may be NULL. Strides in elements; columns are contiguous.
#define EMBEDDING_NORM(name, C, S)                                                                                    \
    EXPORT void fastbert_embedding_norm_##name(                                                                       \
        const int64_t* ids, const int64_t* types, const int64_t* positions, const S* word, int64_t word_stride,       \
        const S* token_type, int64_t type_stride, const S* position, int64_t position_stride, const void* weight,     \
        int64_t weight_is_bf16, const void* ln_bias, int64_t ln_bias_is_bf16, float eps, int64_t threshold,           \
        uint64_t seed, int64_t site, int64_t n_rows, int64_t n_columns, S* y, C* low, C* total, float* mean,          \
        float* rstd) {                                                                                                \
        const Table<S> words_of = {word, word_stride, ids}, types_of = {token_type, type_stride, types},              \
                       positions_of = {position, position_stride, positions};                                         \
        const NormRows<C, S> out = {                                                                                  \
            y, low, total, mean, rstd, {weight, weight_is_bf16}, {ln_bias, ln_bias_is_bf16}, n_rows, n_columns, eps}; \
        const Dropout dropout = {threshold, seed, site};                                                              \
        threshold > 0 ? embed<true>(words_of, types_of, positions_of, dropout, out)                                   \
                      : embed<false>(words_of, types_of, positions_of, dropout, out);                                 \
    }

EMBEDDING_NORM(float32, float, float)
EMBEDDING_NORM(bfloat16, bf16, bf16)
EMBEDDING_NORM(mixed, bf16, float)

#define DROP(name, T)                                                                                               \
    EXPORT void fastbert_dropout_##name(const T* x, int64_t stride, int64_t threshold, uint64_t seed, int64_t site, \
                                        int64_t n_rows, int64_t n_columns, T* out) {                                \
        drop(x, stride, {threshold, seed, site}, n_rows, n_columns, out);                                           \
    }

DROP(float32, float)
DROP(bfloat16, bf16)
