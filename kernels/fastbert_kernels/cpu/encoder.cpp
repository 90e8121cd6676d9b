// A whole encoder in one call, on CPUs: embeddings and layers over packed tokens, for inference.
//
//     x = LayerNorm(word[ids] + token_type[types] + position[positions])
//     each layer:   a = LayerNorm(attention(x W_qkv + b) W_out + b + x)
//                   x = LayerNorm(act(a W_up + b) W_down + b + a)
//
// Short texts wait for what goes on between operations, not for the operations: from Python, some hundred calls, each
// with its checks and its allocation. Here there is one call, one workspace and one parallel region (team.h). The
// operations are those of the other files.
#include "attention.h"
#include "layer_norm.h"
#include "linear.h"

namespace {

template <typename T>
struct Layer {
    const T *qkv, *qkv_bias, *out, *out_bias, *norm, *norm_bias;
    const T *up, *up_bias, *down, *down_bias, *last_norm, *last_norm_bias;
    const float* position_bias;
};

struct Sizes {
    int64_t n_rows, hidden, intermediate, n_heads, n_layers, activation;
    float eps;
};

template <typename T>
void layer_norm(T* x, const T* weight, const T* bias, const Sizes& sizes, const Team& team) {
    const int64_t n = sizes.hidden;
    float row[MAX_HIDDEN];
    team.share(sizes.n_rows, [&](int64_t r) {
        T* at = x + r * n;
        normalize([=](int64_t j) { return to_floats(at + j, n - j); }, at, weight, bias, n, sizes.eps, row);
    });
}

// x through one layer. workspace: (T, 5 H + I).
template <typename T>
void run_layer(const Layer<T>& layer, T* x, T* workspace, const AttentionPlan& plan, const Sizes& sizes,
               const Team& team, int64_t radius, const int32_t* columns) {
    const int64_t t = sizes.n_rows, h = sizes.hidden, inner = sizes.intermediate, head_size = h / sizes.n_heads;
    T *qkv = workspace, *context = qkv + t * 3 * h, *a = context + t * h, *up = a + t * h;
    linear(Linear<T>{x, layer.qkv, layer.qkv_bias, NULL, qkv, h, 0, 3 * h, t, h, 3 * h, NONE}, team);
    const PositionBias bias = {layer.position_bias, radius, columns};
    attention(qkv, context, {3 * h, sizes.n_heads, head_size, h, 1.0f / sqrtf((float)head_size), bias}, plan, team);
    linear(Linear<T>{context, layer.out, layer.out_bias, x, a, h, h, h, t, h, h, NONE}, team);
    layer_norm(a, layer.norm, layer.norm_bias, sizes, team);
    linear(Linear<T>{a, layer.up, layer.up_bias, NULL, up, h, 0, inner, t, h, inner, sizes.activation}, team);
    linear(Linear<T>{up, layer.down, layer.down_bias, a, x, inner, h, h, t, inner, h, NONE}, team);
    layer_norm(x, layer.last_norm, layer.last_norm_bias, sizes, team);
}

template <typename T>
void embed(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings, T* x,
           const Sizes& sizes, const Team& team) {
    const T *words = embeddings[0], *type_table = embeddings[1], *position_table = embeddings[2];
    const int64_t n = sizes.hidden;
    float row[MAX_HIDDEN];
    team.share(sizes.n_rows, [&](int64_t r) {
        const T *a = words + ids[r] * n, *b = position_table + positions[r] * n;
        const T* c = type_table == NULL ? NULL : type_table + types[r] * n;
        const auto total = [=](int64_t j) {
            const vf both = to_floats(a + j, n - j) + to_floats(b + j, n - j);
            return c == NULL ? both : both + to_floats(c + j, n - j);
        };
        normalize(total, x + r * n, embeddings[3], embeddings[4], n, sizes.eps, row);
    });
}

}  // namespace

// ids, types, positions: (T,). embeddings: word, token type (or NULL) and position table, weight and bias of the
// LayerNorm. layers: of each, what Layer names, the four weights packed, in order. radius, columns: members of
// PositionBias, whose table each layer has, or NULL. x: (T, H), becomes the last hidden
// state; where ids is NULL it holds the embeddings. workspace: (T, 5 H + I). H is at most MAX_HIDDEN. Returns the
// status of AttentionPlan.
#define ENCODER(name, T)                                                                                               \
    EXPORT int name(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings,    \
                    const int32_t* cu_seqlens, int64_t n_seqs, const void* layers, T* x, T* workspace, int64_t n_rows, \
                    int64_t hidden, int64_t intermediate, int64_t n_heads, int64_t n_layers, int64_t activation,       \
                    float eps, int64_t radius, const int32_t* columns) {                                               \
        const Sizes sizes = {n_rows, hidden, intermediate, n_heads, n_layers, activation, eps};                        \
        const AttentionPlan plan(cu_seqlens, n_seqs, n_rows, hidden / n_heads, radius > 0);                            \
        if (plan.status != 0) return plan.status;                                                                      \
        in_parallel([&](const Team& team) {                                                                            \
            if (ids != NULL) embed(ids, types, positions, embeddings, x, sizes, team);                                 \
            for (int64_t i = 0; i < n_layers; i++)                                                                     \
                run_layer(((const Layer<T>*)layers)[i], x, workspace, plan, sizes, team, radius, columns);             \
        });                                                                                                            \
        return 0;                                                                                                      \
    }

ENCODER(fastbert_encode_float32, float)
#ifdef __AVX512BF16__
ENCODER(fastbert_encode_bfloat16, bf16)
#endif
