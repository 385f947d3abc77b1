// Linear layers of bf16, summed in float32.

#include "kernels.h"
#include "panels.h"

using namespace kvferry;

extern "C" void linear_bf16(const BFloat16* x, int64_t stride, const uint32_t* panels,
                            const BFloat16* bias, BFloat16* out, int64_t rows, int64_t features,
                            int64_t outputs) {
    const Inputs inputs(rows, features / 2, [=](int64_t row, int64_t word, int64_t count) {
        return load_words(x + row * stride + 2 * word, count);
    });
    multiply<BFloat16Pairs>(
        inputs, panels, outputs, [=](int64_t row, int64_t output, int64_t count, Floats sums) {
            if (bias != nullptr) sums += load_some(bias + output, count);
            store_some(out + row * outputs + output, sums, count);
        });
}
