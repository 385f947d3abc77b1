"""Phases of a step, and the trace that a worker writes on request."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.profiling import SKIPPED_STEPS
from engine.sequence import Sequence
from protocol.sampling import SamplingParams


def test_a_trace_of_the_steps_asked_for(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    trace = tmp_path / "new" / "worker.json.gz"
    engine = Engine.load(
        EngineConfig(
            model=str(checkpoint("qwen3")),
            num_blocks=64,
            max_model_len=64,
            profile=trace,
            profile_steps=3,
        )
    )
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    sequence = Sequence("0", [5], 1, sampling, [0, 1, 2, 3])
    for step in range(SKIPPED_STEPS + 5):
        assert trace.exists() == (step >= SKIPPED_STEPS + 3)
        batch = Batch((BatchRow(sequence, sequence.num_computed, 1),))
        sequence.token_ids += engine.run(batch).token_ids
        sequence.num_computed += 1
        assert engine.phase_seconds.keys() == {"prepare", "forward", "sample"}
        assert all(seconds > 0 for seconds in engine.phase_seconds.values())
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    layers = engine.model_config.num_layers
    assert [names.count(name) for name in ("prepare", "forward", "sample")] == [3, 3, 3]
    assert names.count("attention") == 3 * layers
