// Attention of one query per row over the row's blocks of the paged cache, read where they lie.
//
// Splits of a row are combined in order, so its result depends neither on the other rows nor on the
// number of threads.

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "decode_ahead.h"
#include "decode_arithmetic.h"
#include "decode_items.h"
#include "kernels.h"

namespace {

using namespace kvferry;

constexpr size_t kRuns = 4;           // of up to 16 tokens, weighed together
constexpr int64_t kSerial = 1 << 16;  // elements of keys that one thread attends to soonest
constexpr int64_t kSteps = 12;        // of work on a run and head, or a few more

// A head's query, zeros after it.
template <class T>
struct Query {
    typename DecodeArithmetic<T>::Number values[kMaxHeadDim] = {};

    void set(const T* from, int64_t head_dim) {
        for (int64_t start = 0; start < head_dim; start += kLanes)
            store(values + start, load_some(from + start, head_dim - start));
    }
};

// Of one head: what its scores become.
template <class T>
using Weights = typename DecodeArithmetic<T>::Number[kRuns][kLanes];

// GCC keeps arrays of sums in registers where it unrolls their loops early, which the pragmas here
// and below ask for; otherwise it stores them at every step.

// The products of kHeads queries and kTokens keys: vectors whose lanes add up to that of query h
// and key t go to products[h * kLanes + t].
template <int kHeads, int kTokens, class T>
void multiply_keys(const Query<T>* queries, const T* keys, int64_t head_dim, Ahead<T>& ahead,
                   Floats* products) {
    using Arithmetic = DecodeArithmetic<T>;
    constexpr int64_t kStep = Arithmetic::kKeyStep;
    Floats sums[kHeads][kTokens] = {};
    int64_t start = 0;
    for (; start + kStep <= head_dim; start += kStep) {
        ahead.step();
#pragma GCC unroll 4
        for (int token = 0; token < kTokens; ++token) {
            const Floats key = Arithmetic::load_key(keys + token * head_dim + start, kStep);
#pragma GCC unroll 2
            for (int head = 0; head < kHeads; ++head)
                sums[head][token] = Arithmetic::add_product(
                    sums[head][token], load_vector<Floats>(queries[head].values + start), key);
        }
    }
#pragma GCC unroll 2
    for (int head = 0; head < kHeads; ++head)
#pragma GCC unroll 4
        for (int token = 0; token < kTokens; ++token)
            products[head * kLanes + token] = sums[head][token];
    if (start == head_dim) return;
    for (int token = 0; token < kTokens; ++token) {
        const Floats key = Arithmetic::load_key(keys + token * head_dim + start, head_dim - start);
        for (int head = 0; head < kHeads; ++head) {
            Floats& sum = products[head * kLanes + token];
            sum = Arithmetic::add_product(sum, load_vector<Floats>(queries[head].values + start),
                                          key);
        }
    }
}

// Writes scale * q K^T of kHeads queries and a run's keys; minus infinity where no token is.
template <int kHeads, class T>
void score(const Query<T>* queries, const Run<T>& run, int64_t head_dim, float scale,
           Ahead<T>& ahead, size_t run_index, float (*scores)[kRuns][kLanes]) {
    constexpr int kTokens = 4;
    Floats products[kHeads][kLanes] = {};
    int64_t token = 0;
    for (; token + kTokens <= run.count; token += kTokens)
        multiply_keys<kHeads, kTokens>(queries, run.keys + token * head_dim, head_dim, ahead,
                                       &products[0][token]);
    for (; token < run.count; ++token)
        multiply_keys<kHeads, 1>(queries, run.keys + token * head_dim, head_dim, ahead,
                                 &products[0][token]);
    Ints lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    for (int head = 0; head < kHeads; ++head)
        store(scores[head][run_index], lanes < int32_t(run.count)
                                           ? sums_of(products[head]) * scale
                                           : Floats{} + kNothing);
}

// Finds the weights of the runs' values for kHeads heads.
template <int kHeads, class T>
void weigh(const Query<T>* queries, const Run<T>* runs, size_t count, int64_t head_dim, float scale,
           Ahead<T>& ahead, State* states, Weights<T>* weights) {
    float scores[kHeads][kRuns][kLanes];
    for (size_t run = 0; run < count; ++run)
        score<kHeads>(queries, runs[run], head_dim, scale, ahead, run, scores);
    for (int head = 0; head < kHeads; ++head) {
        states[head].take(scores[head][0], count, head_dim);
        for (size_t run = 0; run < count; ++run) store(weights[head][run], load(scores[head][run]));
    }
}

// Adds the run's values, times each head's weights, to the states of kHeads heads: kVectors times
// kWide numbers from `start` on, or the `count` there are.
template <int kHeads, int kVectors, class T>
void add_slice(State* states, const Weights<T>* weights, size_t run_index, const Run<T>& run,
               int64_t head_dim, int64_t start, int64_t count, Ahead<T>& ahead) {
    using Arithmetic = DecodeArithmetic<T>;
    static constexpr T kZeros[kMaxHeadDim] = {};
    Floats sums[kHeads][2 * kVectors];
#pragma GCC unroll 4
    for (int head = 0; head < kHeads; ++head)
#pragma GCC unroll 8
        for (int vector = 0; vector < 2 * kVectors; ++vector)
            sums[head][vector] = load(states[head].values + start + vector * kLanes);
    for (int64_t token = 0; token < run.count; token += Arithmetic::kTokens) {
        const T* first = run.values + token * head_dim + start;
        const T* second = token + 1 < run.count ? first + head_dim : kZeros;
        ahead.step();
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
            Floats values[2];
            Arithmetic::load_values(first + vector * kWide, second + vector * kWide,
                                    count - vector * kWide, values);
#pragma GCC unroll 4
            for (int head = 0; head < kHeads; ++head)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half)
                    sums[head][2 * vector + half] =
                        Arithmetic::add_weighted(sums[head][2 * vector + half], values[half],
                                                 &weights[head][run_index][token]);
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < kHeads; ++head)
#pragma GCC unroll 8
        for (int vector = 0; vector < 2 * kVectors; ++vector)
            store(states[head].values + start + vector * kLanes, sums[head][vector]);
}

template <int kHeads, class T>
void add_values(State* states, const Weights<T>* weights, size_t run_index, const Run<T>& run,
                int64_t head_dim, Ahead<T>& ahead) {
    constexpr int kVectors = kHeads < 4 ? 4 : 2;  // at most 16 sums
    int64_t start = 0;
    for (; start + kVectors * kWide <= head_dim; start += kVectors * kWide)
        add_slice<kHeads, kVectors>(states, weights, run_index, run, head_dim, start,
                                    kVectors * kWide, ahead);
    for (; start < head_dim; start += kWide)
        add_slice<kHeads, 1>(states, weights, run_index, run, head_dim, start, head_dim - start,
                             ahead);
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

// Calls process(kHeads, head) for all of the group's heads, up to kMost at a time.
template <int kMost, class Process>
void by_heads(size_t group, Process process) {
    size_t head = 0;
    for (; head + kMost <= group; head += kMost)
        process(std::integral_constant<int, kMost>{}, head);
    if constexpr (kMost > 1)
        by_heads<kMost / 2>(
            group - head, [&](auto heads, size_t rest) { process(heads, head + rest); });
}

// Attends from the item's query heads; queries and states are those from its first head on.
template <class T>
void attend(const Cache<T>& cache, const int32_t* table, const Item& item, const Query<T>* queries,
            State* states, Weights<T>* weights, size_t group, float scale) {
    const int64_t head_dim = cache.head_dim;
    Run<T> runs[kRuns], following[kRuns];
    Place place{item.begin, item.first_head};
    int64_t kv_head = place.kv_head;
    size_t count = next_runs(cache, table, item, place, runs);
    while (count > 0) {
        const int64_t following_head = place.kv_head;
        const size_t then = next_runs(cache, table, item, place, following);
        Ahead<T> ahead(following, then, head_dim, count * group * kSteps);
        const size_t first = (kv_head - item.first_head) * group;
        by_heads<2>(group, [&](auto heads, size_t head) {
            weigh<heads()>(queries + first + head, runs, count, head_dim, scale, ahead,
                           states + first + head, weights + head);
        });
        for (size_t run = 0; run < count; ++run)
            by_heads<4>(group, [&](auto heads, size_t head) {
                add_values<heads()>(states + first + head, weights + head, run, runs[run],
                                    head_dim, ahead);
            });
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
        const std::unique_ptr<Weights<T>[]> weights(new Weights<T>[group]);
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
