"""How the autopilot adds and removes workers: by the operator's command, or through Kubernetes."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable

from cli.kubernetes import Kubernetes, checked_target
from planner.autopilot_terms import Pools
from protocol.errors import ConfigError, KvferryError

COMMAND_TIMEOUT = 60.0  # seconds

Scale = Callable[[Pools, Pools], None]
"""From the present numbers of workers to those wanted. Raises KvferryError."""


def chosen_scale(
    command: str | None, kubernetes_prefill: str | None, kubernetes_decode: str | None
) -> Scale | None:
    """What the options ask for; None: nothing. Raises ConfigError for what makes no sense."""
    targets = kubernetes_prefill, kubernetes_decode
    if command is None and targets == (None, None):
        return None
    if command is not None and targets == (None, None):
        return by_command(command)
    if command is None and kubernetes_prefill is not None and kubernetes_decode is not None:
        return by_kubernetes(Kubernetes.of_this_pod(), kubernetes_prefill, kubernetes_decode)
    raise ConfigError("give --scale-command, or both --kubernetes-prefill and --kubernetes-decode")


def by_command(command: str) -> Scale:
    """Its ``{prefill}`` and ``{decode}`` are the numbers wanted. Raises ConfigError."""
    words = shlex.split(command)
    try:
        for word in words:
            word.format(prefill=1, decode=1)
    except (KeyError, IndexError, ValueError) as error:
        known = "{prefill} and {decode}"
        raise ConfigError(f"--scale-command knows only {known}: {command!r}") from error

    def scale(_: Pools, wanted: Pools) -> None:
        filled = [word.format(prefill=wanted.prefill, decode=wanted.decode) for word in words]
        try:
            subprocess.run(filled, check=True, timeout=COMMAND_TIMEOUT, capture_output=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise KvferryError(f"the scale command failed: {error}") from error

    return scale


def by_kubernetes(cluster: Kubernetes, prefill: str, decode: str) -> Scale:
    """Two ``deployments/NAME`` or ``statefulsets/NAME``. Raises ConfigError."""
    targets = checked_target(prefill), checked_target(decode)

    def scale(present: Pools, wanted: Pools) -> None:
        more = wanted.prefill - present.prefill, wanted.decode - present.decode
        for target, difference in zip(targets, more, strict=True):
            if difference:
                cluster.move(target, difference)

    return scale
