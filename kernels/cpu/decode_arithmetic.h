// The products of decode attention, for each type and for what the processor has.

#pragma once

#include <algorithm>

#include "attention.h"

namespace kvferry {

// Two vectors of sums: what one step adds to an output.
constexpr int64_t kWide = 2 * kLanes;

// In float32, a token at a time.
template <class T>
struct DecodeArithmetic {
    using Number = float;                        // of a query, and of a weight
    static constexpr int64_t kKeyStep = kLanes;  // numbers of a key that are multiplied at once
    static constexpr int64_t kTokens = 1;        // whose values are added at once

    static Floats load_key(const T* from, int64_t count) { return load_some(from, count); }

    static Floats add_product(Floats sums, Floats query, Floats key) { return sums + query * key; }

    // Of the tokens' values kWide numbers, or the `count` there are.
    static void load_values(const T* from, const T*, int64_t count, Floats (&values)[2]) {
        values[0] = load_some(from, count);
        values[1] = load_some(from + kLanes, std::max<int64_t>(count - kLanes, 0));
    }

    static Floats add_weighted(Floats sums, Floats values, const float* weights) {
        return sums + values * *weights;
    }
};

#if defined(__AVX512BF16__)
// Pairs of bf16, summed in float32: the weights are rounded as in prefill attention.
template <>
struct DecodeArithmetic<BFloat16> {
    using Number = BFloat16;
    static constexpr int64_t kKeyStep = 2 * kLanes;
    static constexpr int64_t kTokens = 2;

    static Floats load_key(const BFloat16* from, int64_t count) {
        return (Floats)load_pairs(from, count);
    }

    static Floats add_product(Floats sums, Floats query, Floats key) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)query, (__m512bh)key);
    }

    static void load_values(const BFloat16* first, const BFloat16* second, int64_t count,
                            Floats (&values)[2]) {
        const Pairs a = load_pairs(first, count), b = load_pairs(second, count);
        Pairs low, high;  // where each lane comes from; from kWide on it is b
        for (int64_t lane = 0; lane < kWide; ++lane) {
            low[lane] = lane % 2 * kWide + lane / 2;
            high[lane] = low[lane] + kLanes;
        }
        values[0] = (Floats)__builtin_shuffle(a, b, low);
        values[1] = (Floats)__builtin_shuffle(a, b, high);
    }

    static Floats add_weighted(Floats sums, Floats values, const BFloat16* weights) {
        int pair;
        std::memcpy(&pair, weights, sizeof(pair));
        return add_product(sums, (Floats)_mm512_set1_epi32(pair), values);
    }

private:
    using Pairs = uint16_t __attribute__((vector_size(64)));

    static Pairs load_pairs(const BFloat16* from, int64_t count) {
        if (count >= kWide) return load_vector<Pairs>(from);
        Pairs padded = {};
        std::memcpy(&padded, from, count * sizeof(BFloat16));
        return padded;
    }
};
#endif

}  // namespace kvferry
