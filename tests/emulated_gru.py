"""The CUDA sources of the GRU, compiled for the CPU (tests/emulated_gpu), in place of torch ops."""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-O1 -g0 -std=c++17 -fPIC -ffp-contract=fast -DFASTLM_EMULATED -Icsrc -Itests/emulated_gpu "
    "-Wall -Wno-unknown-pragmas -Wno-maybe-uninitialized"
)
COMPILER = os.environ.get("CXX", "g++")
MULTIPROCESSORS, SHARED = 132, 232448


def build(folder: Path) -> ctypes.CDLL:
    sources = sorted((ROOT / "csrc" / "embedding_gru").glob("*.cu"))
    sources += sorted((ROOT / "tests" / "emulated_gpu").glob("*.cpp"))

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        command = [*COMPILER.split(), *FLAGS.split(), "-x", "c++", "-c", str(source), "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "emulated.so"
    subprocess.run([*COMPILER.split(), "-shared", "-o", str(library), *objects], check=True)
    return ctypes.CDLL(str(library))


def _value(x: Any) -> Any:
    if isinstance(x, Tensor):
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())
    if x is None:
        return ctypes.c_void_p(None)
    return ctypes.c_bool(x) if isinstance(x, bool) else ctypes.c_int64(x)


def _sizes(exchange: Tensor, batch: int, hidden: int, batch_first: bool) -> tuple[int, ...]:
    """batch, steps, hidden, and from one token to the next of the batch and in time."""
    steps = exchange.shape[0] // batch
    return (batch, steps, hidden, *((steps, 1) if batch_first else (1, batch)))


class Device:
    """An emulated GPU; `raw` gives its kernels under the names of the torch ops."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulator_failure.restype = ctypes.c_char_p
        for name in ("emulator_launches", "emulator_largest_grid", "emulated_gru_rows"):
            getattr(library, name).restype = ctypes.c_int64
        self.reset()

    def reset(
        self,
        seed: int = 1,
        multiprocessors: int = MULTIPROCESSORS,
        shared: int = SHARED,
        skipped_barrier: int = -1,
    ) -> None:
        self.library.emulator_set(ctypes.c_uint64(seed), multiprocessors, shared, skipped_barrier)

    @property
    def launches(self) -> int:
        return self.library.emulator_launches()

    def rows(self, hidden: int, parts: int, clusters: bool, backward: bool) -> int:
        return self.library.emulated_gru_rows(ctypes.c_int64(hidden), parts, clusters, backward)

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.library, name)(*map(_value, args))
        failure = self.library.emulator_failure().decode()
        if code or failure:
            raise RuntimeError(failure or f"cudaError_t {code}")

    def gru_forward_cuda(
        self, table: Tensor, index: Any, reset: Any, w_hh: Tensor, b_hh: Any, h0: Any, parts: int,
        clusters: bool, batch_first: bool, reverse: bool, exchange: Tensor, h_n: Tensor, gates: Any,
    ) -> None:  # fmt: skip
        batch, hidden = h_n.shape
        self.call(
            "emulated_gru_forward", table, table.shape[0], index, reset, w_hh, b_hh, h0, parts,
            clusters, reverse, *_sizes(exchange, batch, hidden, batch_first), exchange, h_n, gates,
        )  # fmt: skip

    def gru_backward_cuda(
        self, dout: Tensor, dh_n: Tensor, reset: Any, w_hh: Tensor, h0: Any, out: Tensor,
        gates: Tensor, parts: int, clusters: bool, batch_first: bool, reverse: bool,
        exchange: Tensor, dinput: Tensor, dhidden: Any, dh0: Tensor,
    ) -> None:  # fmt: skip
        batch, hidden = dh_n.shape
        self.call(
            "emulated_gru_backward", dout, dh_n, reset, w_hh, h0, out, gates, parts, clusters,
            reverse, *_sizes(exchange, batch, hidden, batch_first), exchange, dinput, dhidden, dh0,
        )  # fmt: skip

    def raw(self, name: str) -> Any:
        return getattr(self, name)
