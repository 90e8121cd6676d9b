// A whole encoder in one call with linears on 8-bit operands, on CPUs with AVX-512 VNNI.
//
// The arithmetic is that of encoder.cpp but for the linears, each of which multiplies rows that are quantised just
// before (quantize.h; linear_int8.cpp). Rows that LayerNorm or attention gives are rotated first, and the weight as
// well.
//
// All but attention works on each row for itself, so a thread takes a chunk of rows from attention's result to the next
// layer's query, key and value. What lies between stays in its cache, and a layer costs two waits for the other
// threads. Few rows make too few chunks: then all threads work on the linears of a single one.
#include "attention.h"
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
    const T *last_norm, *last_norm_bias;
    const float* position_bias;
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
        const int64_t wanted = over(t, n_threads * most) * n_threads;  // as many for each thread
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

// The memory that a chunk's rows go through.
template <typename T>
struct Scratch {
    Affine* affine;
    uint8_t* q;
    T* a;        // the residual of the second half of a layer, (size, H)
    float* sum;  // what LayerNorm reads, (size, H)
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
    T *qkv, *context;
    const Team& team;  // of a chunk: one thread, or all

    // out[n] = activation(q W^T + bias) + residual, of the rows that scratch holds.
    template <typename O>
    void linear(const Scratch<T>& s, const Weight& w, const T* residual, O* out, int64_t n, int64_t k, int64_t columns,
                int64_t activation) const {
        linear_int8(LinearInt8<T, O>{s.q, s.affine, w.packed, w.columns, residual, out, lines(k), columns, columns, n,
                                     k, columns, activation},
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

    // From attention's result to the hidden state, y, and the next layer's query, key and value. x: the state before.
    void rest(const Scratch<T>& s, const Layer<T>& layer, const Layer<T>* next, const T* x, T* y, int64_t first,
              int64_t n) const {
        const int64_t h = sizes.hidden, inner = sizes.intermediate;
        const auto read = [&](int64_t r, int64_t j) { return load<vf>(s.sum + r * h + j); };
        quantize_rows(s, context + first * h, n);
        linear(s, layer.out, x + first * h, s.sum, n, h, h, NONE);
        norm(s, read, layer.norm, layer.norm_bias, s.a, n, true);
        linear(s, layer.up, (const T*)NULL, s.up, n, h, inner, sizes.activation);
        team.share(n, [&](int64_t r) { s.affine[r] = quantize(s.up + r * inner, inner, s.q + r * lines(inner)); });
        linear(s, layer.down, s.a, s.sum, n, inner, h, NONE);
        norm(s, read, layer.last_norm, layer.last_norm_bias, y + first * h, n, next != NULL);
        if (next != NULL) project(s, *next, first, n);
    }

    void project(const Scratch<T>& s, const Layer<T>& layer, int64_t first, int64_t n) const {
        const int64_t h = sizes.hidden;
        linear(s, layer.qkv, (const T*)NULL, qkv + first * 3 * h, n, h, 3 * h, NONE);
    }
};

// f(encoder, scratch, first row, number of rows) for every chunk, by one thread or by all together.
template <typename T, typename F>
INLINE void each_chunk(const Chunks<T>& chunks, const Sizes& sizes, char* memory, T* qkv, T* context, const Team& team,
                       F f) {
    if (chunks.together)
        return f(Encoder<T>{sizes, qkv, context, team}, Scratch<T>(memory, chunks, sizes), (int64_t)0, sizes.n_rows);
    const Team alone;
    const Encoder<T> encoder = {sizes, qkv, context, alone};
    const Scratch<T> scratch(memory + team.id * chunks.bytes(sizes), chunks, sizes);
    team.each(chunks.n, [&](int64_t i) {
        f(encoder, scratch, i * chunks.size, least(chunks.size, sizes.n_rows - i * chunks.size));
    });
}

template <typename T>
int64_t bytes_for(const Sizes& sizes) {
    if (sizes.n_rows == 0) return 0;
    const Chunks<T> chunks(sizes);
    return LINE + lines(sizes.n_rows * 4 * sizes.hidden * sizeof(T)) + chunks.n_scratches() * chunks.bytes(sizes);
}

template <typename T>
int encode(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings,
           const int32_t* cu_seqlens, int64_t n_seqs, const Layer<T>* layers, T* x, int64_t step, char* workspace,
           int64_t n_bytes, const Sizes& sizes, int64_t radius, const int32_t* columns) {
    const int64_t t = sizes.n_rows, h = sizes.hidden;
    if (t == 0) return 0;
    if (n_bytes < bytes_for<T>(sizes)) return 1;
    const Chunks<T> chunks(sizes);
    workspace = (char*)lines((int64_t)workspace);
    T *qkv = (T*)workspace, *context = qkv + t * 3 * h;
    char* memory = workspace + lines(t * 4 * h * sizeof(T));
    const bool some = sizes.n_layers > 0;
    const AttentionPlan plan(cu_seqlens, n_seqs, t, h / sizes.n_heads, radius > 0);
    if (plan.status != 0) return plan.status;
    const int64_t head_size = h / sizes.n_heads;
    const float scale = 1.0f / sqrtf((float)head_size);
    in_parallel([&](const Team& team) {
        const auto in_chunks = [&](auto f) { each_chunk(chunks, sizes, memory, qkv, context, team, f); };
        in_chunks([&](const Encoder<T>& encoder, const Scratch<T>& s, int64_t first, int64_t n) {
            if (ids != NULL) {
                const auto total = [&](int64_t r, int64_t j) {
                    const T *a = embeddings[0] + ids[first + r] * h, *b = embeddings[2] + positions[first + r] * h;
                    const vf both = to_floats(a + j) + to_floats(b + j);
                    return embeddings[1] == NULL ? both : both + to_floats(embeddings[1] + types[first + r] * h + j);
                };
                encoder.norm(s, total, embeddings[3], embeddings[4], x + first * h, n, some);
            } else if (some) {
                encoder.quantize_rows(s, x + first * h, n);
            }
            if (some) encoder.project(s, layers[0], first, n);
        });
        T* state = x;
        for (int64_t i = 0; i < sizes.n_layers; i++, state += step) {
            const PositionBias bias = {layers[i].position_bias, radius, columns};
            attention(qkv, context, {3 * h, sizes.n_heads, head_size, h, scale, bias}, plan, team);
            const Layer<T>* next = i + 1 < sizes.n_layers ? layers + i + 1 : NULL;
            in_chunks([&](const Encoder<T>& encoder, const Scratch<T>& s, int64_t first, int64_t n) {
                encoder.rest(s, layers[i], next, state, state + step, first, n);
            });
        }
    });
    return 0;
}

}  // namespace

// As in encoder.cpp, but that a weight is two pointers, the packed numbers and `columns` (linear_int8.cpp), H and I are
// multiples of ROTATION, and x is the state before the first layer: that after layer i goes to x + (i + 1) * step
// elements, which with step 0 is x. workspace: n_bytes, at least what _bytes gives in the same thread.
#define ENCODER(name, T)                                                                                            \
    EXPORT int64_t name##_bytes(int64_t n_rows, int64_t hidden, int64_t intermediate) {                             \
        return bytes_for<T>({n_rows, hidden, intermediate, 1, 1, 0, 0.0f});                                         \
    }                                                                                                               \
    EXPORT int name(const int64_t* ids, const int64_t* types, const int64_t* positions, const T* const* embeddings, \
                    const int32_t* cu_seqlens, int64_t n_seqs, const void* layers, T* x, int64_t step,              \
                    char* workspace, int64_t n_bytes, int64_t n_rows, int64_t hidden, int64_t intermediate,         \
                    int64_t n_heads, int64_t n_layers, int64_t activation, float eps, int64_t radius,               \
                    const int32_t* columns) {                                                                       \
        return encode<T>(ids, types, positions, embeddings, cu_seqlens, n_seqs, (const Layer<T>*)layers, x, step,   \
                         workspace, n_bytes, {n_rows, hidden, intermediate, n_heads, n_layers, activation, eps},    \
                         radius, columns);                                                                          \
    }

ENCODER(fastbert_encode_int8_float32, float)
ENCODER(fastbert_encode_int8_bfloat16, bf16)

#endif
