"""What the engine's thread measures of its steps."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from engine.batch import Batch, BatchRow, StepOutput
from engine.sequence import Sequence
from engine.thread import EngineThread
from protocol.sampling import Grammar, SamplingParams


class NoModel:
    """Samples token 1 for every row."""

    @property
    def phase_seconds(self) -> Mapping[str, float]:
        return {"prepare": 0.25, "forward": 2.0}

    def run(self, batch: Batch) -> StepOutput:
        return StepOutput([1] * len(batch.sampling_rows))

    def expect(self, grammar: Grammar) -> None:
        raise AssertionError("no request has one")


def new_batch() -> Batch:
    sequence = Sequence("request", [5], 1, SamplingParams(max_tokens=10))
    return Batch((BatchRow(sequence, 0, 1),))


async def test_steps_phases_and_gaps() -> None:
    registry = CollectorRegistry()
    thread = EngineThread(NoModel(), registry)

    def measured(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvferry_engine_{name}", labels)

    first, second = new_batch(), new_batch()
    await thread.run(first)
    await thread.run(second)  # another request: what lies between is no gap
    assert measured("phase_seconds_count", phase="gap") is None
    await thread.run(Batch(second.rows + first.rows))
    assert measured("phase_seconds_count", phase="gap") == 1
    for _ in range(50):  # each may get the address of the one before
        await thread.run(new_batch())
    assert measured("phase_seconds_count", phase="gap") == 1
    assert measured("phase_seconds_sum", phase="prepare") == 53 * 0.25
    assert measured("phase_seconds_sum", phase="forward") == 53 * 2.0
    assert measured("step_seconds_count") == 53
    thread.close()
