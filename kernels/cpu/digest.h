// The block digest, which kernels/digest.py defines.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

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

using Line = uint64_t __attribute__((vector_size(64)));  // of the cache
constexpr int64_t kLineLanes = sizeof(Line) / sizeof(uint64_t);

// Writes a line past the caches, where the processor can; `to` is a multiple of its size. Other
// threads see it in order only after end_streaming.
inline void stream(uint64_t* to, Line line) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)line);
#elif defined(__SSE2__)
    __m128i parts[4];
    std::memcpy(parts, &line, sizeof(line));
    for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
#else
    std::memcpy(to, &line, sizeof(line));
#endif
}

inline void end_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// What becomes of a row that is summed. A streamed one is whole lines, each where a line begins.
enum class Copy { kNone, kCached, kStreamed };

// Of kRows rows side by side, copied in the same pass, or not. The processor fetches ahead only to
// the end of a page, so several rows together keep more on its way from memory. They take turns
// by runs of a few lines: by single ones, streaming was a fifth slower.
template <Copy kCopy, int kRows>
inline void digest_rows(const uint64_t* const* from, uint64_t* const* to, int64_t lanes,
                        uint64_t* digests) {
    constexpr int64_t kRun = 4 * kLineLanes;
    std::fill_n(digests, kRows, 0);
    for (int64_t start = 0; start < lanes; start += kGroup) {
        const int64_t end = std::min(start + kGroup, lanes);
        Line sums[kRows]{};
        int64_t run = start;
        for (; run + kRun <= end; run += kRun) {
            for (int row = 0; row < kRows; ++row) {
                for (int64_t lane = run; lane < run + kRun; lane += kLineLanes) {
                    const auto line = load_vector<Line>(from[row] + lane);
                    if (kCopy == Copy::kStreamed) stream(to[row] + lane, line);
                    if (kCopy == Copy::kCached) std::memcpy(to[row] + lane, &line, sizeof(line));
                    sums[row] += line * load_vector<Line>(&kLaneWeights[lane - start]);
                }
            }
        }
        const uint64_t weight = splitmix64(kGroup + start / kGroup) | 1;
        for (int row = 0; row < kRows; ++row) {
            uint64_t sum = 0;
            for (int64_t i = 0; i < kLineLanes; ++i) sum += sums[row][i];
            for (int64_t lane = run; lane < end; ++lane) {
                const uint64_t value = from[row][lane];
                if (kCopy != Copy::kNone) to[row][lane] = value;
                sum += value * kLaneWeights[lane - start];
            }
            digests[row] += sum * weight;
        }
    }
}

}  // namespace kvferry
