"""How many workers Kubernetes runs: the ``scale`` subresource, as the pod's service account.

The autopilot counts workers by their present role, Kubernetes by the role they started in, and a
worker may have changed: so a pool's target is moved by the difference, and never below 1.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError, KvferryError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 10.0  # seconds

_TARGET = re.compile(r"(deployments|statefulsets)/[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """The API server and the namespace of the pod's own account, read from ``account``.

    The token is read for each call, since Kubernetes replaces it while the pod runs.
    """

    url: str
    account: Path = ACCOUNT

    @classmethod
    def of_this_pod(cls) -> Kubernetes:
        """Raises ConfigError outside a pod, or in one without a service account."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port or not (ACCOUNT / "token").exists():
            raise ConfigError(
                "--kubernetes-prefill and --kubernetes-decode need a pod with a service account"
            )
        address = f"[{host}]" if ":" in host else host
        return cls(f"https://{address}:{port}")

    def move(self, target: str, difference: int) -> None:
        """Add to the replicas of ``deployments/NAME`` or ``statefulsets/NAME``.

        Raises KvferryError with the API server's reason, or the network's.
        """
        scale = self._call("GET", target)
        replicas = max(1, scale["spec"].get("replicas", 0) + difference)
        # With the version just read, a change that somebody else made meanwhile is a conflict.
        version = {"resourceVersion": scale["metadata"]["resourceVersion"]}
        self._call("PATCH", target, {"metadata": version, "spec": {"replicas": replicas}})

    def _call(self, method: str, target: str, patch: object = None) -> dict[str, Any]:
        try:
            namespace = (self.account / "namespace").read_text().strip()
            token = (self.account / "token").read_text().strip()
            context = ssl.create_default_context(cafile=self.account / "ca.crt")
            request = urllib.request.Request(  # noqa: S310
                f"{self.url}/apis/apps/v1/namespaces/{namespace}/{target}/scale",
                None if patch is None else json.dumps(patch).encode(),
                {
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/merge-patch+json",
                },
                method=method,
            )
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as answer:  # noqa: S310
                scale: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise KvferryError(f"Kubernetes, {target}: {_reason(error)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KvferryError(f"Kubernetes, {target}: {error}") from error
        return scale


def checked_target(target: str) -> str:
    """``deployments/NAME`` or ``statefulsets/NAME``. Raises ConfigError for anything else."""
    if _TARGET.fullmatch(target) is None:
        raise ConfigError(f"{target!r} is neither deployments/NAME nor statefulsets/NAME")
    return target


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error)
