"""What 8 bits change in the demo model's predictions, against bf16.

    python -m bench.quantization layers   linear layers computed in 8 bits
    python -m bench.quantization wire     KV that travelled in 8 bits

The text is pages of Python's language reference: some that the model was trained on, and some held
out. Every token is predicted from those before it on its page; of KV that travels, it is a page's
first half, as a hand-off's prompt, and the tokens of the second half are predicted on top of it.
Prints the perplexities, and the share of tokens for which both give the same most likely one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from bench.demo_corpus import read_reference
from engine.config import ModelConfig
from engine.model import Model, StepInput
from engine.weights import Quantization, load_weights, pack_weights
from kernels.attention_metadata import AttentionMetadata
from kernels.wire_quantization import Format, PackedLayout, dequantize_blocks, quantize_blocks

FOLDER = Path(__file__).parent.parent / "cli" / "demo_model"
PERIOD = 40  # of bench.train_demo_model: it held out every 40th page
MAX_TOKENS = 1024  # of a page

Predict = Callable[[list[int]], Tensor]  # log-probabilities of a page's last tokens, [., vocab]


def build(quantization: Quantization | None = None) -> Model:
    config = ModelConfig.load(FOLDER)
    loaded = load_weights(FOLDER, config, torch.bfloat16, torch.device("cpu"))
    weights, _ = pack_weights(*loaded, quantization)
    return Model(config, weights, MAX_TOKENS)


def arena() -> Tensor:
    """One block of a whole page."""
    config = ModelConfig.load(FOLDER)
    return torch.zeros(
        (1, config.num_kv_heads, config.num_layers, 2, MAX_TOKENS, config.head_dim),
        dtype=torch.bfloat16,
    )


@torch.inference_mode()
def step(model: Model, tokens: list[int], first: int, kv: Tensor) -> Tensor:
    """Log-probabilities of what follows each of ``tokens``, which stand at ``first`` and on."""
    places = torch.arange(first, first + len(tokens))
    inputs = StepInput(
        token_ids=torch.tensor(tokens),
        positions=places,
        slots=places,
        sampled=torch.arange(len(tokens)),
        num_decode=0,
        decode=None,
        prefill=AttentionMetadata.build([[0]], [len(tokens)], [first + len(tokens)], "cpu"),
    )
    return model.forward(inputs, kv).log_softmax(dim=-1)


def predict_page(model: Model, tokens: list[int]) -> Tensor:
    return step(model, tokens[:-1], 0, arena())


def predict_half(model: Model, keys: Format | None, tokens: list[int]) -> Tensor:
    """The second half, the first one's KV having travelled with ``keys`` in that format."""
    kv, half = arena(), len(tokens) // 2
    step(model, tokens[:half], 0, kv)
    if keys is not None:
        layout = PackedLayout(math.prod(kv.shape[1:4]), MAX_TOKENS, kv.shape[-1], keys)
        packed = torch.empty((1, layout.row_bytes), dtype=torch.uint8)
        quantize_blocks(kv.view(1, -1), [0], layout, packed)
        dequantize_blocks(packed, [0], layout, kv.view(1, -1))
    return step(model, tokens[half:-1], half, kv)


def compare(exact: Predict, others: Mapping[str, Predict]) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    reference = read_reference()
    for pages, first in (("held out", 0), ("trained on", PERIOD // 2)):
        losses, same, total = dict.fromkeys(["bf16", *others], 0.0), dict.fromkeys(others, 0), 0
        for page in reference[first::PERIOD]:
            tokens = tokenizer.encode(page).ids[:MAX_TOKENS]
            likelihoods = exact(tokens)
            following = torch.tensor(tokens[-len(likelihoods) :])
            total += len(following)
            losses["bf16"] += loss(likelihoods, following)
            for name, predict in others.items():
                changed = predict(tokens)
                losses[name] += loss(changed, following)
                same[name] += int((changed.argmax(dim=-1) == likelihoods.argmax(dim=-1)).sum())
        perplexity = {name: math.exp(loss / total) for name, loss in losses.items()}
        print(f"pages {pages}: {total} tokens, perplexity {perplexity['bf16']:.3f} in bf16")
        for name in others:
            change = perplexity[name] / perplexity["bf16"] - 1
            print(
                f"  {name}: perplexity {perplexity[name]:.3f} ({change:+.2%}), "
                f"same first choice {same[name] / total:.2%}"
            )


def loss(likelihoods: Tensor, following: Tensor) -> float:
    return -likelihoods.gather(1, following[:, None]).sum().item()


def main(what: Annotated[Literal["layers", "wire"], typer.Argument()] = "layers") -> None:
    model = build()
    if what == "layers":
        compare(partial(predict_page, model), {"int8": partial(predict_page, build("int8"))})
    else:
        formats: dict[str, Format] = {"int8": "int8", "fp8": "e4m3"}
        others = {name: partial(predict_half, model, keys) for name, keys in formats.items()}
        compare(partial(predict_half, model, None), others)


if __name__ == "__main__":
    typer.run(main)
