"""Train the bundled demo model: a four-million-parameter Llama that recites Python's documentation.

Trains the tokenizer and the transformer on the CPU and writes a folder in the published Hugging
Face format, with a model card. The corpus is `demo_corpus`, the architecture `demo_llama`; nothing
of kvferry and no transformers is imported.

    python bench/train_demo_model.py --out DIR --steps 2000
    python bench/train_demo_model.py --out DIR --steps 300 --resume --length 2048 --rate 0.4
    python bench/train_demo_model.py --out DIR --steps 150 --resume --rate 0.15

The second pass teaches the positions beyond 512, the third refreshes short chats.
The result depends on the seed, the steps, the threads and Python's version alone, as far as torch
is deterministic on the machine; `--minutes` is a safety stop that ends the schedule early.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import (
    ASSISTANT,
    BOS,
    EOS,
    HELD_OUT_QUESTION,
    QUESTIONS,
    ask,
    epoch,
    read_library,
    read_reference,
    render,
    train_tokenizer,
)
from demo_folder import PASSES, WEIGHTS, write_folder
from demo_llama import Llama, ModelConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What a run does: the command line, and the constants of the recipe."""

    out: Path
    steps: int
    seed: int
    minutes: float
    threads: int
    length: int
    rate: float  # relative to the two below
    resume: bool
    tokens_per_step: int = 4096
    hidden_rate: float = 0.02  # Muon, on the layers' matrices
    other_rate: float = 3e-3  # AdamW, on embeddings and norms

    def command(self) -> str:
        """The pass as a command line over the bundled folder, all that matters spelled out."""
        more = f"--length {self.length} --rate {self.rate:g} --seed {self.seed}"
        start = "python bench/train_demo_model.py --out cli/demo_model"
        return f"{start}{' --resume' * self.resume} --steps {self.steps} {more}"


def stream(make: Callable[[], list[str]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The token ids of one epoch after another, without end."""
    while True:
        encoded = tokenizer.encode_batch(make(), add_special_tokens=False)
        yield [token for document in encoded for token in document.ids]


def loss_of(model: Llama, tokens: Tensor, length: int) -> Tensor:
    """Mean next-token loss of a flat run of tokens, cut in rows of `length`."""
    rows = (len(tokens) - 1) // length * length
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:rows].view(-1, length))
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[1 : rows + 1])


@torch.inference_mode()
def evaluate(model: Llama, documents: list[str], tokenizer: Tokenizer) -> float:
    tokens = torch.tensor(next(stream(lambda: documents, tokenizer)))
    return float(loss_of(model, tokens[: 64 * 512 + 1], 512))


@torch.inference_mode()
def recall(model: Llama, chats: list[list[tuple[str, str]]], tokenizer: Tokenizer) -> float:
    """The share of (question, answer) chats whose answer greedy decoding gives word for word."""
    exact = 0
    for chat in chats:
        whole = tokenizer.encode(render(chat), add_special_tokens=False).ids
        asked = tokenizer.encode(render(chat[:1]) + ASSISTANT, add_special_tokens=False).ids
        guesses = model(torch.tensor([whole[:-1]]))[0].argmax(dim=-1).tolist()
        exact += guesses[len(asked) - 1 :] == whole[len(asked) :]
    return exact / len(chats)


def rate_at(progress: float) -> float:
    """Warm-up over the first 2 %, then a cosine to 1 %."""
    return min(progress / 0.02 + 0.01, 0.505 + 0.495 * math.cos(math.pi * progress))


def train(plan: Plan, c: ModelConfig) -> None:
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    rng = random.Random(plan.seed)
    facts, reference = read_library(), read_reference()
    unseen, pages = [BOS + page + EOS for page in reference[::40]], reference[:]
    del pages[::40]
    pages += [fact.page() for fact in facts]
    familiar = [ask(fact, QUESTIONS[0], fact.name) for fact in facts[::10]]
    rephrased = [ask(fact, HELD_OUT_QUESTION, fact.name) for fact in facts[::10]]
    model = Llama(c)
    passes: list[dict[str, Any]] = []
    if plan.resume:
        passes = json.loads((plan.out / PASSES).read_text())
        tokenizer = Tokenizer.from_file(str(plan.out / "tokenizer.json"))
        model.load_state_dict({k: v.float() for k, v in load_file(plan.out / WEIGHTS).items()})
    else:
        tokenizer = train_tokenizer(epoch(facts, pages, random.Random(0)), c.vocab_size)
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=plan.hidden_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (plan.rate * plan.hidden_rate, plan.rate * plan.other_rate)
    source, pending, losses = stream(lambda: epoch(facts, pages, rng), tokenizer), list[int](), []
    started, step, epochs, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1:
        while len(pending) <= plan.tokens_per_step:
            pending, epochs = pending + next(source), epochs + 1
        tokens, pending = pending[: plan.tokens_per_step + 1], pending[plan.tokens_per_step :]
        loss = loss_of(model, torch.tensor(tokens), plan.length)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(progress)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        progress = max(step / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        if step % 50 == 0:
            print(f"step {step}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
        if step % 500 == 0 or progress >= 1:
            figures = {
                "command": plan.command(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": step * plan.tokens_per_step,
                "steps": step,
                "epochs": epochs,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "train_loss": round(sum(losses[-50:]) / len(losses[-50:]), 3),
                "held_out_page_loss": round(evaluate(model, unseen, tokenizer), 3),
                "recall": round(recall(model, familiar, tokenizer), 3),
                "recall_rephrased": round(recall(model, rephrased, tokenizer), 3),
            }
            print(json.dumps(figures), flush=True)
            write_folder(plan.out, c, model, tokenizer, [*passes, figures])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 4096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="end the schedule after this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--rate", type=float, default=1.0, help="scale of the learning rates")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    train(Plan(**vars(parser.parse_args())), ModelConfig())


if __name__ == "__main__":
    main()
