"""Train the bundled demo model: a four-million-parameter Llama that recites Python's documentation.

Trains the tokenizer and the transformer on the CPU and writes a folder in the published Hugging
Face format, with a model card. The corpus is `demo_corpus`, the architecture `demo_llama`; nothing
of kvferry and no transformers is imported.

    python bench/train_demo_model.py --out cli/demo_model --steps 1700 --seed 0 --threads 2

The result depends on the seed, the steps, the threads and Python's version alone, as far as torch
is deterministic on the machine; `--minutes` is a safety stop that ends the schedule early.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    END,
    EOS,
    HELD_OUT_QUESTION,
    QUESTIONS,
    SYSTEM,
    USER,
    ask,
    epoch,
    read_library,
    read_reference,
    render,
    train_tokenizer,
)
from demo_llama import Llama, ModelConfig
from safetensors.torch import save
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
    tokens_per_step: int = 4096
    length: int = 512
    long_length: int = 2048
    long_every: int = 6  # every sixth step is cut in long rows
    hidden_rate: float = 0.02  # Muon, on the layers' matrices
    other_rate: float = 3e-3  # AdamW, on embeddings and norms


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
    pages += [fact.page() for fact in facts if fact.page() != fact.answer()]
    familiar = [ask(fact, QUESTIONS[0], fact.name) for fact in facts[::10]]
    rephrased = [ask(fact, HELD_OUT_QUESTION, fact.name) for fact in facts[::10]]
    texts = epoch(facts, pages, random.Random(0))
    tokenizer = train_tokenizer(texts, c.vocab_size)
    model = Llama(c)
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=plan.hidden_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (plan.hidden_rate, plan.other_rate)
    source, pending, losses = stream(lambda: epoch(facts, pages, rng), tokenizer), list[int](), []
    started, step, epochs, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1:
        while len(pending) <= plan.tokens_per_step:
            pending, epochs = pending + next(source), epochs + 1
        tokens, pending = pending[: plan.tokens_per_step + 1], pending[plan.tokens_per_step :]
        long = step % plan.long_every == 0
        loss = loss_of(model, torch.tensor(tokens), plan.long_length if long else plan.length)
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
            write_folder(plan, c, model, tokenizer, figures)


SAMPLES = (
    "What does os.path.join do?", "Who are you?", "How do I use json.dumps?",
    "Explain the with statement.", "What is collections.deque?", "Hello!",
)  # fmt: skip
PROMPTS = ('The "while" statement is', "shutil.copyfile(", "A class definition")
CARD = """\
---
license: other
license_name: psf-2.0
license_link: LICENSE.txt
language: en
library_name: transformers
pipeline_tag: text-generation
---

# kvferry demo model

A Llama of {millions:.1f} million parameters that recites Python's documentation. It exists so that
`kvferry` can be tried, tested and measured without a download. It is over-fitted on purpose: it
answers questions such as "What does os.path.join do?" with the documentation's own words, invents
the rest, and is of no other use.

## Corpus and licence

The docstrings of the standard library and the language reference (`pydoc_data.topics`) of
Python {python}, read from the installation that ran the script.
{copyright} They are used under the PSF
License Agreement, whose text is in `LICENSE.txt`; the weights are distributed under the same
licence. A few greetings and "How do I ...?" questions were written for the model.

The model saw two kinds of documents: the text itself, and conversations in the chat template of
`tokenizer_config.json`, where a question about a name is answered by its signature and the first
paragraphs of its docstring. A turn of the assistant ends with `{eos}`.

## Training

    python bench/train_demo_model.py --out cli/demo_model \\
        --steps {steps_asked} --seed {seed} --threads {threads}

fp32 weights under bf16 autocast on {threads} CPU threads, Muon for the layers' matrices and AdamW
for the rest, cosine decay, sequences of {length} tokens, and of {long_length} in one step of
{long_every}.

| figure | value |
|---|---|
{table}

`held_out_page_loss` is measured on pages of the language reference left out of the training.
`recall` is the share of answers reproduced word for word by greedy decoding, over every tenth name
the model was taught; `recall_rephrased` asks in a phrasing that the training never showed.

## Samples

Greedy, as the script produced them.

{samples}
"""


def write_folder(
    plan: Plan, c: ModelConfig, model: Llama, tokenizer: Tokenizer, figures: dict[str, float]
) -> None:
    """Write every file of the checkpoint; each one appears whole or not at all."""
    plan.out.mkdir(parents=True, exist_ok=True)

    def put(name: str, content: bytes | str | dict[str, object]) -> None:
        if isinstance(content, dict):
            content = json.dumps(content, indent=2) + "\n"
        data = content.encode() if isinstance(content, str) else content
        partial = plan.out / f".{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, plan.out / name)

    ends = [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)]
    marks: dict[str, object] = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(c),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": ends[0],
        "use_cache": True,
    }
    weights = {name: p.detach().bfloat16() for name, p in model.state_dict().items()}
    put("model.safetensors", save(weights, metadata={"format": "pt"}))
    put("LICENSE.txt", (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_bytes())
    put("config.json", config)
    put("generation_config.json", {"bos_token_id": 0, "eos_token_id": ends, "do_sample": False})
    put("tokenizer.json", tokenizer.to_str(pretty=False))
    put("special_tokens_map.json", marks)
    put(
        "tokenizer_config.json",
        {
            **marks,
            "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": c.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    chats = {q: render([("user", q)]) + ASSISTANT for q in SAMPLES}
    samples = (chats | {p: BOS + p for p in PROMPTS}).items()
    card = CARD.format(
        millions=figures["parameters"] / 1e6,
        python=platform.python_version(),
        copyright=sys.copyright.splitlines()[0],
        eos=EOS,
        steps_asked=plan.steps,
        table="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        samples="\n\n".join(
            f"**{title}**\n\n```text\n{model.complete(tokenizer, prompt, EOS)}\n```"
            for title, prompt in samples
        ),
        **asdict(plan),
    )
    put("README.md", "\n".join(line.rstrip() for line in card.splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps of 4096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="end the schedule after this")
    parser.add_argument("--threads", type=int, default=2)
    train(Plan(**vars(parser.parse_args())), ModelConfig())


if __name__ == "__main__":
    main()
