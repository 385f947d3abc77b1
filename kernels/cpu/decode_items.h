// How decode attention is cut into pieces for the threads.
//
// A row's keys are split at fixed positions. Where that gives too few pieces, as a single row does,
// KV heads are divided too.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvferry {

constexpr int64_t kSplit = 512;  // tokens
constexpr int64_t kItems = 8;    // for a thread, where there are heads enough

// The unit of work: some KV heads of one split.
struct Item {
    int64_t row, begin, end, first_head, end_head;
    size_t split;
};

// The items of all rows, and where each row's splits start; one more at the end.
struct Work {
    std::vector<Item> items;
    std::vector<size_t> starts;
    int64_t keys = 0;  // of all KV heads

    Work(const int32_t* contexts, int64_t rows, int64_t kv_heads, int64_t window) {
        std::vector<Item> splits;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t end = contexts[row];
            const int64_t first = window > 0 ? std::max<int64_t>(end - window, 0) : 0;
            starts.push_back(splits.size());
            keys += (end - first) * kv_heads;
            for (int64_t start = first / kSplit * kSplit; start < end; start += kSplit)
                splits.push_back({row, std::max(start, first), std::min(start + kSplit, end), 0,
                                  kv_heads, splits.size()});
        }
        starts.push_back(splits.size());
        const int64_t enough = kItems * omp_get_max_threads(), there = splits.size();
        const int64_t parts = std::clamp<int64_t>(enough / std::max<int64_t>(there, 1), 1, kv_heads);
        for (const Item& split : splits)
            for (int64_t part = 0; part < parts; ++part) {
                items.push_back(split);
                items.back().first_head = kv_heads * part / parts;
                items.back().end_head = kv_heads * (part + 1) / parts;
            }
    }
};

}  // namespace kvferry
