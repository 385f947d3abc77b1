// Attention of one query per row over the row's blocks of the paged cache, read where they lie.
//
// Splits of a row are combined in order, so its result depends neither on the other rows nor on the
// number of threads.

#include <algorithm>
#include <memory>
#include <vector>

#include "attention.h"
#include "decode_items.h"

namespace {

using namespace kvferry;

constexpr size_t kRuns = 4;           // of up to 16 tokens, weighed together
constexpr int64_t kSerial = 1 << 16;  // elements of keys that one thread attends to soonest

// Of one head: scores first, then what they become.
using Weights = float[kRuns][kLanes];

// A head's query, and how a vector's worth of it is multiplied by a key's.
template <class T>
struct Query {
    static constexpr int64_t kStep = kLanes;
    float values[kMaxHeadDim];

    void set(const T* from, int64_t head_dim) {
        for (int64_t start = 0; start < head_dim; start += kLanes)
            store(values + start, load_some(from + start, head_dim - start));
    }

    static Floats load_key(const T* from) { return load(from); }

    static Floats multiply_add(Floats sums, Floats query, Floats key) { return sums + query * key; }
};

#if defined(__AVX512BF16__)
template <>
struct Query<BFloat16> {
    static constexpr int64_t kStep = 2 * kLanes;
    BFloat16 values[kMaxHeadDim];

    void set(const BFloat16* from, int64_t head_dim) {
        std::memset(values, 0, sizeof(values));
        std::memcpy(values, from, head_dim * sizeof(BFloat16));
    }

    static Floats load_key(const BFloat16* from) { return load_vector<Floats>(from); }

    static Floats multiply_add(Floats sums, Floats query, Floats key) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)query, (__m512bh)key);
    }
};
#endif

// Up to 16 of a row's tokens, one after the other in one block.
template <class T>
struct Run {
    const T* keys;
    const T* values;
    int64_t count;
};

// The processor cannot guess where the next block lies. Nothing waits for a prefetch, but many in a
// row wait for each other: they stand between other work.
template <class T>
void prefetch(const T* from, int64_t count) {
    for (size_t at = 0; at < count * sizeof(T); at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from) + at, 0, 2);
}

// Vectors whose lanes add up to the products of the query and kTokens keys. Prefetches as many keys
// from `later` on.
template <int kTokens, class T>
void multiply_keys(const Query<T>& query, const T* keys, const T* later, int64_t head_dim,
                   Floats* products) {
    constexpr int64_t kStep = Query<T>::kStep;
    Floats sums[kTokens] = {};
    int64_t start = 0;
    for (; start + kStep <= head_dim; start += kStep) {
        const Floats part = load_vector<Floats>(query.values + start);
        for (int token = 0; token < kTokens; ++token) {
            sums[token] = Query<T>::multiply_add(
                sums[token], part, Query<T>::load_key(keys + token * head_dim + start));
            prefetch(later + start * kTokens + token * kStep, kStep);
        }
    }
    if (start < head_dim) {
        const Floats part = load_vector<Floats>(query.values + start);
        for (int token = 0; token < kTokens; ++token) {
            T rest[kStep] = {};
            std::memcpy(rest, keys + token * head_dim + start, (head_dim - start) * sizeof(T));
            sums[token] = Query<T>::multiply_add(sums[token], part, Query<T>::load_key(rest));
        }
    }
    for (int token = 0; token < kTokens; ++token) products[token] = sums[token];
}

// scale * q K^T; minus infinity for the lanes of no token.
template <class T>
Floats scores_of(const Query<T>& query, const Run<T>& run, const Run<T>& later, int64_t head_dim,
                 float scale) {
    Floats products[kLanes] = {};
    if (run.count == kLanes)
        multiply_keys<kLanes>(query, run.keys, later.keys, head_dim, products);
    else
        for (int64_t token = 0; token < run.count; ++token)
            multiply_keys<1>(query, run.keys + token * head_dim, later.keys + token * head_dim,
                             head_dim, products + token);
    Ints lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes < int32_t(run.count) ? sums_of(products) * scale : Floats{} + kNothing;
}

// Adds the values, times each head's weights, to the states of kHeads heads; of the values only
// kVectors vectors from `start` on, or what there is of a single one.
template <int kHeads, int kVectors, class T>
void add_slice(State* states, const Weights* weights, size_t run_index, const Run<T>& run,
               const Run<T>& later, int64_t head_dim, int64_t start) {
    Floats sums[kHeads][kVectors];
    for (int head = 0; head < kHeads; ++head)
        for (int vector = 0; vector < kVectors; ++vector)
            sums[head][vector] = load(states[head].values + start + vector * kLanes);
    for (int64_t token = 0; token < run.count; ++token) {
        const T* from = run.values + token * head_dim + start;
        prefetch(later.values + token * head_dim + start, kVectors * kLanes);
        Floats values[kVectors];
        for (int vector = 0; vector < kVectors; ++vector)
            values[vector] = kVectors > 1 ? load(from + vector * kLanes)
                                          : load_some(from, head_dim - start);
        for (int head = 0; head < kHeads; ++head)
            for (int vector = 0; vector < kVectors; ++vector)
                sums[head][vector] += values[vector] * weights[head][run_index][token];
    }
    for (int head = 0; head < kHeads; ++head)
        for (int vector = 0; vector < kVectors; ++vector)
            store(states[head].values + start + vector * kLanes, sums[head][vector]);
}

template <int kHeads, class T>
void add_values(State* states, const Weights* weights, size_t run_index, const Run<T>& run,
                const Run<T>& later, int64_t head_dim) {
    constexpr int kVectors = 8 / kHeads;  // eight sums that do not wait for each other
    int64_t start = 0;
    for (; start + kVectors * kLanes <= head_dim; start += kVectors * kLanes)
        add_slice<kHeads, kVectors>(states, weights, run_index, run, later, head_dim, start);
    for (; start < head_dim; start += kLanes)
        add_slice<kHeads, 1>(states, weights, run_index, run, later, head_dim, start);
}

// Where an item's thread is. A block's heads lie side by side in memory, so they are taken in turn
// before the tokens that follow.
struct Place {
    int64_t token, kv_head;
};

// Up to kRuns runs at the item's place, which is moved to the next.
template <class T>
size_t next_runs(const Cache<T>& cache, const int32_t* table, const Item& item, Place& place,
                 Run<T>* runs) {
    size_t count = 0;
    int64_t token = place.token;
    for (; count < kRuns && token < item.end; ++count) {
        const int64_t offset = token % cache.block_size;
        const int64_t tokens =
            std::min({int64_t(kLanes), cache.block_size - offset, item.end - token});
        const T* keys = cache.data + table[token / cache.block_size] * cache.block_stride +
                        place.kv_head * cache.head_stride + offset * cache.head_dim;
        runs[count] = {keys, keys + cache.value_offset, tokens};
        token += tokens;
    }
    if (++place.kv_head == item.end_head) place = {token, item.first_head};
    return count;
}

// Attends from the item's query heads; queries and states are those from its first head on.
template <class T>
void attend(const Cache<T>& cache, const int32_t* table, const Item& item,
            const Query<T>* queries, State* states, Weights* weights, size_t group, float scale) {
    const int64_t head_dim = cache.head_dim;
    Run<T> runs[kRuns], following[kRuns];
    Place place{item.begin, item.first_head};
    int64_t kv_head = place.kv_head;
    size_t count = next_runs(cache, table, item, place, runs);
    while (count > 0) {
        const int64_t following_head = place.kv_head;
        const size_t then = next_runs(cache, table, item, place, following);
        const auto later = [&](size_t run) { return run < then ? following[run] : runs[run]; };
        const size_t first = (kv_head - item.first_head) * group;
        for (size_t run = 0; run < count; ++run)
            for (size_t head = 0; head < group; ++head)
                store(weights[head][run],
                      scores_of(queries[first + head], runs[run], later(run), head_dim, scale));
        for (size_t head = 0; head < group; ++head)
            states[first + head].take(weights[head][0], count, head_dim);
        for (size_t run = 0; run < count; ++run) {
            const auto add = [&](auto add_values, size_t head) {
                add_values(states + first + head, weights + head, run, runs[run], later(run),
                           head_dim);
            };
            size_t head = 0;
            for (; head + 4 <= group; head += 4) add(add_values<4, T>, head);
            for (; head + 2 <= group; head += 2) add(add_values<2, T>, head);
            if (head < group) add(add_values<1, T>, head);
        }
        std::copy(following, following + then, runs);
        count = then;
        kv_head = following_head;
    }
}

// Writes the head's result, from the states of all its splits: `count` of them, `stride` apart.
template <class T>
void combine(const State* states, size_t count, size_t stride, int64_t head_dim, T* out) {
    State all;
    for (size_t split = 0; split < count; ++split) {
        const State& part = states[split * stride];
        all.rescale(std::max(all.largest, part.largest), head_dim);
        const Floats factor = exp(Floats{} + (part.largest - all.largest));
        for (int64_t start = 0; start < head_dim; start += kLanes)
            store(all.values + start,
                  load(all.values + start) + load(part.values + start) * factor);
        all.total += part.total * factor[0];
    }
    const float inverse = count > 0 ? 1 / all.total : 0;
    for (int64_t start = 0; start < head_dim; start += kLanes)
        store_some(out + start, load(all.values + start) * inverse, head_dim - start);
}

template <class T>
void decode_attention(const T* q, int64_t q_row_stride, int64_t q_head_stride, Cache<T> cache,
                      const int32_t* tables, int64_t table_width, const int32_t* contexts,
                      int64_t rows, int64_t heads, int64_t kv_heads, float scale, int64_t window,
                      T* out) {
    const size_t group = heads / kv_heads;
    const Work work(contexts, rows, kv_heads, window);
    std::vector<State> states(work.starts[rows] * heads);  // [splits, heads]
#pragma omp parallel if (work.keys * cache.head_dim > kSerial)
    {
        std::vector<Query<T>> queries(heads);
        const std::unique_ptr<Weights[]> weights(new Weights[group]);
#pragma omp for schedule(dynamic)
        for (size_t index = 0; index < work.items.size(); ++index) {
            const Item& item = work.items[index];
            const int64_t first = item.first_head * group, end = item.end_head * group;
            for (int64_t head = first; head < end; ++head)
                queries[head - first].set(q + item.row * q_row_stride + head * q_head_stride,
                                          cache.head_dim);
            attend(cache, tables + item.row * table_width, item, queries.data(),
                   &states[item.split * heads + first], weights.get(), group, scale);
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < rows * heads; ++index) {
            const size_t start = work.starts[index / heads];
            combine(states.data() + start * heads + index % heads,
                    work.starts[index / heads + 1] - start, heads, cache.head_dim,
                    out + index * cache.head_dim);
        }
    }
}

}  // namespace

extern "C" void decode_attention(int64_t dtype, const void* q, int64_t q_row_stride,
                                 int64_t q_head_stride, const void* kv, int64_t block_stride,
                                 int64_t head_stride, int64_t value_offset, int64_t block_size,
                                 int64_t head_dim, const int32_t* tables, int64_t table_width,
                                 const int32_t* contexts, int64_t rows, int64_t heads,
                                 int64_t kv_heads, float scale, int64_t window, void* out) {
    with_dtype(dtype, [=](auto zero) {
        using T = decltype(zero);
        const Cache<T> cache{static_cast<const T*>(kv), block_stride, head_stride,
                             value_offset,              block_size,   head_dim};
        decode_attention(static_cast<const T*>(q), q_row_stride, q_head_stride, cache, tables,
                         table_width, contexts, rows, heads, kv_heads, scale, window,
                         static_cast<T*>(out));
    });
}
