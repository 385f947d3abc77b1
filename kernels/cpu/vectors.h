// Sixteen numbers at a time, computed in float32 whatever their type in memory.
// GCC's vector types: the compiler splits them where the processor's registers are narrower.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvferry {

constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    _Float16 value;
};

// What callers pass for a tensor's type.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Calls compute with a number of the type.
template <class Compute>
inline void with_dtype(int64_t dtype, Compute compute) {
    if (dtype == kFloat32) compute(float{});
    if (dtype == kBFloat16) compute(BFloat16{});
    if (dtype == kFloat16) compute(Half{});
}

template <class Vector, class T>
inline Vector load_vector(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline Floats load(const float* from) { return load_vector<Floats>(from); }

inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // which GCC does not find by itself
    return (Floats)((Words)_mm512_cvtepu16_epi32(load_vector<__m256i>(from)) << 16);
#else
    using Bits = uint16_t __attribute__((vector_size(32)));
    return (Floats)(__builtin_convertvector(load_vector<Bits>(from), Words) << 16);
#endif
}

inline Floats load(const Half* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_vector<__m256i>(from));
#else
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = float(from[lane].value);
    return values;
#endif
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

// To nearest, ties to even; NaN stays NaN. Subnormal numbers may become 0.
inline void store(BFloat16* to, Floats values) {
#if defined(__AVX512BF16__)
    const auto narrow = _mm512_cvtneps_pbh((__m512)values);
#else
    using Bits = uint16_t __attribute__((vector_size(32)));
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (bits >> 16) | 0x40;
    const Bits narrow = __builtin_convertvector(values == values ? rounded : quiet, Bits);
#endif
    std::memcpy(to, &narrow, sizeof(narrow));
}

inline void store(Half* to, Floats values) {
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &narrow, sizeof(narrow));
#else
    for (int lane = 0; lane < kLanes; ++lane) to[lane].value = _Float16(values[lane]);
#endif
}

// The first ``count`` of the lanes; loaded lanes beyond them are zero.
template <class T>
inline Floats load_some(const T* from, int64_t count) {
    if (count >= kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* to, Floats values, int64_t count) {
    if (count >= kLanes) return store(to, values);
    T padded[kLanes];
    store(padded, values);
    std::memcpy(to, padded, count * sizeof(T));
}

// Where lanes come from when the blocks of kBlock lanes of two vectors are interleaved: numbers up
// to 15 from the first, from 16 on the second. The upper one keeps the even blocks of each.
template <uint32_t kBlock>
struct Interleaved {
    Words upper, lower;

    Interleaved() {
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
            upper[lane] = lane & kBlock ? kLanes + (lane ^ kBlock) : lane;
            lower[lane] = lane & kBlock ? kLanes + lane : lane ^ kBlock;
        }
    }
};

template <uint32_t kBlock = kLanes / 2>
inline void transpose(Words (&rows)[kLanes]) {
    const Interleaved<kBlock> from;
    for (uint32_t row = 0; row < kLanes; ++row) {
        if (row & kBlock) continue;
        const Words first = rows[row], second = rows[row + kBlock];
        rows[row] = __builtin_shuffle(first, second, from.upper);
        rows[row + kBlock] = __builtin_shuffle(first, second, from.lower);
    }
    if constexpr (kBlock > 1) transpose<kBlock / 2>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i], which are used up.
template <uint32_t kBlock = kLanes / 2>
inline Floats sums_of(Floats (&rows)[kLanes]) {
    const Interleaved<kBlock> from;
    for (uint32_t row = 0; row < kBlock; ++row)
        rows[row] = __builtin_shuffle(rows[row], rows[row + kBlock], from.upper) +
                    __builtin_shuffle(rows[row], rows[row + kBlock], from.lower);
    if constexpr (kBlock > 1) return sums_of<kBlock / 2>(rows);
    return rows[0];
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// A lane and its neighbour at a distance of kBlock, and so on: all lanes of the result are equal.
template <uint32_t kBlock = kLanes / 2, class Combine>
inline Floats across_lanes(Floats values, Combine combine) {
    Words neighbour;
    for (uint32_t lane = 0; lane < kLanes; ++lane) neighbour[lane] = lane ^ kBlock;
    values = combine(values, __builtin_shuffle(values, neighbour));
    if constexpr (kBlock > 1) return across_lanes<kBlock / 2>(values, combine);
    return values;
}

inline float sum_of(Floats values) {
    return across_lanes(values, [](Floats a, Floats b) { return a + b; })[0];
}

inline float largest_of(Floats values) { return across_lanes(values, larger)[0]; }

// e^x to within 2 units in the last place; 0 below -87, where results are no longer normal.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts, and e^r by its Taylor series.
inline Floats exp(Floats x) {
    const Floats kept = x < 88 ? x : Floats{} + 88;
    constexpr float kIntegers = 12582912;  // 1.5 * 2^23: from here on floats are integers
    const Floats shifted = kept * 1.44269504F + kIntegers;
    const Floats n = shifted - kIntegers;
    const Floats r = (kept - n * 0.693359375F) - n * -2.12194440e-4F;
    Floats series = r * (1.0F / 5040) + 1.0F / 720;
    series = series * r + 1.0F / 120;
    series = series * r + 1.0F / 24;
    series = series * r + 1.0F / 6;
    series = series * r + 0.5F;
    series = series * r + 1;
    series = series * r + 1;
    const Floats power = (Floats)(((Words)shifted << 23) + 0x3F800000);  // 2^n
    return x > -87 ? series * power : Floats{};
}

}  // namespace kvferry
