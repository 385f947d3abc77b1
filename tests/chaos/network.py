"""Hosts that are network namespaces on one bridge, whose lines can be cut and made bad.

    clients ── front ── router ── bridge ──┬── prefill-0
                                           └── decode-0

The router has a line to its clients that is never touched. A cut drops every packet in silence:
interfaces stay up and no connection is reset, as when a cable is pulled between two switches.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.scene import CannotPlayError
from tests.stack import Stack

CONTROL_PORT = 8100


def _run(*words: str) -> str:
    """Run ``ip`` or ``tc``. Raises CannotPlayError with what it said."""
    if shutil.which(words[0]) is None:
        raise CannotPlayError(f"no {words[0]} on this machine")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPlayError(f"{words[0]} says {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


class Network:
    """``with Network(names) as network``: one namespace for each host, gone when left."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """The first host is the router, to which clients have a line. Needs root."""
        tag = os.getpid() % 2**16
        self._bridge = f"kvf{tag}"
        self._hosts = list(hosts)
        self._subnet = f"198.18.{tag % 256}"  # both for tests between networks: RFC 2544
        self._front = f"198.19.{tag % 256}"

    def namespace(self, host: str) -> str:
        """The name of a host's namespace."""
        return f"{self._bridge}-{host}"

    def address(self, host: str) -> str:
        """A host's address on the bridge."""
        return f"{self._subnet}.{self._hosts.index(host) + 2}"

    @property
    def front(self) -> str:
        """The router's address for clients."""
        return f"{self._front}.2"

    def __enter__(self) -> Self:
        if os.geteuid():
            raise CannotPlayError("network namespaces need root")
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge", "forward_delay", "0")
            _run("ip", "address", "add", f"{self._subnet}.1/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            for host in self._hosts:
                namespace = self.namespace(host)
                _run("ip", "netns", "add", namespace)
                _run("ip", "-n", namespace, "link", "set", "lo", "up")
                self._lay_line(host, self._port(host), "back", f"{self.address(host)}/24")
                self._plug_in(host)
            front = f"{self._bridge}f"
            self._lay_line(self._hosts[0], front, "front", f"{self.front}/24")
            _run("ip", "address", "add", f"{self._front}.1/24", "dev", front)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    @contextmanager
    def unplugged(self, host: str) -> Iterator[None]:
        """The host reaches no other host, for the block's time."""
        _run("ip", "link", "set", self._port(host), "nomaster")
        try:
            yield
        finally:
            self._plug_in(host)

    @contextmanager
    def separated(self, hosts: Sequence[str]) -> Iterator[None]:
        """These hosts do not reach one another, but reach the others."""
        self._isolate(hosts, "on")
        try:
            yield
        finally:
            self._isolate(hosts, "off")

    @contextmanager
    def bad_line(self, host: str, *discipline: str) -> Iterator[None]:
        """What the host receives goes through a queueing discipline of ``tc``."""
        # At the bridge: in its own namespace a sender would wait for its queue, and lose nothing.
        where = ("dev", self._port(host), "root")
        _run("tc", "qdisc", "replace", *where, *discipline)
        try:
            yield
        finally:
            _run("tc", "qdisc", "delete", *where)

    def packets_lost(self, host: str) -> int:
        """Packets that the host's bad line has dropped."""
        shown = _run("tc", "-s", "qdisc", "show", "dev", self._port(host), "root")
        return sum(map(int, re.findall(r"dropped (\d+)", shown)))

    def _port(self, host: str) -> str:
        return f"{self._bridge}p{self._hosts.index(host)}"

    def _plug_in(self, host: str) -> None:
        _run("ip", "link", "set", self._port(host), "master", self._bridge)

    def _isolate(self, hosts: Sequence[str], state: str) -> None:
        for host in hosts:
            _run("ip", "link", "set", self._port(host), "type", "bridge_slave", "isolated", state)

    def _lay_line(self, host: str, outside: str, inside: str, address: str) -> None:
        namespace = self.namespace(host)
        peer = ("peer", "name", inside, "netns", namespace)
        _run("ip", "link", "add", outside, "type", "veth", *peer)
        _run("ip", "link", "set", outside, "up")
        _run("ip", "-n", namespace, "address", "add", address, "dev", inside)
        _run("ip", "-n", namespace, "link", "set", inside, "up")

    def _remove(self) -> None:
        for words in (
            *(("netns", "delete", self.namespace(host)) for host in self._hosts),
            ("link", "delete", self._bridge),
        ):
            subprocess.run(["ip", *words], capture_output=True, check=False)


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
            router=("--host", network.front, *router),
            worker=worker,
            control=f"tcp://{network.address('router')}:{CONTROL_PORT}",
            host=network.front,
        )
        self.network = network

    def launcher(self, name: str) -> Sequence[str]:
        """See Stack."""
        return ("ip", "netns", "exec", self.network.namespace(name))
