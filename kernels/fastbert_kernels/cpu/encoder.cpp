// A whole encoder in one call, on CPUs: embeddings and layers over packed tokens, for inference.
//
//     x = LayerNorm(word[ids] + token_type[types] + position[positions])
//     each layer:   a = LayerNorm(attention(x W_qkv + b) W_out + b + x)
//                   x = LayerNorm(act(a W_up + b) W_down + b + a)
//
// Short texts wait for what goes on between operations, not for the operations: from Python, some hundred calls, each with
// its checks and its allocation. Here there is one call and one workspace. The operations are those of the other files.
#include "attention.h"
#include "layer_norm.h"
#include "linear.h"

namespace {

template <typename T>
struct Layer {
    const T *qkv, *qkv_bias, *out, *out_bias, *norm, *norm_bias;
    const T *up, *up_bias, *down, *down_bias, *last_norm, *last_norm_bias;
};

struct Sizes {
    int64_t n_rows, hidden, intermediate, n_heads, n_layers, activation;
    float eps;
};

template <typename T>
void layer_norm(T* x, const T* weight, const T* bias, const Sizes& sizes) {
    const int64_t n = sizes.hidden;
#pragma omp parallel
    {
        float row[MAX_HIDDEN];
#pragma omp for schedule(static)
        for (int64_t r = 0; r < sizes.n_rows; r++) {
            T* at = x + r * n;
            normalize([=](int64_t j) { return to_floats(at + j, n - j); }, at, weight, bias, n, sizes.eps, row);
        }
    }
}

template <typename T>
int encode(T* x, T* workspace, const int32_t* cu_seqlens, int64_t n_seqs, const Layer<T>* layers, const Sizes& sizes) {
    const int64_t t = sizes.n_rows, h = sizes.hidden, inner = sizes.intermediate;
    T *qkv = workspace, *context = qkv + t * 3 * h, *a = context + t * h, *up = a + t * h;
    const float scale = 1.0f / sqrtf((float)(h / sizes.n_heads));
    for (int64_t i = 0; i < sizes.n_layers; i++) {
        const Layer<T>& layer = layers[i];
        linear(Linear<T>{x, layer.qkv, layer.qkv_bias, NULL, qkv, h, 0, 3 * h, t, h, 3 * h, NONE});
        const int status = attention(qkv, t, cu_seqlens, n_seqs, context, {3 * h, sizes.n_heads, h / sizes.n_heads, h, scale});
        if (status != 0) return status;
        linear(Linear<T>{context, layer.out, layer.out_bias, x, a, h, h, h, t, h, h, NONE});
        layer_norm(a, layer.norm, layer.norm_bias, sizes);
        linear(Linear<T>{a, layer.up, layer.up_bias, NULL, up, h, 0, inner, t, h, inner, sizes.activation});
        linear(Linear<T>{up, layer.down, layer.down_bias, a, x, inner, h, h, t, inner, h, NONE});
        layer_norm(x, layer.last_norm, layer.last_norm_bias, sizes);
    }
    return 0;
}

template <typename T>
void embed(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* words, const T* type_table,
           const T* position_table, const T* weight, const T* bias, T* x, const Sizes& sizes) {
    const int64_t n = sizes.hidden;
#pragma omp parallel
    {
        float row[MAX_HIDDEN];
#pragma omp for schedule(static)
        for (int64_t r = 0; r < sizes.n_rows; r++) {
            const T *a = words + ids[r] * n, *b = position_table + positions[r] * n;
            const T* c = type_table == NULL ? NULL : type_table + types[r] * n;
            const auto total = [=](int64_t j) {
                const vf both = to_floats(a + j, n - j) + to_floats(b + j, n - j);
                return c == NULL ? both : both + to_floats(c + j, n - j);
            };
            normalize(total, x + r * n, weight, bias, n, sizes.eps, row);
        }
    }
}

}  // namespace

// ids, types, positions: (T,). embeddings: word, token type (or NULL) and position table, weight and bias of the LayerNorm. layers: of
// each, what Layer names, the four weights packed, in order. x: (T, H), becomes the last hidden state; where ids is NULL
// it holds the embeddings. workspace: (T, 5 H + I). H is at most MAX_HIDDEN. 0, or what `attention` returns.
#define ENCODER(name, T)                                                                                              \
    EXPORT int name(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings,    \
                    const int32_t* cu_seqlens, int64_t n_seqs, const void* layers, T* x, T* workspace, int64_t n_rows, \
                    int64_t hidden, int64_t intermediate, int64_t n_heads, int64_t n_layers, int64_t activation,       \
                    float eps) {                                                                                       \
        const Sizes sizes = {n_rows, hidden, intermediate, n_heads, n_layers, activation, eps};                        \
        if (ids != NULL)                                                                                               \
            embed(ids, types, positions, embeddings[0], embeddings[1], embeddings[2], embeddings[3], embeddings[4], x, \
                  sizes);                                                                                              \
        return encode(x, workspace, cu_seqlens, n_seqs, (const Layer<T>*)layers, sizes);                               \
    }

ENCODER(fastbert_encode_float32, float)
#ifdef __AVX512BF16__
ENCODER(fastbert_encode_bfloat16, bf16)
#endif
