// Causal attention of many queries per row, in bf16, as two products of packed matrices.
//
// First the keys and values of every (row, kv head) are packed in panels, keys as outputs of the
// first product, values as outputs of the second. Then each tile of queries goes through the keys
// it sees, kBlockKeys at a time: scores, softmax over what was seen so far (Milakov and Gimelshein
// 2018; Dao et al. 2022), weights rounded to bf16, times values.

#include <algorithm>
#include <memory>
#include <vector>

#include "attention.h"
#include "panels.h"

namespace {

using namespace kvferry;

constexpr int64_t kBlockKeys = 256;          // weighed together; whole panels
constexpr int64_t kTileRows = 4 * kMaxRows;  // query vectors that go through the keys together

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
    int64_t heads, kv_heads, head_dim, window;

    int64_t group() const { return heads / kv_heads; }
    int64_t key_words() const { return head_dim / 2; }
    int64_t value_panels() const { return divide_up(head_dim, kPanel); }
    // Words of a block's packed keys, and of its packed values.
    int64_t block_key_words() const { return key_words() * kBlockKeys; }
    int64_t block_value_words() const { return value_panels() * kPanel * kBlockKeys / 2; }
    int64_t block_words() const { return block_key_words() + block_value_words(); }
};

// A row's queries, and the keys that any of them sees: [first_key, context).
struct Row {
    const int32_t* table;
    int64_t first_query, queries, context, first_key;
    int64_t first_block;  // of its packed keys among those of all rows

    int64_t blocks() const { return divide_up(context - first_key, kBlockKeys); }
    int64_t position(int64_t query) const { return context - queries + query; }
};

// Where each of up to 32 tokens lies, from `token` on; null for those past the end.
void find_tokens(const Cache<BFloat16>& cache, const Row& row, int64_t kv_head, int64_t token,
                 const BFloat16* (&places)[kPanel]) {
    for (int64_t index = 0; index < kPanel; ++index, ++token)
        places[index] = token < row.context
                            ? cache.data +
                                  row.table[token / cache.block_size] * cache.block_stride +
                                  kv_head * cache.head_stride +
                                  token % cache.block_size * cache.head_dim
                            : nullptr;
}

// Packs 32 tokens: keys as a panel [words of a key, 32], values as 16 pairs in every value panel,
// [value panels][pairs of the block, 32]. Tokens past the end are zeros.
void pack_tokens(const Cache<BFloat16>& cache, const BFloat16* const (&places)[kPanel],
                 const Shape& shape, uint32_t* keys, uint32_t* values) {
    for (int64_t start = 0; start < shape.key_words(); start += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, shape.key_words() - start);
        for (int64_t half = 0; half < kPanel; half += kLanes) {
            Words square[kLanes] = {};
            for (int64_t token = 0; token < kLanes; ++token)
                if (places[half + token] != nullptr)
                    square[token] = load_words(places[half + token] + 2 * start, count);
            transpose(square);
            for (int64_t word = 0; word < count; ++word)
                std::memcpy(keys + (start + word) * kPanel + half, &square[word], sizeof(Words));
        }
    }
    for (int64_t start = 0; start < shape.value_panels() * kPanel; start += kLanes) {
        const int64_t count = shape.head_dim - start;
        uint32_t* panel = values + start / kPanel * kPanel * kBlockKeys / 2 + start % kPanel;
        for (int64_t pair = 0; pair < kPanel / 2; ++pair) {
            Words of_two[2] = {};
            for (int64_t token = 0; token < 2; ++token) {
                const BFloat16* place = places[2 * pair + token];
                if (place != nullptr && count > 0)
                    of_two[token] = (Words)load_some(place + cache.value_offset + start, count);
            }
            const Words words = of_two[0] >> 16 | of_two[1];
            std::memcpy(panel + pair * kPanel, &words, sizeof(words));
        }
    }
}

void pack_block(const Cache<BFloat16>& cache, const Row& row, int64_t kv_head, int64_t block,
                const Shape& shape, uint32_t* packed) {
    const int64_t first = row.first_key + block * kBlockKeys;
    const int64_t end = std::min(first + kBlockKeys, row.context);
    for (int64_t token = first; token < end; token += kPanel) {
        const BFloat16* places[kPanel];
        find_tokens(cache, row, kv_head, token, places);
        pack_tokens(cache, places, shape, packed + (token - first) * shape.key_words(),
                    packed + shape.block_key_words() + (token - first) / 2 * kPanel);
    }
}

// A thread's memory for one tile of queries after the other.
struct Workspace {
    std::vector<uint32_t> queries;
    std::vector<State> states;
    float scores[kMaxRows][kBlockKeys];
    BFloat16 weights[kMaxRows][kBlockKeys];
    uint32_t weight_words[kMaxRows * kBlockKeys / 2 + kLanes];
};

// Hides the keys that a query at `position` does not see; the first score is that of `first_key`.
void hide(float* scores, int64_t first_key, int64_t keys, int64_t position, int64_t window) {
    const int64_t end = std::clamp<int64_t>(position + 1 - first_key, 0, keys);
    std::fill(scores + end, scores + keys, kNothing);
    if (window > 0)
        std::fill(scores, scores + std::clamp<int64_t>(position + 1 - window - first_key, 0, end),
                  kNothing);
}

// A tile of a row's queries, all query heads of one KV head: vector v is that of query
// first + v / group and head v % group.
class Tile {
public:
    Tile(const Shape& shape, const Row& row, int64_t first, int64_t queries, Workspace& space)
        : shape_(shape), row_(row), first_(first), tiling_{queries * shape.group()}, space_(space) {
        space.queries.resize(tiling_.rows * shape.key_words() + kLanes);
        space.states.assign(tiling_.rows, State{});
    }

    // The tile's queries see no keys from here on.
    int64_t end() const { return row_.position(first_ + tiling_.rows / shape_.group()); }

    // Where vector v of the tile's queries begins is from(v).
    template <class From>
    void take_queries(From from) {
        for (int64_t part = 0; part < tiling_.count; ++part)
            interleave(queries(part), tiling_.height(part), shape_.key_words(),
                       [&](int64_t vector, int64_t word, int64_t count) {
                           return load_words(from(tiling_.start(part) + vector) + 2 * word, count);
                       });
    }

    void attend(int64_t block, const uint32_t* packed, float scale) {
        const int64_t first_key = row_.first_key + block * kBlockKeys;
        const int64_t keys = divide_up(std::min(kBlockKeys, end() - first_key), kPanel) * kPanel;
        for (int64_t part = 0; part < tiling_.count; ++part) {
            score(part, packed, keys, scale);
            weigh(part, first_key, keys);
            add_values(part, packed + shape_.block_key_words(), keys);
        }
    }

    // Writes the result of vector v to to(v).
    template <class To>
    void finish(To to) const {
        for (int64_t vector = 0; vector < tiling_.rows; ++vector) {
            const State& state = space_.states[vector];
            for (int64_t start = 0; start < shape_.head_dim; start += kLanes)
                store_some(to(vector) + start, load(state.values + start) * (1 / state.total),
                           shape_.head_dim - start);
        }
    }

private:
    uint32_t* queries(int64_t part) const {
        return space_.queries.data() + tiling_.start(part) * shape_.key_words();
    }

    void score(int64_t part, const uint32_t* panels, int64_t keys, float scale) {
        const int64_t words = shape_.key_words();
        multiply_panels(part, queries(part), panels, words, words * kPanel, keys / kPanel,
                        [&](int64_t vector, int64_t key, Floats sums) {
                            store(space_.scores[vector] + key, sums * scale);
                        });
    }

    void weigh(int64_t part, int64_t first_key, int64_t keys) {
        const int64_t group = shape_.group();
        for (int64_t vector = 0; vector < tiling_.height(part); ++vector) {
            const int64_t index = tiling_.start(part) + vector;
            float* scores = space_.scores[vector];
            hide(scores, first_key, keys, row_.position(first_ + index / group), shape_.window);
            space_.states[index].take(scores, keys / kLanes, shape_.head_dim);
            for (int64_t key = 0; key < keys; key += kLanes)
                store(space_.weights[vector] + key, load(scores + key));
        }
        interleave(space_.weight_words, tiling_.height(part), keys / 2,
                   [&](int64_t vector, int64_t word, int64_t count) {
                       return load_words(space_.weights[vector] + 2 * word, count);
                   });
    }

    void add_values(int64_t part, const uint32_t* panels, int64_t keys) {
        multiply_panels(part, space_.weight_words, panels, keys / 2, kPanel * kBlockKeys / 2,
                        shape_.value_panels(), [&](int64_t vector, int64_t start, Floats sums) {
                            float* values =
                                space_.states[tiling_.start(part) + vector].values + start;
                            store(values, load(values) + sums);
                        });
    }

    // Calls take(vector, output, sums) for every vector of the part and 16 outputs at a time.
    template <class Take>
    void multiply_panels(int64_t part, const uint32_t* x, const uint32_t* panels, int64_t words,
                         int64_t panel_stride, int64_t count, Take take) {
        const int64_t height = tiling_.height(part);
        for (int64_t number = 0; number < count; ++number) {
            const uint32_t* panel = panels + number * panel_stride;
            Floats sums[kMaxRows][2];
            multiply_tile_of<BFloat16Pairs>(height, x, panel, words,
                                            reinterpret_cast<const char*>(panel + panel_stride),
                                            kPanel * sizeof(uint32_t), sums);
            for (int64_t vector = 0; vector < height; ++vector)
                for (int64_t half = 0; half < 2; ++half)
                    take(vector, number * kPanel + half * kLanes, sums[vector][half]);
        }
    }

    const Shape& shape_;
    const Row& row_;
    const int64_t first_;
    const Tiling tiling_;
    Workspace& space_;
};

struct Block {
    int64_t row, kv_head, block;
};
struct Part {
    int64_t row, kv_head, first, queries;
};

}  // namespace

extern "C" void prefill_attention(const BFloat16* q, int64_t q_row_stride, int64_t q_head_stride,
                                  const BFloat16* kv, int64_t block_stride, int64_t head_stride,
                                  int64_t value_offset, int64_t block_size, int64_t head_dim,
                                  const int32_t* tables, int64_t table_width,
                                  const int32_t* query_starts, const int32_t* contexts,
                                  int64_t num_rows, int64_t heads, int64_t kv_heads, float scale,
                                  int64_t window, BFloat16* out) {
    const Cache<BFloat16> cache{kv, block_stride, head_stride, value_offset, block_size, head_dim};
    const Shape shape{heads, kv_heads, head_dim, window};
    const int64_t group = shape.group();
    const int64_t tile_queries = std::max<int64_t>(1, kTileRows / group);
    std::vector<Row> rows;
    std::vector<Block> blocks;
    std::vector<Part> parts;
    int64_t num_blocks = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t first = query_starts[row], queries = query_starts[row + 1] - first;
        const int64_t before = contexts[row] - queries;
        const int64_t first_key = window > 0 ? std::max<int64_t>(before + 1 - window, 0) : 0;
        rows.push_back({tables + row * table_width, first, queries, contexts[row], first_key,
                        num_blocks});
        if (queries == 0) continue;
        for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
            for (int64_t block = 0; block < rows[row].blocks(); ++block)
                blocks.push_back({row, kv_head, block});
            for (int64_t query = 0; query < queries; query += tile_queries)
                parts.push_back({row, kv_head, query, std::min(tile_queries, queries - query)});
        }
        num_blocks += rows[row].blocks() * kv_heads;
    }
    const std::unique_ptr<uint32_t[]> packed(new uint32_t[num_blocks * shape.block_words()]);
    const auto place = [&](const Row& row, int64_t kv_head, int64_t block) {
        return packed.get() +
               (row.first_block + kv_head * row.blocks() + block) * shape.block_words();
    };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (size_t index = 0; index < blocks.size(); ++index) {
            const Block& item = blocks[index];
            const Row& row = rows[item.row];
            pack_block(cache, row, item.kv_head, item.block, shape,
                       place(row, item.kv_head, item.block));
        }
        const std::unique_ptr<Workspace> space(new Workspace);
#pragma omp for schedule(dynamic)
        for (size_t index = 0; index < parts.size(); ++index) {
            // Later queries see more keys: they come first, so that none of them is left at the end.
            const Part& part = parts[parts.size() - 1 - index];
            const Row& row = rows[part.row];
            Tile tile(shape, row, part.first, part.queries, *space);
            const auto token = [&](int64_t vector) {
                return row.first_query + part.first + vector / group;
            };
            const auto head = [&](int64_t vector) { return part.kv_head * group + vector % group; };
            tile.take_queries([&](int64_t vector) {
                return q + token(vector) * q_row_stride + head(vector) * q_head_stride;
            });
            const int64_t begin =
                window > 0 ? std::max(row.position(part.first) + 1 - window, row.first_key)
                           : row.first_key;
            for (int64_t block = (begin - row.first_key) / kBlockKeys;
                 row.first_key + block * kBlockKeys < tile.end(); ++block)
                tile.attend(block, place(row, part.kv_head, block), scale);
            tile.finish([&](int64_t vector) {
                return out + (token(vector) * heads + head(vector)) * head_dim;
            });
        }
    }
}
