"""Hosts that are network namespaces, joined by a switch whose lines can be cut and made bad.

    clients ──┬── router
              │
           switch ──┬── prefill-0
                    └── decode-0

The switch is a process of ours (see ``switch``). Clients, in the namespace of this process, have
lines to every host, which are never spoilt. A cut drops every packet in silence: interfaces stay up
and no connection is reset, as when a cable is pulled between two switches.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.line import Condition
from tests.chaos.scene import CannotPlayError
from tests.stack import Stack

CLIENTS = "clients"
CONTROL_PORT = 8100
QUEUE = "5000"  # packets that wait for the switch, so that it loses none by itself

Direction = tuple[str, str]  # from one host to another


def _run(*words: str) -> None:
    """Run ``ip``. Raises CannotPlayError with what it said."""
    if shutil.which(words[0]) is None:
        raise CannotPlayError(f"no {words[0]} on this machine")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPlayError(f"{words[0]} says {done.stderr.strip().splitlines()[-1]}")


class _SwitchProcess:
    """The switch as its own process. Raises CannotPlayError when it cannot start."""

    def __init__(self, devices: Iterable[str]) -> None:
        """``devices`` are given as NAME=ADDRESS."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.switch", "0", *devices],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (said := self._read()) != "ready":
            self.close()
            raise CannotPlayError(f"no switch: {said}")

    def order(self, conditions: Sequence[tuple[str, str, Condition]]) -> int:
        """Set all lines that are not perfect; the packets lost so far."""
        assert self._process.stdin is not None
        json.dump([(a, b, asdict(c)) for a, b, c in conditions], self._process.stdin)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._read())

    def close(self) -> None:
        """End it, and its devices."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Network:
    """``with Network(names) as network``: one namespace for each host, gone when left."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Needs root."""
        tag = os.getpid() % 2**16
        self._name = f"kvf{tag}"
        self._hosts = list(hosts)
        self._subnet = f"198.18.{tag % 256}"  # for tests between networks: RFC 2544
        self._open = ExitStack()
        self.num_lost = 0  # packets, by all lines that were spoilt

    def namespace(self, host: str) -> str:
        """The name of a host's namespace."""
        return f"{self._name}-{host}"

    def address(self, host: str) -> str:
        """A host's address on the switch."""
        return f"{self._subnet}.{self._hosts.index(host) + 2}"

    def __enter__(self) -> Self:
        if os.geteuid():
            raise CannotPlayError("network namespaces need root")
        with ExitStack() as opened:
            for host in self._hosts:
                _run("ip", "netns", "add", self.namespace(host))
                opened.callback(_run, "ip", "netns", "delete", self.namespace(host))
                _run("ip", "-n", self.namespace(host), "link", "set", "lo", "up")
            ports = {CLIENTS: f"{self._subnet}.1"} | {h: self.address(h) for h in self._hosts}
            devices = {name: f"{self._name}p{i}" for i, name in enumerate(ports)}
            self._switch = _SwitchProcess(f"{devices[name]}={ports[name]}" for name in ports)
            opened.callback(self._switch.close)  # before the namespaces with the devices go
            for name, device in devices.items():
                if name != CLIENTS:
                    _run("ip", "link", "set", device, "netns", self.namespace(name))
                ip = ("ip",) if name == CLIENTS else ("ip", "-n", self.namespace(name))
                _run(*ip, "address", "add", f"{ports[name]}/24", "dev", device)
                _run(*ip, "link", "set", device, "txqueuelen", QUEUE, "up")
            self._open = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def touching(self, host: str) -> list[Direction]:
        """Both directions of each line of a host."""
        return [direction for direction in self.among(self._hosts) if host in direction]

    def leaving(self, host: str) -> list[Direction]:
        """The directions from a host to the others."""
        return [direction for direction in self.among(self._hosts) if host == direction[0]]

    def among(self, hosts: Iterable[str]) -> list[Direction]:
        """Both directions of each line between two of these hosts."""
        return list(itertools.permutations(hosts, 2))

    @contextmanager
    def spoilt(self, directions: Iterable[Direction], condition: Condition) -> Iterator[None]:
        """These lines are in this condition for the block's time; all others are perfect."""
        self._switch.order([(self.address(a), self.address(b), condition) for a, b in directions])
        try:
            yield
        finally:
            self.num_lost = self._switch.order([])


class NetworkStack(Stack):
    """A stack whose processes live on a network's hosts, each under its own name."""

    def __init__(
        self,
        network: Network,
        model: Path,
        *,
        prefill: Sequence[Sequence[str]],
        decode: Sequence[Sequence[str]],
        router: Sequence[str],
        worker: Sequence[str],
    ) -> None:
        super().__init__(
            model,
            prefill=prefill,
            decode=decode,
            router=("--host", network.address("router"), *router),
            worker=worker,
            control=f"tcp://{network.address('router')}:{CONTROL_PORT}",
            host=network.address("router"),
        )
        self.network = network

    def launcher(self, name: str) -> Sequence[str]:
        """See Stack."""
        return ("ip", "netns", "exec", self.network.namespace(name))
