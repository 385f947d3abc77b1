"""Times operations with CUDA events, each after its inputs have left the L2 cache."""

from __future__ import annotations

import statistics

import torch

from bench.gpu.case import Ceiling, Operation

WARM_UP, REPEATS = 3, 20
FLUSH = 512 << 20  # bytes; several times the L2 cache


class Timer:
    """Owns the buffer that pushes other data out of the cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def seconds(self, operation: Operation, *, captured: bool = True) -> float:
        """The median of 20 runs; ``captured`` runs it as a graph, without its launches' costs."""
        for _ in range(WARM_UP):  # compiles too
            operation()
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                operation()
            operation = graph.replay
        return statistics.median(self._once(operation) for _ in range(REPEATS))

    def ceilings(self) -> dict[Ceiling, float]:
        """What this machine reaches now: bytes/s read and written by a copy, FLOP/s in bf16."""
        n = 8192
        a, b = (torch.randn((n, n), dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product = torch.empty_like(a)
        source = torch.randint(255, (2 << 30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return {
            "copy": 2 * source.numel() / self.seconds(lambda: target.copy_(source)),
            "matmul": 2 * n**3 / self.seconds(lambda: torch.matmul(a, b, out=product)),
        }

    def _once(self, operation: Operation) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._flush.zero_()
        start.record()
        operation()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
