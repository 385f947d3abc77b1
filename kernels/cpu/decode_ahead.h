// What decode attention reads, and fetching it in time.

#pragma once

#include <cstdint>

namespace kvferry {

constexpr int64_t kLine = 64;  // bytes of the processor's cache

// Up to 16 of a row's tokens, one after the other in one block.
template <class T>
struct Run {
    const T* keys;
    const T* values;
    int64_t count;
};

// Fetches runs into the cache, some lines at each step of other work: the processor cannot guess
// where the next block lies, and many fetches in a row wait for each other. Line after line: it
// notices that, and runs ahead of them.
template <class T>
class Ahead {
public:
    // Fetches all in `steps` steps.
    Ahead(const Run<T>* runs, size_t count, int64_t head_dim, int64_t steps)
        : run_(runs), end_(runs + count), row_bytes_(head_dim * sizeof(T)) {
        int64_t tokens = 0;
        for (size_t run = 0; run < count; ++run) tokens += runs[run].count;
        lines_ = (2 * tokens * row_bytes_ / kLine + steps - 1) / steps;
        if (count > 0) begin(run_->keys);
    }

    void step() {
        if (run_ == end_) return;
        for (int64_t line = 0; line < lines_; ++line, at_ += kLine) __builtin_prefetch(at_, 0, 2);
        if (at_ < stop_) return;
        if (in_keys_)
            begin(run_->values);
        else if (++run_ < end_)
            begin(run_->keys);
    }

private:
    void begin(const T* part) {
        at_ = reinterpret_cast<const char*>(part);
        stop_ = at_ + run_->count * row_bytes_;
        in_keys_ = part == run_->keys;
    }

    const Run<T>* run_;
    const Run<T>* end_;
    int64_t row_bytes_, lines_;
    const char* at_ = nullptr;
    const char* stop_ = nullptr;
    bool in_keys_ = true;
};

}  // namespace kvferry
