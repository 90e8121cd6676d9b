// Bias, dropout, residual and LayerNorm for training, on CPUs: one pass forward, one backward.
//
//     total = dropout(x + bias) + residual,    y = (total - mean) rstd weight + ln_bias
//     dy = out_dropout(grad + grad_low),       g = dy weight,    n = (total - mean) rstd
//     grad_residual = rstd (g - avg(g) - n avg(g n)),    grad_x = dropout(grad_residual)
//     grad_weight = sum(dy n),    grad_ln_bias = sum(dy),    grad_bias = sum(grad_x),    sums over rows
//
// x, grad_x, total, low, grad_low: (T, H) C. residual, y, grad, grad_residual: (T, H) S. C is float32 or bfloat16; S is
// C or, where C is bfloat16, float32. Parameters are float32 or bfloat16. Arithmetic is float32; mean and rstd are those
// of the sum before it is rounded to C. Bytes moved: 3 to 5 * T * H elements each way.
//
// Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
#include "residual_norm.h"

#include "rows.h"

namespace {

template <typename C, typename S>
struct Forward {
    const C* x;
    const S* residual;
    int64_t x_stride, residual_stride;
    Parameter bias;
    Dropout dropout;
    NormRows<C, S> out;
};

template <bool DROPOUT, typename C, typename S>
void forward(const Forward<C, S>& call) {
    const int64_t n = call.out.n_columns;
    in_parallel([&](const Team& team) {
        NormRoom room;
        call.bias.read(room.bias, n);
        call.out.weight.read(room.weight, n);
        call.out.ln_bias.read(room.ln_bias, n);
        const Masks masks(call.dropout);
        RowMask<DROPOUT> mask;
        team.share(call.out.n_rows, [&](int64_t r) {
            mask.draw(masks, call.dropout.scale(), r, n);
            const C* x = call.x + r * call.x_stride;
            const S* residual = call.residual == NULL ? NULL : call.residual + r * call.residual_stride;
            const auto total = [&](int64_t j) {
                const vf sum = mask(j, to_floats(x + j, n - j) + load<vf>(room.bias + j));
                return residual == NULL ? sum : sum + to_floats(residual + j, n - j);
            };
            norm_row(total, RowMask<false>(), call.out, r, room);
        });
    });
}

template <typename C, typename S>
struct Backward {
    const S* grad;
    const C *grad_low, *total;
    const float *mean, *rstd;
    C* grad_x;  // or NULL, as may be
    S* grad_residual;
    int64_t grad_stride, low_stride, n_rows, n_columns;
    Parameter weight;
    Dropout dropout, out_dropout;
};

// One thread's room. The sums are those of one block.
template <bool DROPOUT, bool OUT_DROPOUT>
struct Room {
    float weight[MAX_HIDDEN], grad_weight[MAX_HIDDEN], grad_ln_bias[MAX_HIDDEN], grad_bias[MAX_HIDDEN];
    RowMask<DROPOUT> mask[TOGETHER];
    RowMask<OUT_DROPOUT> out_mask[TOGETHER];
};

// A sum that was rounded to bfloat16 has another mean and variance than the saved ones. If rows are nearly constant,
// the difference is many times their deviation, and so n would be too large. It is brought back to mean 0 and, at most,
// variance 1.
//
// `back` ends in a product that is always fused with a difference, so that its bits do not depend on whether it is
// stored.
template <int ROWS, typename C, typename S, typename R>
INLINE void back_rows(const Backward<C, S>& call, int64_t first, R& room) {
    constexpr bool ROUNDED = sizeof(C) < sizeof(float);
    const int64_t n = call.n_columns;
    const S* grad[ROWS];
    const C *low[ROWS], *total[ROWS];
    C* grad_x[ROWS];
    S* grad_residual[ROWS];
    vf mean[ROWS], scale[ROWS], rstd[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const int64_t row = first + r;
        grad[r] = call.grad + row * call.grad_stride;
        low[r] = call.grad_low == NULL ? NULL : call.grad_low + row * call.low_stride;
        total[r] = call.total + row * n;
        grad_x[r] = call.grad_x == NULL ? NULL : call.grad_x + row * n;
        grad_residual[r] = call.grad_residual == NULL ? NULL : call.grad_residual + row * n;
        mean[r] = splat(call.mean[row]), scale[r] = rstd[r] = splat(call.rstd[row]);
    }
    const R* masks = &room;
    const auto dy = [&](int r, int64_t j, int64_t some) {
        vf value = to_floats(grad[r] + j, some);
        if (low[0] != NULL) value += to_floats(low[r] + j, some);
        return masks->out_mask[r](j, value);
    };
    const auto normal = [&](int r, int64_t j, int64_t some) {
        return first_of((to_floats(total[r] + j, some) - mean[r]) * scale[r], some);
    };
    vf sums[ROWS] = {}, products[ROWS] = {}, normals[ROWS] = {}, squares[ROWS] = {};
    each_vector(n, [&](int64_t j, int64_t some) {
        const vf weight = load<vf>(room.weight + j);
        for (int r = 0; r < ROWS; r++) {
            const vf g = dy(r, j, some) * weight, y = normal(r, j, some);
            sums[r] += g, products[r] += g * y;
            if (ROUNDED) normals[r] += y, squares[r] += y * y;
        }
    });
    vf average[ROWS], slope[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float of_g = sum(sums[r]) / n, of_product = sum(products[r]) / n;
        if (ROUNDED) {
            const float offset = sum(normals[r]) / n, variance = sum(squares[r]) / n - offset * offset;
            const float shrink = variance > 1.0f ? 1.0f / sqrtf(variance) : 1.0f;
            mean[r] += offset / rstd[r], scale[r] *= shrink;
            of_product = (of_product - offset * of_g) * shrink;
        }
        average[r] = of_g * rstd[r], slope[r] = of_product * rstd[r];
    }
    each_vector(n, [&](int64_t j, int64_t some) {
        const vf weight = load<vf>(room.weight + j);
        vf of_weight[ROWS], of_ln_bias[ROWS], of_bias[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const vf y = normal(r, j, some), d = dy(r, j, some);
            const vf back = d * weight * rstd[r] - average[r] - y * slope[r];
            of_weight[r] = d * y, of_ln_bias[r] = d, of_bias[r] = masks->mask[r](j, back);
            if (grad_x[0] != NULL) from_floats(grad_x[r] + j, of_bias[r], some);
            if (grad_residual[0] != NULL) from_floats(grad_residual[r] + j, back, some);
        }
        add_to(room.grad_weight + j, add_up(of_weight));
        add_to(room.grad_ln_bias + j, add_up(of_ln_bias));
        add_to(room.grad_bias + j, add_up(of_bias));
    });
}

// partials: (over(T, BLOCK), 3, H). grads: (3, H), of weight, ln_bias and bias.
template <bool DROPOUT, bool OUT_DROPOUT, typename C, typename S>
void backward(const Backward<C, S>& call, float* partials, float* grads) {
    const int64_t n = call.n_columns, n_blocks = over(call.n_rows, BLOCK);
    in_parallel([&](const Team& team) {
        Room<DROPOUT, OUT_DROPOUT> room;
        call.weight.read(room.weight, n);
        const Masks masks(call.dropout), out_masks(call.out_dropout);
        team.share(n_blocks, [&](int64_t block) {
            float* const sums[] = {room.grad_weight, room.grad_ln_bias, room.grad_bias};
            for (float* each : sums) memset(each, 0, over(n, VL) * sizeof(vf));
            each_rows(block * BLOCK, least((block + 1) * BLOCK, call.n_rows), [&](int64_t first, auto count) {
                constexpr int ROWS = decltype(count)::value;
                for (int r = 0; r < ROWS; r++) {
                    room.mask[r].draw(masks, call.dropout.scale(), first + r, n);
                    room.out_mask[r].draw(out_masks, call.out_dropout.scale(), first + r, n);
                }
                back_rows<ROWS>(call, first, room);
            });
            for (int i = 0; i < 3; i++) memcpy(partials + (block * 3 + i) * n, sums[i], n * sizeof(float));
        });
        add_blocks(partials, n_blocks, 3 * n, grads, team);
    });
}

template <typename C, typename S>
void run_backward(const Backward<C, S>& call, float* partials, float* grads) {
    const bool dropout = call.dropout.threshold > 0;
    if (call.out_dropout.threshold > 0)
        dropout ? backward<true, true>(call, partials, grads) : backward<false, true>(call, partials, grads);
    else dropout ? backward<true, false>(call, partials, grads) : backward<false, false>(call, partials, grads);
}

}  // namespace

// Strides in elements; columns are contiguous, as in all outputs. *_is_bf16: of the parameter before.
#define RESIDUAL_NORM(name, C, S)                                                                                      \
    EXPORT void fastbert_residual_norm_##name(                                                                         \
        const C* x, int64_t x_stride, const void* bias, int64_t bias_is_bf16, const S* residual,                       \
        int64_t residual_stride, const void* weight, int64_t weight_is_bf16, const void* ln_bias,                      \
        int64_t ln_bias_is_bf16, float eps, int64_t threshold, uint64_t seed, int64_t site, int64_t n_rows,            \
        int64_t n_columns, S* y, C* low, C* total, float* mean, float* rstd) {                                         \
        const Forward<C, S> call = {x,                                                                                 \
                                    residual,                                                                          \
                                    x_stride,                                                                          \
                                    residual_stride,                                                                   \
                                    {bias, bias_is_bf16},                                                              \
                                    {threshold, seed, site},                                                           \
                                    {y,                                                                                \
                                     low,                                                                              \
                                     total,                                                                            \
                                     mean,                                                                             \
                                     rstd,                                                                             \
                                     {weight, weight_is_bf16},                                                         \
                                     {ln_bias, ln_bias_is_bf16},                                                       \
                                     n_rows,                                                                           \
                                     n_columns,                                                                        \
                                     eps}};                                                                            \
        threshold > 0 ? forward<true>(call) : forward<false>(call);                                                    \
    }                                                                                                                  \
    EXPORT void fastbert_residual_norm_backward_##name(                                                                \
        const S* grad, int64_t grad_stride, const C* grad_low, int64_t low_stride, const C* total, const float* mean,  \
        const float* rstd, const void* weight, int64_t weight_is_bf16, int64_t threshold, uint64_t seed, int64_t site, \
        int64_t out_threshold, uint64_t out_seed, int64_t out_site, int64_t n_rows, int64_t n_columns, C* grad_x,      \
        S* grad_residual, float* partials, float* grads) {                                                             \
        run_backward(Backward<C, S>{grad,                                                                              \
                                    grad_low,                                                                          \
                                    total,                                                                             \
                                    mean,                                                                              \
                                    rstd,                                                                              \
                                    grad_x,                                                                            \
                                    grad_residual,                                                                     \
                                    grad_stride,                                                                       \
                                    low_stride,                                                                        \
                                    n_rows,                                                                            \
                                    n_columns,                                                                         \
                                    {weight, weight_is_bf16},                                                          \
                                    {threshold, seed, site},                                                           \
                                    {out_threshold, out_seed, out_site}},                                              \
                     partials, grads);                                                                                 \
    }

RESIDUAL_NORM(float32, float, float)
RESIDUAL_NORM(bfloat16, bf16, bf16)
RESIDUAL_NORM(mixed, bf16, float)
