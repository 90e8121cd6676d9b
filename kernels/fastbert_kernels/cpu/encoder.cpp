// A whole encoder in one call, on CPUs: embeddings and layers over packed tokens, for inference.
//
//     x = LayerNorm(word[ids] + token_type[types] + position[positions])
//     each layer:   a = LayerNorm(attention(x W_qkv + b) W_out + b + x)
//                   x = LayerNorm(act(a W_up + b) W_down + b + a)
//     pre-norm:     a = x + attention(LayerNorm(x) W_qkv + b) W_out + b
//                   x = a + act(LayerNorm(a) W_up + b) W_down + b
//
// With a gate act(a W_up + b) is multiplied by a W_gate + b. Queries and keys may be rotated. Attention may have a
// window or a position bias, or be disentangled (encoder.h). Some families lack a table of the embeddings, or biases.
// There may be a convolution beside the first layer (convolution.h).
//
// For short texts the work between the operations takes longer than the operations: from Python, some hundred calls,
// each with its checks and its allocation. Here there is one call, one workspace and one parallel region (team.h). The
// operations are those of the other files.
#include "encoder.h"
#include "layer_norm.h"
#include "linear.h"

namespace {

template <typename T>
struct Layer {
    const T *qkv, *qkv_bias, *out, *out_bias, *norm, *norm_bias;
    const T *up, *up_bias, *down, *down_bias, *output_norm, *output_norm_bias;
    const T *gate, *gate_bias, *last_norm, *last_norm_bias;  // last_norm: of the layer's output; all four or NULL
    Traits traits;
};

struct Sizes {
    int64_t n_rows, hidden, intermediate, n_heads, n_layers, activation;
    float eps;
};

// LayerNorm of x into y, which may be x.
template <typename T>
void layer_norm(const T* x, T* y, const T* weight, const T* bias, const Sizes& sizes, const Team& team) {
    const int64_t n = sizes.hidden;
    float row[MAX_HIDDEN];
    team.share(sizes.n_rows, [&](int64_t r) {
        const T* at = x + r * n;
        normalize([=](int64_t j) { return to_floats(at + j, n - j); }, y + r * n, weight, bias, n, sizes.eps, row);
    });
}

// x through one layer. workspace: (T, 5 H + I).
template <typename T>
void run_layer(const Layer<T>& layer, T* x, T* workspace, const Batch& batch, const Sizes& sizes, const Team& team) {
    const int64_t t = sizes.n_rows, h = sizes.hidden, inner = sizes.intermediate;
    const bool pre_norm = layer.traits.pre_norm;
    T *qkv = workspace, *context = qkv + t * 3 * h, *a = context + t * h, *up = a + t * h;
    const T* read = x;
    if (pre_norm && layer.norm != NULL) {
        layer_norm(x, a, layer.norm, layer.norm_bias, sizes, team);
        read = a;
    }
    linear(Linear<T>{read, layer.qkv, layer.qkv_bias, NULL, qkv, h, 0, 3 * h, t, h, 3 * h, NONE}, team);
    batch.turn(qkv, 0, t, layer.traits, team);
    batch.attend(qkv, context, layer.traits, team);
    T* sum = pre_norm ? x : a;
    linear(Linear<T>{context, layer.out, layer.out_bias, x, sum, h, h, h, t, h, h, NONE}, team);
    if (pre_norm) layer_norm(x, a, layer.output_norm, layer.output_norm_bias, sizes, team);
    else layer_norm(a, a, layer.norm, layer.norm_bias, sizes, team);
    Linear<T> to_inner = {a, layer.up, layer.up_bias, NULL, up, h, 0, inner, t, h, inner, sizes.activation};
    if (layer.gate != NULL) {
        linear(Linear<T>{a, layer.gate, layer.gate_bias, NULL, up, h, 0, inner, t, h, inner, NONE}, team);
        to_inner.factor = up;
        to_inner.factor_stride = inner;
    }
    linear(to_inner, team);
    linear(Linear<T>{up, layer.down, layer.down_bias, sum, x, inner, h, h, t, inner, h, NONE}, team);
    if (!pre_norm) layer_norm(x, x, layer.output_norm, layer.output_norm_bias, sizes, team);
    if (layer.last_norm != NULL) layer_norm(x, x, layer.last_norm, layer.last_norm_bias, sizes, team);
}

// x = LayerNorm(x + beside), for the convolution beside a layer.
template <typename T>
void add_beside(T* x, const T* beside, const Convolution<T>& conv, const Sizes& sizes, const Team& team) {
    const int64_t n = sizes.hidden;
    float row[MAX_HIDDEN];
    team.share(sizes.n_rows, [&](int64_t r) {
        const T *a = x + r * n, *b = beside + r * n;
        const auto total = [=](int64_t j) { return to_floats(a + j, n - j) + to_floats(b + j, n - j); };
        normalize(total, x + r * n, conv.norm, conv.norm_bias, n, sizes.eps, row);
    });
}

// workspace: see below.
template <typename T>
void run_layers(const Layer<T>* layers, T* x, T* workspace, const Batch& batch, const Convolution<T>& conv,
                const Sizes& sizes, const Team& team) {
    T* beside = NULL;
    if (conv.weight != NULL && sizes.n_layers > 0) {
        beside = workspace;
        workspace += sizes.n_rows * sizes.hidden;
        convolve(x, beside, workspace, conv, batch.places, sizes.n_rows, sizes.hidden, team);
    }
    for (int64_t i = 0; i < sizes.n_layers; i++) {
        run_layer(layers[i], x, workspace, batch, sizes, team);
        if (i == 0 && beside != NULL) add_beside(x, beside, conv, sizes, team);
    }
}

template <typename T>
void embed(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings, T* x,
           const Sizes& sizes, const Team& team) {
    const T *words = embeddings[0], *type_table = embeddings[1], *position_table = embeddings[2];
    const int64_t n = sizes.hidden;
    float row[MAX_HIDDEN];
    team.share(sizes.n_rows, [&](int64_t r) {
        const T* a = words + ids[r] * n;
        const T* b = position_table == NULL ? NULL : position_table + positions[r] * n;
        const T* c = type_table == NULL ? NULL : type_table + types[r] * n;
        const auto total = [=](int64_t j) {
            vf sum = to_floats(a + j, n - j);
            if (b != NULL) sum += to_floats(b + j, n - j);
            return c == NULL ? sum : sum + to_floats(c + j, n - j);
        };
        normalize(total, x + r * n, embeddings[3], embeddings[4], n, sizes.eps, row);
    });
}

}  // namespace

// ids, types, positions: (T,). embeddings: word, token type (or NULL) and position table (or NULL), weight and bias of
// the LayerNorm. layers: the members of Layer for each layer, weights packed, in order; those with a window have the
// same one. angles, columns: see Batch. x: (T, H), becomes the last hidden state; if ids is NULL it holds the
// embeddings. workspace: (T, 5 H + I), or with a convolution T * H more than the larger of that and its room. H is at
// most MAX_HIDDEN. Returns the status of Batch.
#define ENCODER(name, T)                                                                                               \
    EXPORT int name(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings,    \
                    const int32_t* cu_seqlens, int64_t n_seqs, const void* layers, T* x, T* workspace, int64_t n_rows, \
                    int64_t hidden, int64_t intermediate, int64_t n_heads, int64_t n_layers, int64_t activation,       \
                    float eps, const float* const* angles, const int32_t* columns, const Common<T>* common) {          \
        const Sizes sizes = {n_rows, hidden, intermediate, n_heads, n_layers, activation, eps};                        \
        bool biased;                                                                                                   \
        const int64_t window = window_of((const Layer<T>*)layers, n_layers, &biased);                                  \
        const Batch batch(cu_seqlens, n_seqs, n_rows, n_heads, hidden / n_heads, biased, window, angles, columns,      \
                          common->scores);                                                                             \
        if (batch.status() != 0) return batch.status();                                                                \
        in_parallel([&](const Team& team) {                                                                            \
            if (ids != NULL) embed(ids, types, positions, embeddings, x, sizes, team);                                 \
            run_layers((const Layer<T>*)layers, x, workspace, batch, common->convolution, sizes, team);                \
        });                                                                                                            \
        return 0;                                                                                                      \
    }

ENCODER(fastbert_encode_float32, float)
ENCODER(fastbert_encode_bfloat16, bf16)
