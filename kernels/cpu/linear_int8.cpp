// Linear layers of 8-bit integers, exact up to the scales; kernels/linear.py defines them.

#include "kernels.h"
#include "panels.h"

namespace {

using namespace kvferry;

constexpr int kOffset = 128;  // makes inputs unsigned, as the instruction wants them

struct BytesByFour {
    using Sums = Ints;

    static Ints multiply_add(Ints sums, Words weights, uint32_t inputs) {
#if defined(__AVX512VNNI__)
        return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(int(inputs)),
                                         (__m512i)weights);
#else
        for (int shift = 0; shift < 32; shift += 8)
            sums += ((Ints)(weights << (24 - shift)) >> 24) * int(inputs >> shift & 0xFF);
        return sums;
#endif
    }
};

template <class T>
float largest_magnitude(const T* values, int64_t count) {
    Floats most = {};
    for (int64_t start = 0; start < count; start += kLanes) {
        const Floats x = load_some(values + start, count - start);
        const Floats magnitude = x < 0 ? -x : x;
        most = magnitude > most ? magnitude : most;
    }
    float largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
    return largest;
}

// Up to 64 numbers as bytes: each times `inverse`, to the nearest integer, plus kOffset.
template <class T>
Words quantized(const T* values, int64_t count, float inverse) {
    uint8_t bytes[4 * kLanes] = {};
    for (int64_t start = 0; start < count; start += kLanes) {
        float scaled[kLanes];
        store(scaled, load_some(values + start, count - start) * inverse);
        for (int lane = 0; lane < kLanes; ++lane)
            bytes[start + lane] = uint8_t(__builtin_irintf(scaled[lane]) + kOffset);
    }
    return load_vector<Words>(bytes);
}

template <class T>
void linear(const T* x, int64_t stride, const uint32_t* panels, const float* scales,
            const int32_t* totals, const T* bias, T* out, int64_t rows, int64_t features,
            int64_t outputs) {
    const std::unique_ptr<float[]> largest(new float[rows]);
#pragma omp parallel for if (rows > kMaxRows)
    for (int64_t row = 0; row < rows; ++row)
        largest[row] = largest_magnitude(x + row * stride, features);
    const Inputs inputs(rows, features / 4, [&](int64_t row, int64_t word, int64_t count) {
        const float inverse = largest[row] > 0 ? 127 / largest[row] : 0;
        return quantized(x + row * stride + 4 * word, 4 * count, inverse);
    });
    multiply<BytesByFour>(
        inputs, panels, outputs, [&](int64_t row, int64_t output, int64_t count, Ints sums) {
            sums -= kOffset * load_vector<Ints>(totals + output);
            const Floats scale = load(scales + output) * (largest[row] / 127);
            Floats values = __builtin_convertvector(sums, Floats) * scale;
            if (bias != nullptr) values += load_some(bias + output, count);
            store_some(out + row * outputs + output, values, count);
        });
}

}  // namespace

extern "C" void linear_int8(int64_t dtype, const void* x, int64_t stride, const uint32_t* panels,
                            const float* scales, const int32_t* totals, const void* bias, void* out,
                            int64_t rows, int64_t features, int64_t outputs) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        linear(static_cast<const T*>(x), stride, panels, scales, totals,
               static_cast<const T*>(bias), static_cast<T*>(out), rows, features, outputs);
    });
}
