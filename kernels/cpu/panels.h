// x W^T for a W packed in panels; kernels/linear.py defines the layout.
//
// A panel is read once from memory, front to back, for all rows of x: few rows cost what reading
// the weights costs. An output is summed along the inputs in one order whatever the number of
// rows, so a row's result does not depend on the others.

#pragma once

#include <algorithm>
#include <memory>

#include "vectors.h"

namespace kvferry {

constexpr int64_t kPanel = 32;  // outputs of a panel: two vectors of sums
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;  // their 28 sums, two vectors of weights: 30 of 32 registers
#else
constexpr int kMaxRows = 3;
#endif
constexpr int64_t kBlockTiles = 36;  // tiles of x that stay in the cache, panel after panel

// How rows are cut into tiles of equal height, give or take one.
struct Tiling {
    int64_t rows;
    int64_t count = (rows + kMaxRows - 1) / kMaxRows;

    int64_t start(int64_t tile) const { return rows * tile / count; }
    int64_t height(int64_t tile) const { return start(tile + 1) - start(tile); }
};

// Up to 16 words of bf16 from a row, zeros after the `count` there are.
inline Words load_words(const BFloat16* from, int64_t count) {
    if (count >= kLanes) return load_vector<Words>(from);
    Words words = {};
    std::memcpy(&words, from, count * sizeof(uint32_t));
    return words;
}

// Writes rows of words as [words, rows], at most kMaxRows of them. Read(row, first word, count)
// gives up to 16 words of a row. Up to kLanes more words after the result are overwritten.
template <class Read>
void interleave(uint32_t* to, int64_t rows, int64_t words, Read read) {
    for (int64_t start = 0; start < words; start += kLanes, to += kLanes * rows) {
        const int64_t count = std::min<int64_t>(kLanes, words - start);
        Words square[kLanes] = {};
        for (int64_t row = 0; row < rows; ++row) square[row] = read(row, start, count);
        if (rows > 1) transpose(square);
        // A store's lanes past the last row are overwritten by the next.
        for (int64_t word = 0; word < (rows > 1 ? count : 1); ++word)
            std::memcpy(to + word * rows, &square[word], sizeof(Words));
    }
}

// Rows of x as words, a word being what one multiply-add takes of a row: two bf16 inputs, or four
// of 8 bits. Tile after tile, each [words, rows of the tile] and some room.
class Inputs {
public:
    const Tiling tiling;
    const int64_t words;

    // For read see interleave.
    template <class Read>
    Inputs(int64_t rows, int64_t words, Read read)
        : tiling{rows}, words(words), values_(new uint32_t[rows * words + tiling.count * kLanes]) {
#pragma omp parallel for if (tiling.count > 1)
        for (int64_t tile = 0; tile < tiling.count; ++tile) {
            const int64_t first = tiling.start(tile);
            interleave(place(tile), tiling.height(tile), words,
                       [&](int64_t row, int64_t word, int64_t count) {
                           return read(first + row, word, count);
                       });
        }
    }

    const uint32_t* tile(int64_t index) const { return place(index); }

private:
    uint32_t* place(int64_t tile) const {
        return values_.get() + tiling.start(tile) * words + tile * kLanes;
    }

    std::unique_ptr<uint32_t[]> values_;
};

// Words of two bf16, summed in float32.
struct BFloat16Pairs {
    using Sums = Floats;

    static Floats multiply_add(Floats sums, Words weights, uint32_t inputs) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights,
                                        (__m512bh)_mm512_set1_epi32(int(inputs)));
#else
        const Words both = Words{} + inputs;
        return sums + (Floats)(weights << 16) * (Floats)(both << 16) +
               (Floats)(weights & 0xFFFF0000) * (Floats)(both & 0xFFFF0000);
#endif
    }
};

// The sums of kRows rows and one panel; x is [words, kRows]. On the way it fetches into the cache,
// from `next` on, `step` bytes for every word.
template <class Arithmetic, int kRows, class Sums = typename Arithmetic::Sums>
void multiply_tile(const uint32_t* x, const uint32_t* panel, int64_t words, const char* next,
                   int64_t step, Sums (*out)[2]) {
    Sums sums[kRows][2] = {};
    for (int64_t word = 0; word < words; ++word) {
        if (kRows > 4) {  // with fewer the processor's own prefetching does better
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + 64, 0, 2);
            next += step;
        }
        const Words first = load_vector<Words>(panel), second = load_vector<Words>(panel + kLanes);
        panel += kPanel;
        for (int row = 0; row < kRows; ++row) {
            sums[row][0] = Arithmetic::multiply_add(sums[row][0], first, x[row]);
            sums[row][1] = Arithmetic::multiply_add(sums[row][1], second, x[row]);
        }
        x += kRows;
    }
    for (int row = 0; row < kRows; ++row)
        for (int half = 0; half < 2; ++half) out[row][half] = sums[row][half];
}

template <class Arithmetic, int kRows = kMaxRows, class Sums = typename Arithmetic::Sums>
void multiply_tile_of(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t words,
                      const char* next, int64_t step, Sums (*out)[2]) {
    if (rows == kRows)
        multiply_tile<Arithmetic, kRows>(x, panel, words, next, step, out);
    else if constexpr (kRows > 1)
        multiply_tile_of<Arithmetic, kRows - 1>(rows, x, panel, words, next, step, out);
}

// Calls write(row, first output, count, sums) for every row and up to 16 outputs at a time.
template <class Arithmetic, class Write>
void multiply(const Inputs& x, const uint32_t* panels, int64_t outputs, Write write) {
    const int64_t num_panels = (outputs + kPanel - 1) / kPanel;
    const int64_t panel_words = x.words * kPanel, panel_bytes = panel_words * sizeof(uint32_t);
#pragma omp parallel
    for (int64_t first = 0; first < x.tiling.count; first += kBlockTiles) {
        const int64_t end = std::min(first + kBlockTiles, x.tiling.count), tiles = end - first;
#pragma omp for schedule(static) nowait
        for (int64_t number = 0; number < num_panels; ++number) {
            const uint32_t* panel = panels + number * panel_words;
            const char* next = reinterpret_cast<const char*>(panel + panel_words);
            for (int64_t tile = first; tile < end; ++tile) {
                typename Arithmetic::Sums sums[kMaxRows][2];
                const int64_t height = x.tiling.height(tile);
                multiply_tile_of<Arithmetic>(height, x.tile(tile), panel, x.words,
                                             next + panel_bytes * (tile - first) / tiles,
                                             panel_bytes / x.words / tiles, sums);
                for (int64_t row = 0; row < height; ++row)
                    for (int64_t half = 0; half < 2; ++half) {
                        const int64_t output = number * kPanel + half * kLanes;
                        const int64_t count = std::min<int64_t>(kLanes, outputs - output);
                        if (count > 0)
                            write(x.tiling.start(tile) + row, output, count, sums[row][half]);
                    }
            }
        }
    }
}

}  // namespace kvferry
