// The processor's rate of bfloat16 products, in pairs, relative to float32.
//
// Processors that have the instruction differ. AMD's Zen 4 starts it as often as one for float32, which is twice the
// products in the same time. Intel's Sapphire Rapids starts it a quarter as often, which is half of them.
#include <chrono>

#include "vector.h"

#ifdef __AVX512BF16__

namespace {

constexpr int CHAINS = 12;  // of sums that do not wait for each other: more than an instruction's latency
constexpr int STEPS = 256, TRIALS = 16;

// Seconds for CHAINS * STEPS instructions in registers. Empty assembly statements keep the compiler from merging equal
// sums.
template <typename V>
double seconds() {
    V x{}, y{};
    vf sums[CHAINS] = {};
    for (vf& sum : sums) asm volatile("" : "+v"(sum));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < STEPS; i++) {
        asm volatile("" : "+v"(x), "+v"(y));
        for (vf& sum : sums) sum = multiply_add(sum, x, y);
    }
    for (vf& sum : sums) asm volatile("" : "+v"(sum));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Products of bfloat16 in the time of one of float32. The trials, some 50 microseconds together, alternate, and the
// shortest of either kind counts. Other work of the processor, or a change of the clock rate, disturbs only a few of
// them.
EXPORT double fastbert_bfloat16_rate() {
    double floats = seconds<vf>(), pairs = seconds<vi>();
    for (int i = 1; i < TRIALS; i++) {
        const double f = seconds<vf>(), p = seconds<vi>();
        floats = f < floats ? f : floats;
        pairs = p < pairs ? p : pairs;
    }
    return Pairs::SIZE * floats / pairs;
}

#endif
