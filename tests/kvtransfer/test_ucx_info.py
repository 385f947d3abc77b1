"""What is said about UCX, and demanded of it."""

from __future__ import annotations

import numpy as np
import pytest

from kvtransfer.ucx import UCXTransport, check_transport
from kvtransfer.ucx_info import available, describe
from protocol.errors import ConfigError

CONTEXT = """
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 4  dev 0  flags -- cma/memory
#      resource 3  :  md 5  dev 2  flags -- rc_mlx5/mlx5_0:1
#      resource 4  :  md 6  dev 3  flags -s cuda_ipc/cuda
"""


def test_transports_that_cannot_tell_a_dead_peer_are_left_out() -> None:
    assert available(CONTEXT) == ["cuda_ipc/cuda", "rc_mlx5/mlx5_0:1", "tcp/eth0"]


@pytest.mark.parametrize("required", ["tcp", "rc", "rc_mlx5", "rdma", "cuda", "cuda_ipc"])
def test_required_transport_is_there(required: str) -> None:
    check_transport(required, describe((1, 21, 0), available(CONTEXT)))


@pytest.mark.parametrize("required", ["rdma", "rc", "cuda_ipc", "cma", "UCX", "none"])
def test_required_transport_is_missing(required: str) -> None:
    description = describe((1, 21, 0), ["tcp/eth0", "tcp/lo"])
    with pytest.raises(ConfigError) as caught:
        check_transport(required, description)
    assert description in str(caught.value)
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY" in str(caught.value)


def test_what_this_machine_says() -> None:
    """UCX names its library and the wires it has, and then those a connection uses."""
    here, there = UCXTransport("127.0.0.1"), UCXTransport("127.0.0.1")
    assert here.description.startswith("UCX 1.")
    assert "libucp.so" in here.description
    check_transport("tcp", here.description)
    connection = here.connect(there.address)
    sent = here.send(connection, 1, np.zeros(100, np.uint8))
    while (message := there.probe()) is None:
        here.progress()
        there.progress()
    there.receive(message, np.zeros(100, np.uint8))
    while not sent.done:
        here.progress()
    assert "tcp/" in connection.description
    here.shutdown()
    there.shutdown()
