"""Engines alone: decode and prefill rates of one model, on the same prompts and cores.

Each engine runs in its own environment's interpreter (``scripts/engine_*.py``), one at a time.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bench.peers.compare import Measure, Peer
from bench.peers.convert import Format, convert, converted
from bench.peers.install import Site
from bench.peers.process import running

SCRIPTS = Path(__file__).parent / "scripts"
REPOSITORY = Path(__file__).parents[2]
TOKEN_BYTES = 2  # of a number in the KV cache
START_TIMEOUT = 240.0  # seconds; vLLM compiles the model the first time
MARGIN = 256  # tokens a sequence may generate in a decode case, and a page of transformers
MOST_CONTEXT = 16 << 10  # tokens of all sequences of a case


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt at a time, from the request to its first token."""

    tokens: int
    repeats: int
    kind: str = "prefill"

    def __str__(self) -> str:
        return f"prefill {self.tokens}"

    @property
    def kv_tokens(self) -> int:
        """Room the case needs."""
        return self.tokens + MARGIN


@dataclass(frozen=True, slots=True)
class Decode:
    """So many sequences at once, each ``context`` tokens long when the clock starts."""

    sequences: int
    context: int
    steps: int = 12  # of each of the three windows
    kind: str = "decode"

    def __str__(self) -> str:
        return f"decode {self.sequences} @ {self.context}"

    @property
    def kv_tokens(self) -> int:
        """Room the case needs."""
        return self.sequences * (self.context + MARGIN)


@dataclass(frozen=True, slots=True)
class Engine:
    """How one row of the table is run."""

    name: str
    script: str
    environment: str | None  # of ``install``; None: kvferry's own
    converted: Format | None = None  # what the model is converted to first
    weights: Literal["16-bit", "8-bit"] = "16-bit"


ENGINES = (
    Engine("kvferry", "engine_kvferry.py", None),
    Engine("kvferry int8", "engine_kvferry.py", None, weights="8-bit"),
    Engine("openvino 16-bit", "engine_openvino.py", "openvino", "openvino-fp16"),
    Engine("openvino int8", "engine_openvino.py", "openvino", "openvino-int8", "8-bit"),
    Engine("vllm", "engine_vllm.py", "vllm"),
    Engine("llama.cpp bf16", "engine_llama_cpp.py", "llama_cpp", "gguf-bf16"),
    Engine("llama.cpp q8_0", "engine_llama_cpp.py", "llama_cpp", "gguf-q8_0", "8-bit"),
    Engine("transformers", "engine_transformers.py", "transformers"),
)


def cases(contexts: Sequence[int]) -> list[Prefill | Decode]:
    """What every engine is measured on, the quick ones first.

    Prompts of many long sequences take some engines ten minutes, so there are none of those.
    """
    decodes = [Decode(n, context) for context in contexts for n in (1, 8, 32)]
    decodes = [case for case in decodes if case.sequences * case.context <= MOST_CONTEXT]
    return sorted([Prefill(512, 3), Prefill(4096, 1), *decodes], key=lambda case: case.kv_tokens)


def peers(model: Path, site: Site, kv_tokens: int) -> list[Peer]:
    """The engines as rows, each with room for so many tokens of KV."""
    return [
        Peer(
            engine.name,
            partial(_start, engine, model, site, kv_tokens),
            partial(_prepare, engine, model, site),
        )
        for engine in ENGINES
    ]


def _prepare(engine: Engine, model: Path, site: Site) -> None:
    if engine.environment is not None:
        site.require(engine.environment)
    if engine.converted is not None:
        convert(model, engine.converted, site)


@contextlib.contextmanager
def _start(
    engine: Engine, model: Path, site: Site, kv_tokens: int, bound: float
) -> Iterator[tuple[dict[str, Any], Measure]]:
    config = json.loads((model / "config.json").read_text())
    setup = {
        "model": str(converted(model, engine.converted, site) if engine.converted else model),
        "weights": engine.weights,
        "threads": len(site.cores),
        "vocab_size": config["vocab_size"],
        "kv_tokens": kv_tokens,
        "kv_token_bytes": _kv_token_bytes(config),
    }
    python = site.python(engine.environment) if engine.environment else sys.executable
    command = [python, str(SCRIPTS / engine.script), json.dumps(setup)]
    log = site.logs / f"{engine.name.replace(' ', '-')}.log"
    with running(command, _variables(engine, site), site.cores, log, answers=True) as process:
        about = process.ask(None, START_TIMEOUT)
        yield about, process.measures("tokens/s", bound)


def _kv_token_bytes(config: dict[str, Any]) -> int:
    heads = config["num_key_value_heads"] * config["head_dim"]
    return int(2 * config["num_hidden_layers"] * heads * TOKEN_BYTES)


def _variables(engine: Engine, site: Site) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": str(len(site.cores)), "HF_HUB_OFFLINE": "1"}
    if engine.environment == "vllm":  # stepped in one process, which its launcher does not bind
        places = ",".join(map(str, site.cores))
        variables["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{places}]"
        variables["KMP_BLOCKTIME"] = "1"
        return variables | vllm_variables(site, site.cores)
    # GNU OpenMP's threads spin for microseconds, then sleep: as fast as by default on an idle
    # machine, and many times faster beside anything else that runs
    variables["GOMP_SPINCOUNT"] = "5000"
    return variables if engine.environment else variables | {"PYTHONPATH": str(REPOSITORY)}


def vllm_variables(site: Site, cores: Sequence[int]) -> dict[str, str]:
    """Intel's OpenMP preloaded, as vLLM's guide for CPUs asks; threads bound to ``cores``."""
    return {
        "LD_PRELOAD": str(site.folder / "vllm" / "lib" / "libiomp5.so"),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CACHE_ROOT": str(site.folder / "vllm" / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
