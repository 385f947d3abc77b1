// KV blocks in 8 bits and back, with the digests of the packed rows while they are in the cache.
// kernels/wire_quantization.py defines the layout and the rounding.

#include <algorithm>

#include "digest.h"
#include "vectors.h"

namespace {

using namespace kvferry;

constexpr float kSmallest = 1e-30F;

struct Layout {
    int64_t tiles, block_size, head_dim;
    bool e4m3_keys;

    int64_t elements() const { return tiles * block_size * head_dim; }
    int64_t payload_bytes() const { return block_size * head_dim; }
    int64_t tile_bytes() const { return payload_bytes() + block_size * int64_t(sizeof(float)); }
    int64_t row_bytes() const { return tiles * tile_bytes(); }
};

// To nearest, ties to even. An addition would do it too, but be fused with a product before it.
inline Ints rounded(Floats values) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)values);
#else
    float from[kLanes];
    int32_t to[kLanes];
    store(from, values);
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = int32_t(__builtin_rintf(from[lane]));
    return load_vector<Ints>(to);
#endif
}

// Each format's code is the low byte of its word.
struct Int8 {
    static constexpr float kLimit = 127;

    static Words encode(Floats scaled) { return (Words)rounded(scaled); }

    static Floats decode(Words codes) {
        return __builtin_convertvector((Ints)(codes << 24) >> 24, Floats);
    }
};

struct E4M3 {
    static constexpr float kLimit = 448;
    static constexpr uint32_t kBiases = 127 - 7;  // float32's above e4m3's
    static constexpr float kLeast = 0.001953125F;  // 2^-9, the least number

    static Words encode(Floats scaled) {
        const Words bits = (Words)scaled, magnitude = bits & 0x7FFFFFFF;
        const Words up = 0x7FFFF + ((magnitude >> 20) & 1);
        const Words normal = ((magnitude + up) >> 20) - (kBiases << 3);
        const Words small = (Words)rounded((Floats)magnitude * (1 / kLeast));  // below 2^-6
        return (magnitude < ((kBiases + 1) << 23) ? small : normal) | (bits >> 24 & 0x80);
    }

    static Floats decode(Words codes) {
        const Words magnitude = codes & 0x7F;
        const Floats normal = (Floats)((magnitude << 20) + (kBiases << 23));
        const Floats small = __builtin_convertvector((Ints)magnitude, Floats) * kLeast;
        const Floats value = magnitude < 8 ? small : normal;
        return (Floats)((Words)value | (codes & 0x80) << 24);
    }
};

using Bytes = uint8_t __attribute__((vector_size(kLanes)));

inline void store_codes(uint8_t* to, Words codes, int64_t count) {
#if defined(__AVX512F__)  // which GCC does not find by itself
    const __m128i narrow = _mm512_cvtepi32_epi8((__m512i)codes);
#else
    const Bytes narrow = __builtin_convertvector(codes, Bytes);
#endif
    if (count >= kLanes)
        std::memcpy(to, &narrow, kLanes);
    else
        std::memcpy(to, &narrow, count);
}

inline Words load_codes(const uint8_t* from, int64_t count) {
    Bytes narrow = {};
    if (count >= kLanes)
        std::memcpy(&narrow, from, kLanes);
    else
        std::memcpy(&narrow, from, count);
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)narrow);
#else
    return __builtin_convertvector(narrow, Words);
#endif
}

// As integers, magnitudes compare as floats do, and what is not finite is above all that is.
template <class T>
float largest_magnitude(const T* values, int64_t count) {
    Ints most = {};
    for (int64_t start = 0; start < count; start += kLanes) {
        const Ints magnitude = (Ints)load_some(values + start, count - start) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    float smallest = kSmallest, largest;
    int32_t bits;
    std::memcpy(&bits, &smallest, sizeof(bits));
    for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, most[lane]);
    std::memcpy(&largest, &bits, sizeof(largest));
    return largest;
}

template <class Format, class T>
void quantize_tile(const T* tile, uint8_t* codes, float* scales, const Layout& layout) {
    for (int64_t token = 0; token < layout.block_size; ++token) {
        const T* values = tile + token * layout.head_dim;
        const float largest = largest_magnitude(values, layout.head_dim);
        const float factor = Format::kLimit / largest;
        for (int64_t start = 0; start < layout.head_dim; start += kLanes) {
            const int64_t count = layout.head_dim - start;
            const Floats scaled = load_some(values + start, count) * factor;
            store_codes(codes + token * layout.head_dim + start, Format::encode(scaled), count);
        }
        scales[token] = largest * float(1.0 / Format::kLimit);
    }
}

template <class Format, class T>
void dequantize_tile(const uint8_t* codes, const float* scales, T* tile, const Layout& layout) {
    for (int64_t token = 0; token < layout.block_size; ++token) {
        const int64_t first = token * layout.head_dim;
        for (int64_t start = 0; start < layout.head_dim; start += kLanes) {
            const int64_t count = layout.head_dim - start;
            const Floats values = Format::decode(load_codes(codes + first + start, count));
            store_some(tile + first + start, values * scales[token], count);
        }
    }
}

template <class T>
void quantize(const T* row, uint8_t* packed, const Layout& layout) {
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
        const T* elements = row + tile * layout.payload_bytes();
        uint8_t* codes = packed + tile * layout.tile_bytes();
        float* scales = reinterpret_cast<float*>(codes + layout.payload_bytes());
        if (layout.e4m3_keys && tile % 2 == 0)
            quantize_tile<E4M3>(elements, codes, scales, layout);
        else
            quantize_tile<Int8>(elements, codes, scales, layout);
    }
}

template <class T>
void dequantize(const uint8_t* packed, T* row, const Layout& layout) {
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
        T* elements = row + tile * layout.payload_bytes();
        const uint8_t* codes = packed + tile * layout.tile_bytes();
        const float* scales = reinterpret_cast<const float*>(codes + layout.payload_bytes());
        if (layout.e4m3_keys && tile % 2 == 0)
            dequantize_tile<E4M3>(codes, scales, elements, layout);
        else
            dequantize_tile<Int8>(codes, scales, elements, layout);
    }
}

uint64_t digest_of(const uint8_t* packed, const Layout& layout) {
    const int64_t lanes = layout.row_bytes() / int64_t(sizeof(uint64_t));
    const auto* row = reinterpret_cast<const uint64_t*>(packed);
    uint64_t digest;
    digest_rows<Copy::kNone, 1>(&row, nullptr, lanes, &digest);
    return digest;
}

}  // namespace

extern "C" {

void quantize_blocks(int64_t dtype, const void* rows, const int64_t* ids, int64_t count,
                     int64_t tiles, int64_t block_size, int64_t head_dim, int64_t e4m3_keys,
                     uint8_t* packed, uint64_t* digests) {
    const Layout layout{tiles, block_size, head_dim, e4m3_keys != 0};
    with_dtype(dtype, [=](auto zero) {
        const auto* elements = static_cast<const decltype(zero)*>(rows);
        for (int64_t i = 0; i < count; ++i) {
            uint8_t* row = packed + i * layout.row_bytes();
            quantize(elements + ids[i] * layout.elements(), row, layout);
            digests[i] = digest_of(row, layout);
        }
    });
}

void dequantize_blocks(int64_t dtype, const uint8_t* packed, const int64_t* ids, int64_t count,
                       int64_t tiles, int64_t block_size, int64_t head_dim, int64_t e4m3_keys,
                       void* rows, uint64_t* digests) {
    const Layout layout{tiles, block_size, head_dim, e4m3_keys != 0};
    with_dtype(dtype, [=](auto zero) {
        auto* elements = static_cast<decltype(zero)*>(rows);
        for (int64_t i = 0; i < count; ++i) {
            const uint8_t* row = packed + i * layout.row_bytes();
            digests[i] = digest_of(row, layout);
            dequantize(row, elements + ids[i] * layout.elements(), layout);
        }
    });
}

}  // extern "C"
