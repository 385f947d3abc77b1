// Norms, gate and rotary embedding: one pass over memory each, rounded where their torch twins
// round.

#include <cmath>

#include "kernels.h"
#include "vectors.h"

namespace {

using namespace kvferry;

constexpr int64_t kSerial = 1 << 15;  // numbers that one thread is done with soonest

// x over its root mean square, rounded, times the weight. `out` may be x.
template <class T>
void normalize(const T* x, const T* weight, float eps, int64_t count, T* out) {
    Floats squares = {};
    for (int64_t start = 0; start < count; start += kLanes) {
        const Floats values = load_some(x + start, count - start);
        squares += values * values;
    }
    const float factor = 1 / std::sqrt(sum_of(squares) / count + eps);
    for (int64_t start = 0; start < count; start += kLanes) {
        T unit[kLanes];
        store(unit, load_some(x + start, count - start) * factor);
        store_some(out + start, load(unit) * load_some(weight + start, count - start),
                   count - start);
    }
}

template <class T>
void rms_norm(const T* x, int64_t stride, const T* weight, float eps, T* out, int64_t rows,
              int64_t count) {
#pragma omp parallel for if (rows * count > kSerial)
    for (int64_t row = 0; row < rows; ++row)
        normalize(x + row * stride, weight, eps, count, out + row * count);
}

template <class T>
void add_rms_norm(const T* x, int64_t stride, const T* residual, int64_t residual_stride,
                  const T* weight, float eps, T* out, T* total, int64_t rows, int64_t count) {
#pragma omp parallel for if (rows * count > kSerial)
    for (int64_t row = 0; row < rows; ++row) {
        const T* first = x + row * stride;
        const T* second = residual + row * residual_stride;
        T* sum = total + row * count;
        for (int64_t start = 0; start < count; start += kLanes)
            store_some(sum + start,
                       load_some(first + start, count - start) +
                           load_some(second + start, count - start),
                       count - start);
        normalize(sum, weight, eps, count, out + row * count);
    }
}

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t count) {
#pragma omp parallel for if (rows * count > kSerial)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * count;
        const T* up = gate + count;
        for (int64_t start = 0; start < count; start += kLanes) {
            const Floats x = load_some(gate + start, count - start);
            T silu[kLanes];
            store(silu, x / (1 + exp(-x)));
            store_some(out + row * count + start,
                       load(silu) * load_some(up + start, count - start), count - start);
        }
    }
}

// Turns each pair (x[i], x[half + i]) by its angle. `out` may be x.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
    for (int64_t start = 0; start < half; start += kLanes) {
        const int64_t count = half - start;
        const Floats first = load_some(x + start, count);
        const Floats second = load_some(x + half + start, count);
        const Floats c = load_some(cos + start, count), s = load_some(sin + start, count);
        store_some(out + start, first * c - second * s, count);
        store_some(out + half + start, second * c + first * s, count);
    }
}

template <class T>
void norm_and_rotate(const T* x, const T* norm, float eps, const float* cos, const float* sin,
                     int64_t head_dim, T* out) {
    if (norm != nullptr) {
        normalize(x, norm, eps, head_dim, out);
        x = out;
    }
    rotate(x, cos, sin, head_dim / 2, out);
}

template <class T>
void rotate_and_write(const T* qkv, const T* q_norm, const T* k_norm, float eps, const float* cos,
                      const float* sin, const int64_t* slots, T* kv, int64_t block_stride,
                      int64_t head_stride, int64_t value_offset, int64_t block_size, T* queries,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t width = (heads + 2 * kv_heads) * head_dim;
#pragma omp parallel for if (tokens * width > kSerial)
    for (int64_t token = 0; token < tokens; ++token) {
        const T* from = qkv + token * width;
        const float* c = cos + token * (head_dim / 2);
        const float* s = sin + token * (head_dim / 2);
        for (int64_t head = 0; head < heads; ++head, from += head_dim)
            norm_and_rotate(from, q_norm, eps, c, s, head_dim,
                            queries + (token * heads + head) * head_dim);
        T* slot = kv + slots[token] / block_size * block_stride +
                  slots[token] % block_size * head_dim;
        for (int64_t head = 0; head < kv_heads; ++head, from += head_dim)
            norm_and_rotate(from, k_norm, eps, c, s, head_dim, slot + head * head_stride);
        for (int64_t head = 0; head < kv_heads; ++head, from += head_dim)
            std::memcpy(slot + value_offset + head * head_stride, from, head_dim * sizeof(T));
    }
}

}  // namespace

extern "C" {

void rms_norm(int64_t dtype, const void* x, int64_t stride, const void* weight, float eps,
              void* out, int64_t rows, int64_t count) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        rms_norm(static_cast<const T*>(x), stride, static_cast<const T*>(weight), eps,
                 static_cast<T*>(out), rows, count);
    });
}

void add_rms_norm(int64_t dtype, const void* x, int64_t stride, const void* residual,
                  int64_t residual_stride, const void* weight, float eps, void* out, void* total,
                  int64_t rows, int64_t count) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        add_rms_norm(static_cast<const T*>(x), stride, static_cast<const T*>(residual),
                     residual_stride, static_cast<const T*>(weight), eps, static_cast<T*>(out),
                     static_cast<T*>(total), rows, count);
    });
}

void silu_mul(int64_t dtype, const void* gate_up, void* out, int64_t rows, int64_t count) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        silu_mul(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, count);
    });
}

void rotate_and_write(int64_t dtype, const void* qkv, const void* q_norm, const void* k_norm,
                      float eps, const float* cos, const float* sin, const int64_t* slots, void* kv,
                      int64_t block_stride, int64_t head_stride, int64_t value_offset,
                      int64_t block_size, void* queries, int64_t tokens, int64_t heads,
                      int64_t kv_heads, int64_t head_dim) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        rotate_and_write(static_cast<const T*>(qkv), static_cast<const T*>(q_norm),
                         static_cast<const T*>(k_norm), eps, cos, sin, slots, static_cast<T*>(kv),
                         block_stride, head_stride, value_offset, block_size,
                         static_cast<T*>(queries), tokens, heads, kv_heads, head_dim);
    });
}

}  // extern "C"
