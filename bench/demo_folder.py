"""Writes the demo model's checkpoint folder: Hugging Face's files, the model card, the licence."""

import json
import os
import platform
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo_corpus import ASSISTANT, BOS, CHAT_TEMPLATE, END, EOS, SYSTEM, USER, render
from demo_llama import Llama, ModelConfig
from safetensors.torch import save
from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"
PASSES = "training.json"
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

{commands}

fp32 weights under bf16 autocast on a CPU, Muon for the layers' matrices and AdamW for the rest, a
cosine decay for each pass. The figures of each pass, as `training.json` has them:

{table}

`train_loss` is the mean of the last 50 steps;
`held_out_page_loss` is measured on pages of the language reference left out of the training.
`recall` is the share of answers reproduced word for word by greedy decoding, over every tenth name
the model was taught; `recall_rephrased` asks in a phrasing that the training never showed.

## Samples

Greedy, as the script produced them.

{samples}
"""


def write_folder(
    out: Path, c: ModelConfig, model: Llama, tokenizer: Tokenizer, passes: list[dict[str, Any]]
) -> None:
    """Write every file of the checkpoint; each one appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)

    def put(name: str, content: bytes | str | dict[str, object] | list[dict[str, Any]]) -> None:
        if isinstance(content, dict | list):
            content = json.dumps(content, indent=2) + "\n"
        data = content.encode() if isinstance(content, str) else content
        partial = out / f".{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, out / name)

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
    put(PASSES, passes)
    put(WEIGHTS, save(weights, metadata={"format": "pt"}))
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
    titles = ["figure", *(f"pass {number}" for number in range(1, len(passes) + 1))]
    names = [name for name in passes[-1] if name != "command"]
    rows = [[name, *(str(one.get(name, "")) for one in passes)] for name in names]
    card = CARD.format(
        millions=passes[-1]["parameters"] / 1e6,
        python=platform.python_version(),
        copyright=sys.copyright.splitlines()[0],
        eos=EOS,
        commands="\n".join(f"    {one['command']}" for one in passes),
        table="\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows]),
        samples="\n\n".join(
            f"**{title}**\n\n```text\n{model.complete(tokenizer, prompt, EOS)}\n```"
            for title, prompt in samples
        ),
    )
    put("README.md", "\n".join(line.rstrip() for line in card.splitlines()) + "\n")
