"""Processes started by hand, joined over TCP with the cluster's key, as on separate hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.link import write_cluster_key
from tests.checkpoints import CHECKPOINTS, reference_greedy, write_checkpoint
from tests.e2e.test_golden import NEW, complete
from tests.stack import Stack, eventually, free_port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("model") / "llama")


def test_only_who_has_the_key_joins(model: Path, tmp_path: Path) -> None:
    key, other = tmp_path / "cluster.key", tmp_path / "other.key"
    write_cluster_key(key)
    write_cluster_key(other)
    control = f"tcp://127.0.0.1:{free_port()}"
    with_key = ["--cluster-key-file", str(key)]
    with Stack(
        model,
        control=control,
        router=with_key,
        worker=["--dtype", "float32"],
        prefill=[with_key],
        decode=[with_key],
    ) as stack:
        stack.start_worker("decode", "stranger", ["--cluster-key-file", str(other)])
        stack.start_worker("decode", "nobody")
        prompt = list(range(40))
        assert complete(stack, prompt) == reference_greedy(model, prompt, NEW)
        addresses = [w["address"] for w in stack.workers() if w["role"] == "decode"]
        assert addresses[0].startswith("tcp://127.0.0.1:")
        loaded = eventually(
            lambda: all("loaded" in stack.log(name) for name in ("stranger", "nobody")), 60
        )
        assert loaded
        assert not eventually(lambda: len(stack.workers()) > 2, 3)
        stack.assert_idle()
