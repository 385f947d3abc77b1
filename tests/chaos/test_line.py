"""What bad lines do to packets, and that the switch really does it."""

from __future__ import annotations

import itertools
import math
import random
import socket
import time
from collections.abc import Iterator

import pytest

from tests.chaos.line import Condition, Line
from tests.chaos.switch import Switch

MANY = 20_000
SIZE = 1500  # bytes
HERE, THERE = "198.18.0.1", "198.18.0.2"


def arrivals(condition: Condition, times: list[float]) -> list[float | None]:
    line = Line(condition, random.Random(1))
    return [line.arrival(now, SIZE) for now in times]


def test_a_perfect_line_takes_no_time() -> None:
    assert arrivals(Condition(), [0.0, 0.0, 7.5]) == [0.0, 0.0, 7.5]


def test_nothing_passes_a_cut() -> None:
    assert arrivals(Condition(cut=True), [0.0, 1.0]) == [None, None]


@pytest.mark.parametrize("loss", [0.01, 0.05])
def test_the_share_that_is_lost(loss: float) -> None:
    lost = arrivals(Condition(loss=loss), [0.0] * MANY).count(None)
    assert abs(lost - MANY * loss) < 4 * math.sqrt(MANY * loss)


def test_delayed_packets_keep_their_order_within_bounds() -> None:
    times = [0.001 * i for i in range(MANY)]
    came = [t for t in arrivals(Condition(delay=0.02, jitter=0.01), times) if t is not None]
    assert len(came) == MANY
    assert came == sorted(came)
    delays = [arrived - sent for sent, arrived in zip(times, came, strict=True)]
    assert 0.01 <= min(delays) < max(delays) <= 0.03 + 1e-9


def test_some_overtake_all_that_wait() -> None:
    came = arrivals(Condition(delay=0.02, overtaking=0.1), [0.0] * MANY)
    first = sum(arrived == 0.0 for arrived in came)
    assert abs(first - 0.1 * MANY) < 4 * math.sqrt(0.1 * MANY)
    assert all(arrived in (0.0, 0.02) for arrived in came)


def test_a_narrow_line_loses_what_would_wait_for_too_long() -> None:
    """A second's worth of packets at once: what the queue holds leaves, one after the other."""
    rate = 1000.0 * SIZE
    came = arrivals(Condition(rate=rate, queue=0.01), [0.0] * 1000)
    passed = [arrived for arrived in came if arrived is not None]
    assert passed == pytest.approx([0.001 * (i + 1) for i in range(len(passed))])
    assert len(passed) in (10, 11)


@pytest.fixture
def ends() -> Iterator[dict[str, tuple[socket.socket, socket.socket]]]:
    """Sockets that stand in for devices, by the host's address: the switch's end, the host's."""
    pairs = {a: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for a in (HERE, THERE)}
    for end in itertools.chain(*pairs.values()):
        end.setblocking(False)
    yield pairs
    for end in itertools.chain(*pairs.values()):
        end.close()


def test_the_switch_goes_by_addresses_and_counts_what_is_lost(
    ends: dict[str, tuple[socket.socket, socket.socket]],
) -> None:
    devices = {socket.inet_aton(address): pair[0].fileno() for address, pair in ends.items()}
    switch, here, there = Switch(devices, random.Random(1)), ends[HERE][1], ends[THERE][1]
    packet = b"\x45" + bytes(11) + socket.inet_aton(HERE) + socket.inet_aton(THERE) + b"content"

    def arrives(sent: bytes) -> bool:
        here.send(sent)
        switch.relay()
        try:
            return there.recv(100) == sent
        except BlockingIOError:
            return False

    assert arrives(packet)
    switch.set_lines([(HERE, THERE, {"cut": True})])
    assert not arrives(packet)
    assert switch.num_lost == 1
    switch.set_lines([(THERE, HERE, {"cut": True})])
    assert arrives(packet)
    assert not arrives(b"\x60" + packet[1:])  # IPv6
    switch.set_lines([(HERE, THERE, {"delay": 0.05})])
    assert not arrives(packet)
    assert 0 < (switch.milliseconds() or 0) <= 50
    time.sleep(0.05)
    switch.relay()
    assert there.recv(100) == packet
