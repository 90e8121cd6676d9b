// Activation functions on vectors of floats.
#pragma once

#include "linear.h"

// x (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. log2(erfc) on [0, 5] is a polynomial of
// degree 10, fitted to the error of erfc itself: of the GELU of normal numbers 3e-8 (RMS over RMS), where PyTorch's has
// 6e-8.
INLINE vf gelu(vf x) {
    vf size = min(abs(x), splat(7.0710678f));  // beyond, what is subtracted is 0 beside x
    size = x == x ? size : x;
    vf t = size * 0.70710678f;
    vf q = splat(-6.399504854925908e-07f) * t + 1.4849088074697647e-05f;
    q = q * t - 1.4513160567730665e-04f;
    q = q * t + 7.584238774143159e-04f;
    q = q * t - 2.0200866274535656e-03f;
    q = q * t - 2.646475040819496e-04f;
    q = q * t + 2.7978168800473213e-02f;
    q = q * t - 1.484028398990631e-01f;
    q = q * t - 9.184267520904541e-01f;
    q = q * t - 1.6279081106185913f;
    return max(x, vf{}) - 0.5f * size * exp2<true>(q * t);
}

// The same to 1e-6, for what is rounded to bfloat16 or 8 bits: a polynomial of degree 5.
INLINE vf gelu_rounded(vf x) {
    vf t = min(abs(x) * 0.70710678f, splat(5.0f));
    vf q = splat(-2.7611228e-03f) * t + 2.8794874e-02f;
    q = q * t - 1.4749295e-01f;
    q = q * t - 9.191917e-01f;
    q = q * t - 1.6277606f;
    return max(vf{}, x) - 0.70710678f * t * exp2<false, false>(q * t);
}

// x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(u)) / 2 is a logistic function.
INLINE vf gelu_tanh(vf x) {
    vf u = x * (0.79788456f + 0.03567741f * x * x);
    return x / (1.0f + exp2<true>(min(u * -2.8853901f, splat(127.0f))));
}

// T: what the result is rounded to.
template <typename T>
INLINE vf activate(vf x, int64_t activation) {
    switch (activation) {
        case GELU: return sizeof(T) == sizeof(float) ? gelu(x) : gelu_rounded(x);
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return x < 0.0f ? vf{} : x;
        default: return x;
    }
}
