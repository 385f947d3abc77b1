"""What 8-bit layers change in the demo model's predictions, against bf16.

    python -m bench.quantization

Every token of some pages of Python's language reference is predicted from those before it on its
page: pages that the model was trained on, and pages held out. Prints the perplexities, and the
share of tokens for which both give the same most likely one.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.demo_corpus import read_reference
from engine.config import ModelConfig
from engine.model import Model, StepInput
from engine.weights import Quantization, load_weights, pack_weights
from kernels.attention_metadata import AttentionMetadata

FOLDER = Path(__file__).parent.parent / "cli" / "demo_model"
PERIOD = 40  # of bench.train_demo_model: it held out every 40th page
MAX_TOKENS = 1024  # of a page


def build(quantization: Quantization | None) -> Model:
    config = ModelConfig.load(FOLDER)
    loaded = load_weights(FOLDER, config, torch.bfloat16, torch.device("cpu"))
    weights, _ = pack_weights(*loaded, quantization)
    return Model(config, weights, MAX_TOKENS)


@torch.inference_mode()
def predict(model: Model, tokens: list[int]) -> Tensor:
    """Log-probabilities of what follows each token but the last, [tokens - 1, vocab]."""
    config, count = ModelConfig.load(FOLDER), len(tokens) - 1
    kv = torch.zeros(
        (1, config.num_kv_heads, config.num_layers, 2, MAX_TOKENS, config.head_dim),
        dtype=torch.bfloat16,
    )
    places = torch.arange(count)
    step = StepInput(
        token_ids=torch.tensor(tokens[:-1]),
        positions=places,
        slots=places,
        sampled=places,
        num_decode=0,
        decode=None,
        prefill=AttentionMetadata.build([[0]], [count], [count], "cpu"),
    )
    return model.forward(step, kv).log_softmax(dim=-1)


def main() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    models = build(None), build("int8")
    reference = read_reference()
    for name, first in (("held out", 0), ("trained on", PERIOD // 2)):
        losses, same, total = [0.0, 0.0], 0, 0
        for page in reference[first::PERIOD]:
            tokens = tokenizer.encode(page).ids[:MAX_TOKENS]
            following = torch.tensor(tokens[1:])
            predicted = [predict(model, tokens) for model in models]
            for index, likelihoods in enumerate(predicted):
                losses[index] -= likelihoods.gather(1, following[:, None]).sum().item()
            first_choices = [likelihoods.argmax(dim=-1) for likelihoods in predicted]
            same += int((first_choices[0] == first_choices[1]).sum())
            total += len(following)
        exact, quantised = (math.exp(loss / total) for loss in losses)
        print(
            f"pages {name}: {total} tokens, perplexity {exact:.3f} in bf16, {quantised:.3f} in "
            f"int8 ({quantised / exact - 1:+.2%}), same first choice {same / total:.2%}"
        )


if __name__ == "__main__":
    main()
