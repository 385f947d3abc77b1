"""Write a Qwen3 checkpoint as GGUF: ``export_gguf.py FOLDER FILE bf16|q8_0``.

No tokenizer goes along: the engines get token ids. Norms are kept in float32, as llama.cpp wants.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf.quants import quantize

NAMES = {  # of a layer's matrices
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def main(folder: Path, out: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in _tensors(folder):
        if config.get("tie_word_embeddings") and name.startswith("lm_head"):
            continue
        _add(writer, _gguf_name(name), bits, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and bf16 bit patterns ``[...] uint16``; numpy has no bf16 of its own."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = numpy.memmap(path, numpy.uint8, "r", 8 + size)
        header.pop("__metadata__", None)
        for name, about in header.items():
            if about["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {about['dtype']}, not BF16")
            start, end = about["data_offsets"]
            yield name, data[start:end].view(numpy.uint16).reshape(about["shape"])


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in WHOLE_NAMES:
        return f"{WHOLE_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _add(writer: gguf.GGUFWriter, name: str, bits: Any, kind: str) -> None:
    values = (bits.astype(numpy.uint32) << 16).view(numpy.float32)
    if bits.ndim == 1:
        writer.add_tensor(name, values)
    elif kind == "q8_0":
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(values, q8_0), raw_dtype=q8_0)
    else:
        raw = numpy.ascontiguousarray(bits).view(numpy.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
