// Copies whole blocks and computes their digests in the same pass.

#include "digest.h"

namespace {

using namespace kvferry;

constexpr int kAbreast = 4;  // rows

struct Blocks {
    const uint64_t* source;
    const int64_t* source_ids;
    uint64_t* rows;  // nothing is copied without
    const int64_t* ids;
    int64_t lanes;

    template <Copy kCopy, int kRows>
    void digest(int64_t first, uint64_t* digests) const {
        const uint64_t* from[kRows];
        uint64_t* to[kRows];
        for (int row = 0; row < kRows; ++row) {
            from[row] = source + source_ids[first + row] * lanes;
            to[row] = kCopy == Copy::kNone ? nullptr : rows + ids[first + row] * lanes;
        }
        digest_rows<kCopy, kRows>(from, to, lanes, digests + first);
    }

    template <Copy kCopy>
    void digest_all(int64_t count, uint64_t* digests) const {
        int64_t i = 0;
        for (; i + kAbreast <= count; i += kAbreast) digest<kCopy, kAbreast>(i, digests);
        for (; i < count; ++i) digest<kCopy, 1>(i, digests);
    }

    bool in_whole_lines() const {
        return reinterpret_cast<uintptr_t>(rows) % sizeof(Line) == 0 && lanes % kLineLanes == 0;
    }
};

}  // namespace

extern "C" {

void digest_blocks(const uint64_t* rows, const int64_t* ids, int64_t count, int64_t lanes,
                   uint64_t* digests) {
    Blocks{rows, ids, nullptr, nullptr, lanes}.digest_all<Copy::kNone>(count, digests);
}

// `keep_cached` is for rows that are read again at once. Others are written past the caches where
// they can be: then no line is read before it is overwritten.
void copy_blocks(const uint64_t* source, const int64_t* source_ids, uint64_t* rows,
                 const int64_t* ids, int64_t count, int64_t lanes, int64_t keep_cached,
                 uint64_t* digests) {
    const Blocks blocks{source, source_ids, rows, ids, lanes};
    if (keep_cached || !blocks.in_whole_lines())
        return blocks.digest_all<Copy::kCached>(count, digests);
    blocks.digest_all<Copy::kStreamed>(count, digests);
    end_streaming();
}

}  // extern "C"
