// The backward pass of a linear's bias and activation, on CPUs, in one pass over the saved data of the forward pass.
//
//     grad_pre = grad * act'(pre),    activated = act(pre),    grad_bias = column sums of grad_pre
//
// grad, pre, grad_pre, activated: (T, I), float32 or bfloat16. grad_bias: (I,) float32, summed before grad_pre is
// rounded. Bytes moved: 4 * T * I elements.
#include "activations.h"
#include "rows.h"

namespace {

constexpr int64_t STRIP = 1024;  // columns whose sums stay in the nearest cache

template <typename T>
struct ActivationBackward {
    const T *grad, *pre;
    T *grad_pre, *activated;
    int64_t grad_stride, pre_stride, n_rows, n_columns;
};

template <typename T, int ACTIVATION>
void run_strip(const ActivationBackward<T>& call, int64_t first_row, int64_t end_row, int64_t first, int64_t n,
               float* partial) {
    float sums[STRIP] = {};
    for (int64_t row = first_row; row < end_row; row++) {
        const T *grad = call.grad + row * call.grad_stride + first, *pre = call.pre + row * call.pre_stride + first;
        T* grad_pre = call.grad_pre + row * call.n_columns + first;
        T* activated = call.activated + row * call.n_columns + first;
        each_vector(n, [=, &sums](int64_t j, int64_t some) {
            const Backward back = activate_backward<T, ACTIVATION>(to_floats(pre + j, some), to_floats(grad + j, some));
            from_floats(activated + j, back.value, some);
            from_floats(grad_pre + j, back.grad, some);
            add_to(sums + j, back.grad);
        });
    }
    memcpy(partial + first, sums, n * sizeof(float));
}

template <typename T, int ACTIVATION>
void run(const ActivationBackward<T>& call, float* partials, float* grad_bias) {
    const int64_t n = call.n_columns, n_blocks = over(call.n_rows, BLOCK), n_strips = over(n, STRIP);
    in_parallel([&](const Team& team) {
        team.share(n_blocks * n_strips, [&](int64_t task) {
            const int64_t block = task / n_strips, first = task % n_strips * STRIP;
            run_strip<T, ACTIVATION>(call, block * BLOCK, least((block + 1) * BLOCK, call.n_rows), first,
                                     least(STRIP, n - first), partials + block * n);
        });
        add_blocks(partials, n_blocks, n, grad_bias, team);
    });
}

template <typename T>
void run_any(const ActivationBackward<T>& call, int64_t activation, float* partials, float* grad_bias) {
    switch (activation) {
        case GELU: return run<T, GELU>(call, partials, grad_bias);
        case GELU_TANH: return run<T, GELU_TANH>(call, partials, grad_bias);
        default: return run<T, RELU>(call, partials, grad_bias);
    }
}

}  // namespace

// Strides in elements; columns are contiguous, and grad_pre and activated are fully contiguous. partials: (over(T,
// BLOCK), I).
#define ACTIVATION_BACKWARD(name, T)                                                                                  \
    EXPORT void name(const T* grad, int64_t grad_stride, const T* pre, int64_t pre_stride, T* grad_pre, T* activated, \
                     int64_t n_rows, int64_t n_columns, int64_t activation, float* partials, float* grad_bias) {      \
        run_any(ActivationBackward<T>{grad, pre, grad_pre, activated, grad_stride, pre_stride, n_rows, n_columns},    \
                activation, partials, grad_bias);                                                                     \
    }

ACTIVATION_BACKWARD(fastbert_activation_backward_float32, float)
ACTIVATION_BACKWARD(fastbert_activation_backward_bfloat16, bf16)
