"""The deployments that scenarios play on. In float32, where recomputed KV gives equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from protocol.link import write_cluster_key
from tests.chaos.asks import Reference
from tests.chaos.clients import Clients
from tests.chaos.network import Network, NetworkStack
from tests.chaos.scene import Scene
from tests.stack import Stack

Setting = Callable[[Path], AbstractContextManager[Scene]]
Workers = Mapping[str, Sequence[str]]

FLOAT32 = ("--dtype", "float32")
CHUNKS = ("--max-num-batched-tokens", "64")
BLOCKS = ("--num-kv-blocks", "2048")  # 64 MiB, all of which a long run comes to use

POOLS: Workers = {
    "prefill-0": (*CHUNKS, *BLOCKS),
    "prefill-1": (*CHUNKS, *BLOCKS),
    "decode-0": BLOCKS,
    "decode-1": BLOCKS,
}
SMALL: Workers = {
    "prefill-0": ("--max-num-batched-tokens", "4", "--max-num-seqs", "1"),
    "decode-0": ("--num-kv-blocks", "64", "--max-model-len", "1024", "--max-num-seqs", "8"),
}
PORTS = ("--control-port", "8201", "--data-port", "8202", "--metrics-port", "8203")
HOSTS: Workers = {"prefill-0": (*CHUNKS, *BLOCKS, *PORTS), "decode-0": (*BLOCKS, *PORTS)}


@contextmanager
def _scene(stack: Stack, model: Path, workers: Workers) -> Iterator[Scene]:
    with stack, Clients(stack.url) as clients:
        yield Scene(stack, clients, Reference(model), workers)


def _of_role(role: str, workers: Workers) -> list[Sequence[str]]:
    return [arguments for name, arguments in workers.items() if name.startswith(role)]


def pools(model: Path) -> AbstractContextManager[Scene]:
    """Two workers in each pool, so that one may die."""
    prefill, decode = _of_role("prefill", POOLS), _of_role("decode", POOLS)
    return _scene(Stack(model, prefill=prefill, decode=decode, worker=FLOAT32), model, POOLS)


def small(model: Path) -> AbstractContextManager[Scene]:
    """A slow prefill worker and a tiny decode worker, so that requests queue everywhere."""
    prefill, decode = _of_role("prefill", SMALL), _of_role("decode", SMALL)
    return _scene(Stack(model, prefill=prefill, decode=decode, worker=FLOAT32), model, SMALL)


@contextmanager
def hosts(model: Path) -> Iterator[Scene]:
    """Router, prefill and decode worker on hosts of their own, that are network namespaces.

    Raises CannotPlayError where those cannot be made.
    """
    with Network(["router", *HOSTS]) as network:
        key = model.parent / "cluster.key"
        if not key.exists():
            write_cluster_key(key)
        with_key = ("--cluster-key-file", str(key))
        stack = NetworkStack(
            network,
            model,
            prefill=_of_role("prefill", HOSTS),
            decode=_of_role("decode", HOSTS),
            router=("--insecure", *with_key),
            worker=(*FLOAT32, *with_key),
        )
        with _scene(stack, model, HOSTS) as scene:
            yield scene
