"""What the planner knows of one worker: its latency, its KV memory and its link. A JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.latency import DecodeFit, Latency, LinearLatency, PrefillFit
from protocol.errors import ConfigError

SHUFFLE = 7919  # a prime: no number of latencies below it divides it


class Link(BaseModel):
    """The path of KV from a prefill to a decode worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_second: Annotated[float, Field(gt=0)]
    latency: Annotated[float, Field(ge=0)]  # seconds from the last byte sent to admission
    latencies: tuple[Annotated[float, Field(ge=0)], ...] = ()  # measured ones, in its place

    def delay(self, transfer: int) -> float:
        """The latency of the transfer so numbered. Measured ones take turns, as if shuffled."""
        if not self.latencies:
            return self.latency
        return self.latencies[transfer * SHUFFLE % len(self.latencies)]


class WorkerProfile(BaseModel):
    """One worker; all workers of a plan are alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    latency: Latency
    kv_tokens: Annotated[int, Field(gt=0)]  # that fit in a worker's KV memory
    kv_bytes_per_token: Annotated[int, Field(gt=0)]  # that travel
    link: Link
    overhead: Annotated[float, Field(ge=0)] = 0.0  # seconds of a first token beside queue and steps

    @classmethod
    def load(cls, source: str) -> WorkerProfile:
        """A published profile by its name, or a file that ``kvferry profile`` wrote.

        Raises ConfigError if it is neither, naming the field at fault.
        """
        if source in PUBLISHED:
            return PUBLISHED[source]
        try:
            return cls.model_validate_json(Path(source).read_text())
        except OSError as error:
            known = ", ".join(PUBLISHED)
            message = f"{source} is neither a readable file nor one of {known}"
            raise ConfigError(message) from error
        except ValidationError as error:
            raise ConfigError(f"{source} is no worker profile: {error}") from error


# Llama-3.1-8B in bf16 on one H200: fitted to times summed over published tables of each operator
# (no norms, no sampling, no host): a lower bound. 141 GB less weights; 400 Gb/s link.
_H200_LLAMA_8B = WorkerProfile(
    name="h200-llama-3.1-8b",
    latency=LinearLatency(
        prefill=PrefillFit(fixed=2.30e-3, per_token=1.626e-5, per_square=6.84e-10),
        decode=DecodeFit(fixed=4.66e-3, per_context=3.03e-8, per_row=9.2e-6),
    ),
    kv_tokens=850_000,
    kv_bytes_per_token=131_072,  # 32 layers · 8 heads · 128 · 2 (K, V) · 2 bytes
    link=Link(bytes_per_second=40e9, latency=2e-3),
)

# OPT-13B in fp16 on one A100-80G: the fits and the KV capacity published with DistServe's
# simulator (Zhong et al., OSDI '24), decode's for fewer than 95 rows; theirs for more is left out.
_A100_OPT_13B = WorkerProfile(
    name="a100-opt-13b",
    latency=LinearLatency(
        prefill=PrefillFit(fixed=1.8103e-2, per_token=1.0191e-4, per_square=7.1223e-9),
        decode=DecodeFit(fixed=1.9935e-2, per_context=6.2694e-7, per_row=3.8507e-5),
    ),
    kv_tokens=66_144,
    kv_bytes_per_token=819_200,  # 40 layers · 40 heads · 128 · 2 (K, V) · 2 bytes
    link=Link(bytes_per_second=200e9, latency=2e-3),
)

PUBLISHED = {profile.name: profile for profile in (_H200_LLAMA_8B, _A100_OPT_13B)}
