"""Measuring: summaries of timings, the ceilings of this machine, peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm import matmul

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str = "cpu", repeat: int = 1) -> float:
    """Wall time of one call of `call`, averaged over `repeat` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


# ---- ceilings: time them between the things they are compared with, never once and for all


def gemm(
    m: int, k: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Callable[[], Any], float]:
    """A matrix product to time, the faster of PyTorch's and ours, and its operations."""
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype).t()
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: matmul.into(out, a, b), 2.0 * m * k * n


def copy(megabytes: int = 128, device: str = "cpu") -> tuple[Callable[[], Any], float]:
    """A copy to time that no cache holds, and the bytes it reads and writes."""
    a = torch.ones(megabytes << 18, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a), 2.0 * a.numel() * a.element_size()


# ---- peak memory


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"fastlm.bench: {_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def has_peak() -> bool:
    """Whether this system tells the peak memory of a process and lets it be reset (Linux)."""
    return _STATUS.exists() and os.access(_CLEAR, os.W_OK)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes of this process that were in memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    _CLEAR.write_text("5")


def return_freed_memory() -> None:
    """From now on freed blocks go back to the system at once, so that resident memory is what is
    allocated, to the page. Slower: for measuring memory, never time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 65536)
        libc.malloc_trim(0)


def held_bytes(values: Any) -> int:
    """Bytes of the distinct storages behind the tensors in nested tuples, lists and dicts."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(values)
    return sum(storages.values())


def extra_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes that a call holds at once beyond its inputs and its results.

    The first call warms up (libraries, thread buffers); the second is measured. On the CPU run
    this in a process of its own, after `return_freed_memory`.
    """
    results = call()
    kept = held_bytes(results)
    del results
    gc.collect()
    if device == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(device)
        return max(0, torch.cuda.max_memory_allocated() - before - kept)
    before = resident()
    reset_peak()
    call()
    return max(0, peak() - before - kept)


# ---- where a number comes from


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1) if found else ""

    name, family = field("model name"), field("cpu family")
    if name and family and not re.search(r"\d", name):  # a virtual machine hides the model
        return f"{name} family {family}"
    return name or platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Name and versions that belong beside every result."""
    from .. import __version__, extension

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastlm": __version__,
        "cpu_isa": extension.cpu_isa(),
        "system": sys.platform,
    }
