// Copies whole blocks and computes their digests in the same pass.

#include "digest.h"

using kvferry::digest;

extern "C" {

void digest_blocks(const uint64_t* rows, const int64_t* ids, int64_t count, int64_t lanes,
                   uint64_t* digests) {
    for (int64_t i = 0; i < count; ++i)
        digests[i] = digest<false>(rows + ids[i] * lanes, nullptr, lanes);
}

void copy_blocks(const uint64_t* source, const int64_t* source_ids, uint64_t* rows,
                 const int64_t* ids, int64_t count, int64_t lanes, uint64_t* digests) {
    for (int64_t i = 0; i < count; ++i)
        digests[i] = digest<true>(source + source_ids[i] * lanes, rows + ids[i] * lanes, lanes);
}

}  // extern "C"
