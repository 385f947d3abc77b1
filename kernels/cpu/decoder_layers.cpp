// All layers of a decode step in one call: the library's own functions in the order in which
// engine/model.py calls them for other steps, with the same result.

#include <memory>

#include "kernels.h"

namespace {

using namespace kvferry;

// These structures are those of decoder_layers.py.

// A weight in panels; kernels/linear.py defines them.
struct Matrix {
    const uint32_t* panels;
    const float* scales;  // of 8-bit integers; null: the panels are bf16
    const int32_t* totals;
    const void* bias;  // or null
    int64_t inputs, outputs;
};

struct Layer {
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;
    Matrix qkv, output, gate_up, down;
    int64_t window;
};

struct Model {
    const Layer* layers;
    int64_t num_layers, dtype;
    float eps, scale;
};

struct Step {
    int64_t rows;
    void* residual;  // [rows, hidden]: the embeddings at first
    void* branch;    // [rows, hidden]: what the last layer adds to the residual
    const float *cos, *sin;
    const int64_t* slots;
    const int32_t* tables;
    int64_t table_width;
    const int32_t* contexts;
    char* kv;  // [blocks, kv heads, layers, 2, block_size, head_dim]; strides in elements
    int64_t block_stride, head_stride, layer_stride, value_offset;
    int64_t kv_heads, block_size, head_dim;
};

int64_t element_bytes(const Model& model) { return model.dtype == kFloat32 ? 4 : 2; }

// Memory for rows of `width` numbers.
class Buffer {
public:
    Buffer(const Model& model, const Step& step, int64_t width)
        : bytes_(new char[step.rows * width * element_bytes(model)]) {}

    operator void*() const { return bytes_.get(); }

private:
    std::unique_ptr<char[]> bytes_;
};

void multiply(const Model& model, const Step& step, const Matrix& matrix, const void* x,
              void* out) {
    if (matrix.scales == nullptr)
        linear_bf16(static_cast<const BFloat16*>(x), matrix.inputs, matrix.panels,
                    static_cast<const BFloat16*>(matrix.bias), static_cast<BFloat16*>(out),
                    step.rows, matrix.inputs, matrix.outputs);
    else
        linear_int8(model.dtype, x, matrix.inputs, matrix.panels, matrix.scales, matrix.totals,
                    matrix.bias, out, step.rows, matrix.inputs, matrix.outputs);
}

}  // namespace

extern "C" void decoder_layers(const Model* model_at, const Step* step_at) {
    const Model& model = *model_at;
    const Step& step = *step_at;
    const Layer& first = model.layers[0];
    const int64_t hidden = first.qkv.inputs, inner = first.down.inputs;
    const int64_t attention_width = first.output.inputs, heads = attention_width / step.head_dim;
    const Buffer normed(model, step, hidden), qkv(model, step, first.qkv.outputs);
    const Buffer queries(model, step, attention_width), attended(model, step, attention_width);
    const Buffer gate_up(model, step, 2 * inner), gated(model, step, inner);
    for (int64_t index = 0; index < model.num_layers; ++index) {
        const Layer& layer = model.layers[index];
        char* const kv = step.kv + index * step.layer_stride * element_bytes(model);
        if (index == 0)
            rms_norm(model.dtype, step.residual, hidden, layer.attention_norm, model.eps, normed,
                     step.rows, hidden);
        else
            add_rms_norm(model.dtype, step.branch, hidden, step.residual, hidden,
                         layer.attention_norm, model.eps, normed, step.residual, step.rows, hidden);
        multiply(model, step, layer.qkv, normed, qkv);
        rotate_and_write(model.dtype, qkv, layer.q_norm, layer.k_norm, model.eps, step.cos,
                         step.sin, step.slots, kv, step.block_stride, step.head_stride,
                         step.value_offset, step.block_size, queries, step.rows, heads,
                         step.kv_heads, step.head_dim);
        decode_attention(model.dtype, queries, attention_width, step.head_dim, kv,
                         step.block_stride, step.head_stride, step.value_offset, step.block_size,
                         step.head_dim, step.tables, step.table_width, step.contexts, step.rows,
                         heads, step.kv_heads, model.scale, layer.window, attended);
        multiply(model, step, layer.output, attended, step.branch);
        add_rms_norm(model.dtype, step.branch, hidden, step.residual, hidden, layer.mlp_norm,
                     model.eps, normed, step.residual, step.rows, hidden);
        multiply(model, step, layer.gate_up, normed, gate_up);
        silu_mul(model.dtype, gate_up, gated, step.rows, inner);
        multiply(model, step, layer.down, gated, step.branch);
    }
}
