// Rotary positions and gated activations of packed rows, on CPUs, in float32 or bfloat16; products are float32.
//
//     rotary   rotates queries and keys:  a' = a cos - b sin,  b' = b cos + a sin  for elements i and i + D / 2 of a
//     head
//     gated    out = activation(first half) * second half
//
// In the backward pass, rows are rotated by the negative angles, in their own memory, and the gate's gradients are
//
//     d_first = grad * second * activation'(first),    d_second = grad * activation(first)
//
// and out is computed again. Every row runs the same code, at every position. Bytes moved: 6 * N * D elements a row, 4
// * N * D in place, 3 * I, and 6 * I back.
#include "activations.h"
#include "rotary.h"

namespace {

// qkv, out: (T, 3 * N * D), perhaps the same memory. cos, sin: (T, D / 2).
template <bool BACK, typename T>
void rotate(const T* qkv, int64_t stride, const float* cos, const float* sin, T* out, int64_t n_rows, int64_t n_heads,
            int64_t half) {
    const int64_t width = 2 * n_heads * half;
    in_parallel([&](const Team& team) {
        team.share(n_rows, [&](int64_t row) {
            const T* x = qkv + row * stride;
            T* y = out + row * 3 * width;
            rotate_row<BACK>(x, y, cos + row * half, sin + row * half, n_heads, half);
            if (x != y) memcpy(y + 2 * width, x + 2 * width, width * sizeof(T));
        });
    });
}

// x: (T, 2 * I) -> out: (T, I).
template <typename T, int ACTIVATION>
void gate(const T* x, int64_t stride, T* out, int64_t n_rows, int64_t width) {
    in_parallel([&](const Team& team) {
        team.share(n_rows, [&](int64_t row) {
            const T* from = x + row * stride;
            each_vector(width, [&](int64_t j, int64_t some) {
                const vf activated = activate<T>(to_floats(from + j, some), ACTIVATION);
                from_floats(out + row * width + j, activated * to_floats(from + width + j, some), some);
            });
        });
    });
}

template <typename T>
void gate_any(const T* x, int64_t stride, T* out, int64_t n_rows, int64_t width, int64_t activation) {
    switch (activation) {
        case GELU: return gate<T, GELU>(x, stride, out, n_rows, width);
        case GELU_TANH: return gate<T, GELU_TANH>(x, stride, out, n_rows, width);
        case SILU: return gate<T, SILU>(x, stride, out, n_rows, width);
        default: return gate<T, RELU>(x, stride, out, n_rows, width);
    }
}

// grad: (T, I), x: (T, 2 * I) -> d_x: (T, 2 * I), out: (T, I).
template <typename T, int ACTIVATION>
void gate_back(const T* grad, int64_t grad_stride, const T* x, int64_t stride, T* d_x, T* out, int64_t n_rows,
               int64_t width) {
    in_parallel([&](const Team& team) {
        team.share(n_rows, [&](int64_t row) {
            const T *from = x + row * stride, *d_out = grad + row * grad_stride;
            T* to = d_x + row * 2 * width;
            each_vector(width, [&](int64_t j, int64_t some) {
                const vf g = to_floats(d_out + j, some), second = to_floats(from + width + j, some);
                const Backward back = activate_backward<T, ACTIVATION>(to_floats(from + j, some), g * second);
                from_floats(to + j, back.grad, some);
                from_floats(to + width + j, g * back.value, some);
                from_floats(out + row * width + j, back.value * second, some);
            });
        });
    });
}

template <typename T>
void gate_any_back(const T* grad, int64_t grad_stride, const T* x, int64_t stride, T* d_x, T* out, int64_t n_rows,
                   int64_t width, int64_t activation) {
    switch (activation) {
        case GELU: return gate_back<T, GELU>(grad, grad_stride, x, stride, d_x, out, n_rows, width);
        case GELU_TANH: return gate_back<T, GELU_TANH>(grad, grad_stride, x, stride, d_x, out, n_rows, width);
        case SILU: return gate_back<T, SILU>(grad, grad_stride, x, stride, d_x, out, n_rows, width);
        default: return gate_back<T, RELU>(grad, grad_stride, x, stride, d_x, out, n_rows, width);
    }
}

}  // namespace

// Strides in elements; columns are contiguous, and out, d_x, cos and sin are fully contiguous. back: rotate back.
#define GATED(T, dtype)                                                                                              \
    EXPORT void fastbert_rotary_##dtype(const T* qkv, int64_t stride, const float* cos, const float* sin, T* out,    \
                                        int64_t n_rows, int64_t n_heads, int64_t half, int64_t back) {               \
        if (back) rotate<true>(qkv, stride, cos, sin, out, n_rows, n_heads, half);                                   \
        else rotate<false>(qkv, stride, cos, sin, out, n_rows, n_heads, half);                                       \
    }                                                                                                                \
    EXPORT void fastbert_gated_##dtype(const T* x, int64_t stride, T* out, int64_t n_rows, int64_t width,            \
                                       int64_t activation) {                                                         \
        gate_any(x, stride, out, n_rows, width, activation);                                                         \
    }                                                                                                                \
    EXPORT void fastbert_gated_backward_##dtype(const T* grad, int64_t grad_stride, const T* x, int64_t stride,      \
                                                T* d_x, T* out, int64_t n_rows, int64_t width, int64_t activation) { \
        gate_any_back(grad, grad_stride, x, stride, d_x, out, n_rows, width, activation);                            \
    }

GATED(float, float32)
GATED(bf16, bfloat16)
