// Activation functions on vectors of floats.
#pragma once

#include "linear.h"

// erfc(t) for t from 0 to 5. log2(erfc) is a polynomial of degree 10, fitted to the error of erfc itself.
INLINE vf erfc(vf t) {
    vf q = splat(-6.399504854925908e-07f) * t + 1.4849088074697647e-05f;
    q = q * t - 1.4513160567730665e-04f;
    q = q * t + 7.584238774143159e-04f;
    q = q * t - 2.0200866274535656e-03f;
    q = q * t - 2.646475040819496e-04f;
    q = q * t + 2.7978168800473213e-02f;
    q = q * t - 1.484028398990631e-01f;
    q = q * t - 9.184267520904541e-01f;
    q = q * t - 1.6279081106185913f;
    return exp2<true>(q * t);
}

// The same to 1e-6, for results that are rounded to bfloat16 or 8 bits: a polynomial of degree 5.
INLINE vf erfc_rounded(vf t) {
    vf q = splat(-2.7611228e-03f) * t + 2.8794874e-02f;
    q = q * t - 1.4749295e-01f;
    q = q * t - 9.191917e-01f;
    q = q * t - 1.6277606f;
    return exp2<false, false>(q * t);
}

// x (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. Its error on normal numbers is 3e-8 (RMS over
// RMS); PyTorch's is 6e-8.
INLINE vf gelu(vf x) {
    vf size = min(abs(x), splat(7.0710678f));  // beyond, the subtracted value is 0 beside x
    size = x == x ? size : x;
    return max(x, vf{}) - 0.5f * size * erfc(size * 0.70710678f);
}

INLINE vf gelu_rounded(vf x) {
    vf t = min(abs(x) * 0.70710678f, splat(5.0f));
    return max(vf{}, x) - 0.70710678f * t * erfc_rounded(t);
}

// x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(u)) / 2 is a logistic function.
INLINE vf gelu_tanh(vf x) {
    vf u = x * (0.79788456f + 0.03567741f * x * x);
    return x / (1.0f + exp2<true>(min(u * -2.8853901f, splat(127.0f))));
}

// x / (1 + exp(-x))
INLINE vf silu(vf x) { return x / (1.0f + exp2<true>(min(x * -1.442695f, splat(127.0f)))); }

// T: the type to which the result is rounded.
template <typename T>
INLINE vf activate(vf x, int64_t activation) {
    switch (activation) {
        case GELU: return sizeof(T) == sizeof(float) ? gelu(x) : gelu_rounded(x);
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return x < 0.0f ? vf{} : x;
        case SILU: return silu(x);
        default: return x;
    }
}

// An activation's value at x, and its derivative times a gradient.
struct Backward {
    vf value, grad;
};

// gelu'(x) = Phi(x) + x phi(x),  Phi(x) = erfc(-x / sqrt(2)) / 2,  phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
template <bool EXACT>
INLINE Backward gelu_backward(vf x, vf grad) {
    vf near = max(splat(-7.0710678f), min(splat(7.0710678f), x));  // NaN stays
    vf t = abs(near) * 0.70710678f;
    vf tail = EXACT ? erfc(t) : erfc_rounded(t);
    vf phi = 0.39894228f * exp2<EXACT, false>(t * t * -1.442695f);
    vf distribution = x > 0.0f ? 1.0f - 0.5f * tail : 0.5f * tail;
    return {max(vf{}, x) - (EXACT ? 0.5f * abs(near) : 0.70710678f * t) * tail, grad * (distribution + near * phi)};
}

// x s,  s = 1 / (1 + e),  e = exp(-2 u):  the derivative is s + x s (1 - s) 2 u',  and 1 - s = e s.
INLINE Backward gelu_tanh_backward(vf x, vf grad) {
    vf u = x * (0.79788456f + 0.03567741f * x * x);
    vf e = exp2<true>(min(u * -2.8853901f, splat(127.0f))), s = 1.0f / (1.0f + e);
    vf near = max(splat(-16.0f), min(splat(16.0f), x));  // beyond, s or e is 0; NaN stays
    vf twice_slope = 1.5957691f + 0.21406446f * near * near;
    return {x / (1.0f + e), grad * (s + near * s * (e * s) * twice_slope)};
}

// x s,  s = 1 / (1 + e),  e = exp(-x):  the derivative is s + x s (1 - s),  and 1 - s = e s.
INLINE Backward silu_backward(vf x, vf grad) {
    vf e = exp2<true>(min(x * -1.442695f, splat(127.0f))), s = 1.0f / (1.0f + e);
    vf near = max(splat(-128.0f), min(splat(128.0f), x));  // beyond, s or e is 0; NaN stays
    return {x / (1.0f + e), grad * (s + near * s * (e * s))};
}

template <typename T, int ACTIVATION>
INLINE Backward activate_backward(vf x, vf grad) {
    if (ACTIVATION == GELU) return gelu_backward<sizeof(T) == sizeof(float)>(x, grad);
    if (ACTIVATION == GELU_TANH) return gelu_tanh_backward(x, grad);
    if (ACTIVATION == SILU) return silu_backward(x, grad);
    return {activate<T>(x, RELU), x <= 0.0f ? vf{} : grad};
}
