// The block digest, which kernels/digest.py defines.

#pragma once

#include <array>
#include <cstdint>

namespace kvferry {

constexpr int64_t kGroup = 256;  // lanes that share a group's weight

constexpr uint64_t splitmix64(uint64_t index) {
    uint64_t z = (index + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

constexpr std::array<uint64_t, kGroup> lane_weights() {
    std::array<uint64_t, kGroup> weights{};
    for (int64_t lane = 0; lane < kGroup; ++lane) weights[lane] = splitmix64(lane) | 1;
    return weights;
}

alignas(64) constexpr auto kLaneWeights = lane_weights();

// Of one row; with kCopy the row is copied in the same pass.
template <bool kCopy>
inline uint64_t digest(const uint64_t* from, uint64_t* to, int64_t lanes) {
    uint64_t total = 0;
    for (int64_t start = 0; start < lanes; start += kGroup) {
        const int64_t count = lanes - start < kGroup ? lanes - start : kGroup;
        uint64_t sum = 0;
        for (int64_t lane = 0; lane < count; ++lane) {
            const uint64_t value = from[start + lane];
            if (kCopy) to[start + lane] = value;
            sum += value * kLaneWeights[lane];
        }
        total += sum * (splitmix64(kGroup + start / kGroup) | 1);
    }
    return total;
}

}  // namespace kvferry
