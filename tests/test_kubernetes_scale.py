"""Workers added and removed through Kubernetes' ``scale`` subresource, over real TLS."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.kubernetes import Kubernetes
from cli.scaling import by_kubernetes
from planner.autopilot_terms import Pools
from protocol.errors import ConfigError, KvferryError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

PREFILL, DECODE = "deployments/prefill", "statefulsets/decode"


@dataclass
class ApiServer:
    """Two scales, and what was asked with which token."""

    url: str = ""
    token: str = "first"
    replicas: dict[str, int] = field(default_factory=lambda: {PREFILL: 2, DECODE: 3})
    patched: list[tuple[str, Any]] = field(default_factory=list)
    refusal: int | None = None


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, and its key in the same folder."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
        "-subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out ca.crt"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "ca.crt"


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What Kubernetes mounts into a pod."""
    certificate(tmp_path)
    (tmp_path / "namespace").write_text("serving")
    (tmp_path / "token").write_text("first\n")
    return tmp_path


@pytest.fixture
def server(account: Path) -> Iterator[ApiServer]:
    state = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_PATCH(self) -> None:
            patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            if state.refusal is None:
                state.patched.append((self.target, patch))
                state.replicas[self.target] = patch["spec"]["replicas"]
            self.answer(state.refusal)

        @property
        def target(self) -> str:
            prefix, suffix = "/apis/apps/v1/namespaces/serving/", "/scale"
            return self.path.removeprefix(prefix).removesuffix(suffix)

        def answer(self, refusal: int | None = None) -> None:
            status, told = 200, self.scale()
            if self.headers["Authorization"] != f"Bearer {state.token}":
                status, told = 401, {"message": "Unauthorized"}
            elif self.target not in state.replicas:
                status, told = 404, {"message": f"{self.target} not found"}
            elif refusal is not None:
                status, told = refusal, {"message": "forbidden: cannot patch deployments/scale"}
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def scale(self) -> dict[str, Any]:
            replicas = state.replicas.get(self.target, 0)
            spec = {"replicas": replicas} if replicas else {}  # Kubernetes leaves zeros out
            return {"metadata": {"resourceVersion": "7"}, "spec": spec}

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "ca.crt", account / "key.pem")
        http.socket = context.wrap_socket(http.socket, server_side=True)
        state.url = f"https://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def test_targets_move_by_the_difference(server: ApiServer, account: Path) -> None:
    """Roles have changed since the pods started: 3P2D run as 2 and 3."""
    scale = by_kubernetes(Kubernetes(server.url, account), PREFILL, DECODE)
    scale(Pools(3, 2), Pools(4, 2))
    wanted = {"metadata": {"resourceVersion": "7"}, "spec": {"replicas": 3}}
    assert server.patched == [(PREFILL, wanted)]
    scale(Pools(4, 2), Pools(4, 1))
    assert server.replicas == {PREFILL: 3, DECODE: 2}


def test_no_target_goes_below_one(server: ApiServer, account: Path) -> None:
    scale = by_kubernetes(Kubernetes(server.url, account), PREFILL, DECODE)
    scale(Pools(4, 1), Pools(1, 1))
    assert server.replicas == {PREFILL: 1, DECODE: 3}
    server.replicas[PREFILL] = 0
    scale(Pools(1, 1), Pools(2, 1))
    assert server.replicas[PREFILL] == 1


def test_a_renewed_token_is_used(server: ApiServer, account: Path) -> None:
    cluster = Kubernetes(server.url, account)
    server.token = "second"
    with pytest.raises(KvferryError, match="Kubernetes, deployments/prefill: Unauthorized"):
        cluster.move(PREFILL, 1)
    (account / "token").write_text("second")
    cluster.move(PREFILL, 1)
    assert server.replicas[PREFILL] == 3


def test_refusals_are_told(server: ApiServer, account: Path) -> None:
    cluster = Kubernetes(server.url, account)
    with pytest.raises(KvferryError, match="deployments/other not found"):
        cluster.move("deployments/other", 1)
    server.refusal = 403
    with pytest.raises(KvferryError, match="cannot patch deployments/scale"):
        cluster.move(DECODE, 1)
    assert server.replicas[DECODE] == 3


def test_only_the_clusters_own_authority_is_trusted(
    server: ApiServer, account: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = certificate(tmp_path_factory.mktemp("other"))
    (account / "ca.crt").write_bytes(other.read_bytes())
    with pytest.raises(KvferryError, match=r"(?i)certificate"):
        Kubernetes(server.url, account).move(PREFILL, 1)


def test_a_server_that_is_away_is_told(account: Path) -> None:
    with pytest.raises(KvferryError, match="Kubernetes, deployments/prefill"):
        Kubernetes("https://127.0.0.1:9", account).move(PREFILL, 1)


@pytest.mark.parametrize("target", ["prefill", "pods/x", "deployments/", "deployments/a/../b"])
def test_a_target_is_a_deployment_or_a_stateful_set(account: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="neither deployments/NAME"):
        by_kubernetes(Kubernetes("https://x", account), target, DECODE)
