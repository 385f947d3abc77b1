"""A switch in user space: each host's packets come and go through a TUN device.

    python -m tests.chaos.switch SEED DEVICE=ADDRESS...

Prints ``ready`` when the devices exist, or why they cannot. Then every line on standard input is
the JSON of all lines that are not perfect, ``[[from, to, condition], ...]`` by address, and is
answered by the number of packets lost so far. Ends when standard input does, and the devices with
it.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import math
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tests.chaos.line import Condition, Line

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA  # these three: linux/if_tun.h
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000  # packets alone, no header before them
MAX_PACKET = 1 << 16
AT_ONCE = 64  # packets of one host, before it is another's turn

Address = bytes  # of IPv4, 4 bytes


def open_device(name: str) -> int:
    """A TUN device's descriptor, not blocking; the device ends with it. Raises OSError."""
    descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(descriptor, TUNSETIFF, request)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Switch:
    """Takes packets from hosts' devices, by address, to one another."""

    def __init__(self, devices: Mapping[Address, int], rng: random.Random) -> None:
        """``devices`` are descriptors that do not block: one packet for each read and write."""
        self.num_lost = 0  # packets
        self._devices = devices
        self._rng = rng
        self._lines: dict[tuple[Address, Address], Line] = {}  # all others are perfect
        self._under_way: list[tuple[float, int, int, bytes]] = []  # heap: due, number, device
        self._numbers = itertools.count()

    def set_lines(self, lines: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Set the conditions of all lines that are not perfect, by address: from, to, condition."""
        self._lines = {
            (socket.inet_aton(source), socket.inet_aton(destination)): Line(
                Condition(**condition), self._rng
            )
            for source, destination, condition in lines
        }

    def milliseconds(self) -> int | None:
        """Until a packet under way arrives; None if there is none."""
        if not self._under_way:
            return None
        return math.ceil(1000 * max(0.0, self._under_way[0][0] - time.monotonic()))

    def relay(self) -> None:
        """Take what hosts have sent, and deliver what is due."""
        for descriptor in self._devices.values():
            for _ in range(AT_ONCE):
                try:
                    packet = os.read(descriptor, MAX_PACKET)
                except BlockingIOError:
                    break
                self._forward(packet)
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, to, packet = heapq.heappop(self._under_way)
            self._deliver(to, packet)

    def _forward(self, packet: bytes) -> None:
        source, destination = packet[12:16], packet[16:20]
        if packet[0] >> 4 != 4 or destination not in self._devices:
            return  # IPv6 looking for routers, or to nobody
        to, line = self._devices[destination], self._lines.get((source, destination))
        if line is None:
            self._deliver(to, packet)
        elif (due := line.arrival(time.monotonic(), len(packet))) is None:
            self.num_lost += 1
        else:
            heapq.heappush(self._under_way, (due, next(self._numbers), to, packet))

    def _deliver(self, to: int, packet: bytes) -> None:
        try:
            os.write(to, packet)
        except OSError:  # the host's end is not up, or has no room
            self.num_lost += 1


def serve(switch: Switch, devices: Iterable[int]) -> None:
    """Relay packets and obey standard input, until it ends."""
    poll, orders = select.poll(), sys.stdin.fileno()
    for descriptor in (orders, *devices):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = dict(poll.poll(switch.milliseconds()))
        if orders in ready:
            order = sys.stdin.readline()
            if not order:
                return
            switch.set_lines(json.loads(order))
            print(switch.num_lost, flush=True)
        switch.relay()


def main() -> None:
    """Open the devices and serve."""
    seed, *ports = sys.argv[1:]
    devices: dict[Address, int] = {}
    try:
        for port in ports:
            name, _, address = port.partition("=")
            devices[socket.inet_aton(address)] = open_device(name)
    except OSError as error:
        print(f"{DEVICE}: {error.strerror}", flush=True)
        return
    print("ready", flush=True)
    serve(Switch(devices, random.Random(seed)), devices.values())


if __name__ == "__main__":
    main()
