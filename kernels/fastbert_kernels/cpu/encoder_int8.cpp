// A whole encoder in one call with linears on 8-bit operands, on CPUs with AVX-512 VNNI.
//
// The arithmetic is encoder.cpp's except for the linears. Each of them multiplies rows that are quantised just before
// (quantize.h; linear_int8.cpp). The outputs of LayerNorm and attention are rotated first, and the weight as well. The
// convolution beside the first layer is multiplied in float32.
//
// Everything except attention works on each row separately. So a thread takes a chunk of rows from attention's result
// to the next layer's query, key and value. The intermediate data stay in its cache, and a layer costs two waits for
// the other threads. Few rows make too few chunks: then all threads work on the linears of a single one.
#include "encoder.h"
#include "layer_norm.h"
#include "quantize.h"

#ifdef __AVX512VNNI__

namespace {

constexpr int64_t MOST_ROWS = 64;         // in a chunk
constexpr int64_t INNER_BYTES = 1 << 18;  // of a chunk's activations
constexpr int64_t TOGETHER_BELOW = 16;    // rows for each thread
constexpr int64_t LINE = 64;              // bytes

struct Weight {
    const int8_t* packed;
    const float* columns;  // with the bias
};

template <typename T>
struct Layer {
    Weight qkv, out;
    const T *norm, *norm_bias;
    Weight up, down;
    const T *output_norm, *output_norm_bias;
    Weight gate;                          // of NULLs if there is none
    const T *last_norm, *last_norm_bias;  // of the layer's output, if it normalises first; or NULL
    Traits traits;
};

struct Sizes {
    int64_t n_rows, hidden, intermediate, n_heads, n_layers, activation;
    float eps;
};

INLINE int64_t lines(int64_t bytes) { return over(bytes, LINE) * LINE; }

// How the rows are divided, and the memory of one chunk.
template <typename T>
struct Chunks {
    int64_t size, n, n_threads;
    bool together;

    explicit Chunks(const Sizes& sizes) {
        n_threads = omp_get_max_threads();
        const int64_t t = sizes.n_rows;
        together = n_threads > 1 && t < TOGETHER_BELOW * n_threads;
        int64_t most = INNER_BYTES / (sizes.intermediate * (int64_t)sizeof(T)) / 8 * 8;
        most = most < 16 ? 16 : least(most, MOST_ROWS);
        const int64_t wanted = over(t, n_threads * most) * n_threads;  // the same number for each thread
        size = together ? t : least(over(over(t, wanted), 8) * 8, most);
        n = size > 0 ? over(t, size) : 0;
    }

    int64_t bytes(const Sizes& sizes) const {
        const int64_t h = sizes.hidden, inner = sizes.intermediate, widest = h > inner ? h : inner;
        return lines(size * sizeof(Affine)) + lines(size * (widest + LINE)) + lines(size * h * sizeof(T)) +
               lines(size * h * sizeof(float)) + lines(size * inner * sizeof(T));
    }

    int64_t n_scratches() const { return together ? 1 : n_threads; }
};

// The memory for a chunk's rows.
template <typename T>
struct Scratch {
    Affine* affine;
    uint8_t* q;
    T* a;        // the residual of the second half of a layer, (size, H)
    float* sum;  // the input of LayerNorm, (size, H)
    T* up;       // (size, I)

    Scratch(char* memory, const Chunks<T>& chunks, const Sizes& sizes) {
        const int64_t size = chunks.size, h = sizes.hidden, inner = sizes.intermediate, widest = h > inner ? h : inner;
        affine = (Affine*)memory;
        q = (uint8_t*)affine + lines(size * sizeof(Affine));
        a = (T*)(q + lines(size * (widest + LINE)));
        sum = (float*)((char*)a + lines(size * h * sizeof(T)));
        up = (T*)((char*)sum + lines(size * h * sizeof(float)));
    }
};

template <typename T>
struct Encoder {
    const Sizes& sizes;
    const Batch& batch;
    T *qkv, *context;
    const Convolution<T, float>& conv;
    const float* beside;  // its output, (T, H), or NULL
    const Team& team;     // of a chunk: one thread, or all

    // out[n] = activation(q W^T + bias) * factor + residual, for the rows in scratch.
    template <typename O>
    void linear(const Scratch<T>& s, const Weight& w, const T* residual, O* out, int64_t n, int64_t k, int64_t columns,
                int64_t activation, const T* factor = NULL) const {
        linear_int8(LinearInt8<T, O>{s.q, s.affine, w.packed, w.columns, residual, out, lines(k), columns, columns, n,
                                     k, columns, activation, factor, columns},
                    team);
    }

    // Rows of floats, (n, H), through LayerNorm into out, and quantised into scratch.
    template <typename Read>
    void norm(const Scratch<T>& s, Read read, const T* weight, const T* bias, T* out, int64_t n, bool quantised) const {
        const int64_t h = sizes.hidden;
        float row[MAX_HIDDEN];
        team.share(n, [&](int64_t r) {
            normalize([&](int64_t j) { return read(r, j); }, out + r * h, weight, bias, h, sizes.eps, row);
            if (quantised) s.affine[r] = quantize_rotated(row, h, s.q + r * lines(h));
        });
    }

    void quantize_rows(const Scratch<T>& s, const T* x, int64_t n) const {
        const int64_t h = sizes.hidden;
        float row[MAX_HIDDEN];
        team.share(n, [&](int64_t r) {
            for (int64_t j = 0; j < h; j += VL) store(row + j, to_floats(x + r * h + j));
            s.affine[r] = quantize_rotated(row, h, s.q + r * lines(h));
        });
    }

    // Rows of floats, (n, H), unchanged into out, and through LayerNorm, if there is a weight, quantised into scratch.
    template <typename Read>
    void norm_beside(const Scratch<T>& s, Read read, const T* weight, const T* bias, T* out, int64_t n) const {
        const int64_t h = sizes.hidden;
        float row[MAX_HIDDEN];
        team.share(n, [&](int64_t r) {
            for (int64_t j = 0; j < h; j += VL) from_floats(out + r * h + j, read(r, j));
            const auto keep = [&](int64_t j, vf y) { store(row + j, y); };
            if (weight == NULL)
                for (int64_t j = 0; j < h; j += VL) keep(j, read(r, j));
            else normalize_by([&](int64_t j) { return read(r, j); }, keep, weight, bias, h, sizes.eps, row);
            s.affine[r] = quantize_rotated(row, h, s.q + r * lines(h));
        });
    }

    // From attention's result to the hidden state, y, and the next layer's query, key and value. x: the state before.
    // convolved: whether there is a convolution beside the layer, which has its norms last.
    void rest(const Scratch<T>& s, const Layer<T>& layer, const Layer<T>* next, bool convolved, const T* x, T* y,
              int64_t first, int64_t n) const {
        const int64_t h = sizes.hidden, inner = sizes.intermediate;
        const bool pre_norm = layer.traits.pre_norm;
        const auto read = [&](int64_t r, int64_t j) { return load<vf>(s.sum + r * h + j); };
        y += first * h;
        quantize_rows(s, context + first * h, n);
        linear(s, layer.out, x + first * h, s.sum, n, h, h, NONE);
        if (pre_norm) norm_beside(s, read, layer.output_norm, layer.output_norm_bias, s.a, n);
        else norm(s, read, layer.norm, layer.norm_bias, s.a, n, true);
        const T* factor = layer.gate.packed == NULL ? NULL : s.up;
        if (factor != NULL) linear(s, layer.gate, (const T*)NULL, s.up, n, h, inner, NONE);
        linear(s, layer.up, (const T*)NULL, s.up, n, h, inner, sizes.activation, factor);
        team.share(n, [&](int64_t r) { s.affine[r] = quantize(s.up + r * inner, inner, s.q + r * lines(inner)); });
        linear(s, layer.down, s.a, s.sum, n, inner, h, NONE);
        if (convolved) {
            const float* c = beside + first * h;
            const auto both = [&](int64_t r, int64_t j) {
                return to_floats(s.a + r * h + j) + load<vf>(c + r * h + j);
            };
            norm(s, read, layer.output_norm, layer.output_norm_bias, s.a, n, false);
            norm(s, both, conv.norm, conv.norm_bias, y, n, next != NULL);
        } else if (!pre_norm) norm(s, read, layer.output_norm, layer.output_norm_bias, y, n, next != NULL);
        else if (layer.last_norm != NULL) norm(s, read, layer.last_norm, layer.last_norm_bias, y, n, next != NULL);
        else norm_beside(s, read, next == NULL ? NULL : next->norm, next == NULL ? NULL : next->norm_bias, y, n);
        if (next != NULL) project(s, *next, first, n);
    }

    void project(const Scratch<T>& s, const Layer<T>& layer, int64_t first, int64_t n) const {
        const int64_t h = sizes.hidden;
        T* rows = qkv + first * 3 * h;
        linear(s, layer.qkv, (const T*)NULL, rows, n, h, 3 * h, NONE);
        batch.turn(rows, first, n, layer.traits, team);
    }
};

// f(encoder, scratch, first row, number of rows) for every chunk, by one thread or by all together.
template <typename T, typename F>
INLINE void each_chunk(const Chunks<T>& chunks, const Encoder<T>& all, char* memory, F f) {
    const Sizes& sizes = all.sizes;
    const Team& team = all.team;
    if (chunks.together) return f(all, Scratch<T>(memory, chunks, sizes), (int64_t)0, sizes.n_rows);
    const Team alone;
    const Encoder<T> encoder = {sizes, all.batch, all.qkv, all.context, all.conv, all.beside, alone};
    const Scratch<T> scratch(memory + team.id * chunks.bytes(sizes), chunks, sizes);
    team.each(chunks.n, [&](int64_t i) {
        f(encoder, scratch, i * chunks.size, least(chunks.size, sizes.n_rows - i * chunks.size));
    });
}

// conv_size: columns of the convolution, 0 for none.
template <typename T>
int64_t bytes_for(const Sizes& sizes, int64_t conv_size) {
    const int64_t t = sizes.n_rows, h = sizes.hidden;
    if (t == 0) return 0;
    const Chunks<T> chunks(sizes);
    const int64_t bytes = LINE + lines(t * 4 * h * sizeof(T)) + chunks.n_scratches() * chunks.bytes(sizes);
    if (conv_size == 0) return bytes;
    return bytes + lines(t * h * sizeof(float)) + Convolution<T, float>::room(t, h, conv_size) * sizeof(float);
}

template <typename T>
int encode(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings,
           const int32_t* cu_seqlens, int64_t n_seqs, const Layer<T>* layers, T* x, int64_t step, char* workspace,
           int64_t n_bytes, const Sizes& sizes, const float* const* angles, const int32_t* columns,
           const Common<T, float>& common) {
    const int64_t t = sizes.n_rows, h = sizes.hidden;
    const Convolution<T, float>& conv = common.convolution;
    if (t == 0) return 0;
    if (n_bytes < bytes_for<T>(sizes, conv.size)) return 1;
    const Chunks<T> chunks(sizes);
    workspace = (char*)lines((int64_t)workspace);
    T *qkv = (T*)workspace, *context = qkv + t * 3 * h;
    char* memory = workspace + lines(t * 4 * h * sizeof(T));
    const bool some = sizes.n_layers > 0, convolved = some && conv.weight != NULL;
    float* beside = convolved ? (float*)(memory + chunks.n_scratches() * chunks.bytes(sizes)) : NULL;
    bool biased;
    const int64_t window = window_of(layers, sizes.n_layers, &biased);
    const Batch batch(cu_seqlens, n_seqs, t, sizes.n_heads, h / sizes.n_heads, biased, window, angles, columns,
                      common.scores);
    if (batch.status() != 0) return batch.status();
    const bool norm_first = some && layers[0].traits.pre_norm && layers[0].norm != NULL;
    in_parallel([&](const Team& team) {
        const Encoder<T> all = {sizes, batch, qkv, context, conv, beside, team};
        const auto in_chunks = [&](auto f) { each_chunk(chunks, all, memory, f); };
        in_chunks([&](const Encoder<T>& encoder, const Scratch<T>& s, int64_t first, int64_t n) {
            if (ids != NULL) {
                const auto total = [&](int64_t r, int64_t j) {
                    vf sum = to_floats(embeddings[0] + ids[first + r] * h + j);
                    if (embeddings[2] != NULL) sum += to_floats(embeddings[2] + positions[first + r] * h + j);
                    if (embeddings[1] == NULL) return sum;
                    return sum + to_floats(embeddings[1] + types[first + r] * h + j);
                };
                encoder.norm(s, total, embeddings[3], embeddings[4], x + first * h, n, some && !norm_first);
            } else if (some && !norm_first) {
                encoder.quantize_rows(s, x + first * h, n);
            }
            if (norm_first) {
                T* rows = x + first * h;
                const auto read = [&](int64_t r, int64_t j) { return to_floats(rows + r * h + j); };
                encoder.norm_beside(s, read, layers[0].norm, layers[0].norm_bias, rows, n);
            }
            if (some) encoder.project(s, layers[0], first, n);
        });
        if (convolved)
            convolve(x, beside, (float*)((char*)beside + lines(t * h * sizeof(float))), conv, batch.places, t, h, team);
        T* state = x;
        for (int64_t i = 0; i < sizes.n_layers; i++, state += step) {
            batch.attend(qkv, context, layers[i].traits, team);
            const Layer<T>* next = i + 1 < sizes.n_layers ? layers + i + 1 : NULL;
            in_chunks([&](const Encoder<T>& encoder, const Scratch<T>& s, int64_t first, int64_t n) {
                encoder.rest(s, layers[i], next, convolved && i == 0, state, state + step, first, n);
            });
        }
    });
    return 0;
}

}  // namespace

// As in encoder.cpp, with these differences. A weight is two pointers, the packed numbers and `columns`
// (linear_int8.cpp). H and I are multiples of ROTATION. x is the state before the first layer: the state after layer i
// goes to x + (i + 1) * step elements, which with step 0 is x. workspace: n_bytes, at least the result of _bytes in the
// same thread.
#define ENCODER(name, T)                                                                                            \
    EXPORT int64_t name##_bytes(int64_t n_rows, int64_t hidden, int64_t intermediate, int64_t conv_size) {          \
        return bytes_for<T>({n_rows, hidden, intermediate, 1, 1, 0, 0.0f}, conv_size);                              \
    }                                                                                                               \
    EXPORT int name(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings, \
                    const int32_t* cu_seqlens, int64_t n_seqs, const void* layers, T* x, int64_t step,              \
                    char* workspace, int64_t n_bytes, int64_t n_rows, int64_t hidden, int64_t intermediate,         \
                    int64_t n_heads, int64_t n_layers, int64_t activation, float eps, const float* const* angles,   \
                    const int32_t* columns, const Common<T, float>* common) {                                       \
        return encode<T>(ids, types, positions, embeddings, cu_seqlens, n_seqs, (const Layer<T>*)layers, x, step,   \
                         workspace, n_bytes, {n_rows, hidden, intermediate, n_heads, n_layers, activation, eps},    \
                         angles, columns, *common);                                                                 \
    }

ENCODER(fastbert_encode_int8_float32, float)
ENCODER(fastbert_encode_int8_bfloat16, bf16)

#endif
