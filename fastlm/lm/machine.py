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

from .errors import UsageError

DEVICES = ("auto", "cpu", "cuda")
MOST_THREADS = 1024  # OpenMP ends the process where it gets no thread


def device_of(name: str) -> torch.device:
    """Where one process computes. "auto": on a GPU where there is one.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if name not in DEVICES:
        raise UsageError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch finds no GPU here; fastlm doctor says why")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def use_threads(count: int | None) -> None:
    """As an option says; None leaves it to torch."""
    if count is None:
        return
    if count < 1:
        raise UsageError(f"--threads must be at least 1, got {count}")
    if count > MOST_THREADS:
        raise UsageError(f"--threads must be at most {MOST_THREADS:,}, got {count:,}")
    torch.set_num_threads(count)


@functools.cache
def gemm_rate(
    size: int | None = None,
    seconds: float = 0.3,
    device: torch.device | None = None,
    precision: str = "float32",
) -> float:
    """FLOP/s of products of square matrices in float32, or with "bf16" of bfloat16 ones with sums
    in float32, the best of repeated runs; on a CPU by the faster of torch.mm and ours.

    The ceiling that training speed is stated against. Measured once per process.
    """
    place = device or torch.device("cpu")
    size = size or (512 if place.type == "cpu" else 4096)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # numbers of its own: a draw from the global generator would change the training that asks
    generator = torch.Generator(place).manual_seed(0)
    a, b, out = (
        torch.rand(size, size, generator=generator, device=place, dtype=dtype) for _ in range(3)
    )
    ours = place.type == "cpu" and (dtype == torch.float32 or matmul.takes_mixed(a))
    result = out.float() if ours else out

    def product() -> None:
        if ours:
            matmul.into(result, a, b)
        else:
            torch.mm(a, b, out=result)

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    best = float("inf")
    with torch.no_grad():
        product()  # the first call starts threads
        wait()
        stop = time.perf_counter() + seconds
        while (start := time.perf_counter()) < stop:
            product()
            wait()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _status(name: str) -> int | None:
    """A number of /proc/self/status, in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def resident_memory() -> int:
    """Resident memory of this process now; where the system does not say, the most so far."""
    now = _status("VmRSS")
    return peak_memory() if now is None else now


def forget_peak() -> None:
    """Let `peak_memory` begin from now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(device: torch.device | None = None) -> int:
    """Most bytes so far: of tensors on a GPU, else resident memory of this process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (most := _status("VmHWM")) is not None:
        return most
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def spread(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        value = values[0] if values else float("nan")
        return value, value, value
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
