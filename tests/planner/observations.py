"""A running router's answers, made from a workload and a profile."""

from __future__ import annotations

from typing import Any

from engine.step_sums import with_steps
from planner.observed import Row
from planner.profile import WorkerProfile
from planner.workload import Lengths, generate
from protocol.messages import StepSums

BLOCK_SIZE = 16


def rows(
    count: int = 200, rate: float = 5.0, *, prompt: float = 200, output: float = 50
) -> list[Row]:
    """Requests that all took 0.1 s to their first token and 10 ms a token."""
    drawn = generate(rate=rate, count=count, prompt=Lengths(prompt, 0.5), output=Lengths(output))
    return [Row(r.arrival, r.prompt_tokens, r.output_tokens, 0, 0.1, 0.01) for r in drawn]


def workers(profile: WorkerProfile, prefill: int, decode: int) -> list[dict[str, Any]]:
    """Rows of ``GET /admin/workers`` whose timed steps follow the profile."""
    seconds = profile.latency.step_seconds
    prefill_steps = decode_steps = StepSums()
    for size in range(1, 31):
        tokens, batch = 16 * size, size % 7 + 1
        context = batch * 50 * size
        took = seconds(tokens, tokens**2, 0, 0)
        prefill_steps = with_steps(prefill_steps, (1, tokens, tokens**2), took, 1.0, 1.0)
        took = seconds(0, 0, batch, context)
        decode_steps = with_steps(decode_steps, (1, context, batch), took, 1.0, 1.0)
    load = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "total_blocks": profile.kv_tokens // BLOCK_SIZE,
        "prefill_steps": prefill_steps.model_dump(),
        "decode_steps": decode_steps.model_dump(),
    }
    return [
        {
            "id": f"{role}-{index}",
            "role": role,
            "state": "serving",
            "block_size": BLOCK_SIZE,
            "block_wire_bytes": BLOCK_SIZE,
            "load": load,
        }
        for role, number in (("prefill", prefill), ("decode", decode))
        for index in range(number)
    ]
