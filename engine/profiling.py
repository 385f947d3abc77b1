"""Where a step's time goes: phases for metrics, spans and a trace for a closer look.

Phases are timed in every step. Spans are seen by torch's profiler only and cost next to nothing
while it is off. A ``StepTrace`` runs the profiler over some steps and writes what it saw.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

SKIPPED_STEPS = 5  # before a trace begins: they allocate and compile

_NOTHING: AbstractContextManager[None] = nullcontext()


def profiled() -> bool:
    """Whether torch's profiler watches this thread."""
    return torch._C._autograd._profiler_enabled()


def span(name: str) -> AbstractContextManager[object]:
    """A named range in the profiler's trace."""
    return record_function(name) if profiled() else _NOTHING


class Phases:
    """The seconds that each phase of the last step took on the host.

    A GPU works on after the phase that started it, up to the one that waits for its result.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a phase, and mark it as a span."""
        started = time.perf_counter()
        with span(name):
            yield
        self.seconds[name] = time.perf_counter() - started


class StepTrace:
    """A Chrome trace of ``num_steps`` steps, written to ``path`` (``.json.gz``) when they are done.

    Every call is made on the thread that runs the steps.
    """

    def __init__(self, path: Path, num_steps: int) -> None:
        self._path = path
        self._num_steps = num_steps
        self._seen = 0  # steps
        self._profile: profile | None = None

    def before_step(self) -> None:
        """Begin when it is time."""
        if self._seen == SKIPPED_STEPS:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self) -> None:
        """Write the trace after its last step."""
        self._seen += 1
        if self._profile is not None and self._seen == SKIPPED_STEPS + self._num_steps:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
            log.info("wrote a trace of %d steps to %s", self._num_steps, self._path)
