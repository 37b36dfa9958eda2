"""What this machine can do and what this process uses of it."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from fastlm import matmul


@functools.cache
def gemm_rate(size: int = 512, seconds: float = 0.3) -> float:
    """FLOP/s of float32 products of square matrices, by the faster of torch.mm and ours, the best
    of repeated runs.

    The ceiling that training speed is stated against. Measured once per process.
    """
    # numbers of its own: a draw from the global generator would change the training that asks
    generator = torch.Generator().manual_seed(0)
    a, b, out = (torch.rand(size, size, generator=generator) for _ in range(3))
    with torch.no_grad():
        matmul.into(out, a, b)  # the first call starts threads
        best, stop = float("inf"), time.perf_counter() + seconds
        while (start := time.perf_counter()) < stop:
            matmul.into(out, a, b)
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def spread(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        value = values[0] if values else float("nan")
        return value, value, value
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
