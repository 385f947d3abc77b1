"""A link may lose any message between prefill and decode: what has no answer is said again."""

from __future__ import annotations

from random import Random

import pytest

from protocol.sampling import SamplingParams
from tests.fake_model import generate
from tests.handoff_simulation import Request, Setup, Simulation

SAMPLING = SamplingParams(max_tokens=6)
PROMPT = list(range(10, 21))
OVERDUE = 4.5  # seconds: longer than the third repetition waits


def simulate_losing(channel: str, which: int, times: int = 1) -> tuple[Simulation, Request]:
    """One request; message number ``which`` of a channel is lost, and its repetitions too."""
    simulation = Simulation(Setup(), Random(which))
    request = simulation.submit(PROMPT, SAMPLING)
    for _ in range(which):
        step_until_next(simulation, channel)
        simulation.deliver(channel)
    for _ in range(times):
        step_until_next(simulation, channel)
        simulation.lose(channel)
        simulation.tick(OVERDUE)
    simulation.settle()
    return simulation, request


def step_until_next(simulation: Simulation, channel: str) -> None:
    """Let everything happen but the delivery of the channel's next message."""
    while channel not in simulation.channels:
        simulation.step()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("channel", "which"),
    [
        pytest.param("prefill>decode", 0, id="GrantRequest"),
        pytest.param("decode>prefill", 0, id="Grant"),
        pytest.param("prefill>decode", 1, id="Handoff"),
        pytest.param("decode>prefill", 1, id="Accepted"),
    ],
)
def test_a_lost_message_costs_time_only(channel: str, which: int, times: int) -> None:
    simulation, request = simulate_losing(channel, which, times)
    assert request.errors == []
    assert request.tokens == generate(PROMPT, SAMPLING)
    assert request.num_attempts == 1
    assert simulation.decode.admission.num_expired == 0
