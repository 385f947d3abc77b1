// What decode and prefill attention share.

#pragma once

#include <limits>

#include "vectors.h"

namespace kvferry {

constexpr int64_t kMaxHeadDim = 256;
constexpr float kNothing = -std::numeric_limits<float>::infinity();  // a hidden key's score

// A layer's view of the arena, [blocks, kv heads, 2, block_size, head_dim].
template <class T>
struct Cache {
    const T* data;
    int64_t block_stride, head_stride, value_offset, block_size, head_dim;
};

// Softmax over the keys seen so far: sums are relative to e^largest.
struct State {
    float largest = kNothing;
    float total = 0;
    float values[kMaxHeadDim] = {};

    void rescale(float new_largest, int64_t head_dim) {
        if (new_largest == largest) return;
        const float factor = exp(Floats{} + (largest - new_largest))[0];
        for (int64_t start = 0; start < head_dim; start += kLanes)
            store(values + start, load(values + start) * factor);
        total *= factor;
        largest = new_largest;
    }

    // Turns the scores of some more keys, kLanes in each vector, into their weights.
    void take(float* scores, size_t vectors, int64_t head_dim) {
        Floats most = Floats{} + largest, sum = {};
        for (size_t at = 0; at < vectors * kLanes; at += kLanes)
            most = larger(most, load(scores + at));
        rescale(largest_of(most), head_dim);
        for (size_t at = 0; at < vectors * kLanes; at += kLanes) {
            const Floats weights = exp(load(scores + at) - largest);
            store(scores + at, weights);
            sum += weights;
        }
        total += sum_of(sum);
    }
};

}  // namespace kvferry
