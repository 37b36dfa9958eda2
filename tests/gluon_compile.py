"""Compiles the Hopper attention kernels without a GPU, and says what is in their machine code.

    python tests/gluon_compile.py [NAME...]       one JSON object per kernel
    python tests/gluon_compile.py --all [NAME...] each pair of options; prints what is wrong, then a
                                                  summary

The launches are those that the launchers make, on CPU tensors; Triton itself specialises their
arguments, and stops before the launch.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_compile import TOOLS, Recorder
from triton_cover import pairs
from triton_report import REGISTERS, SHARED, summary

from fastlm.ops.attention import gluon_backward, gluon_kernels

COUNTED = ("HGMMA", "UTMALDG", "LDL", "STL", "USETMAXREG", "PRMT")


class Absent:
    """A driver of a GPU that is not here: enough to compile as a launch does."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


driver.set_active(Absent())


def instructions(cubin: bytes) -> tuple[str, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(tool), *flags, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, *flags in (
                (TOOLS / "cuobjdump", "-res-usage"),
                (TOOLS / "nvdisasm", "-c"),
            )
        )
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.+?)\s*;", sass, re.MULTILINE)
    return usage, lines


def overlaps(lines: list[str]) -> list[Counter[str]]:
    """What stands between a wait for all but the last product and the wait for that one."""
    found, inside = [], None
    for line in lines:
        name = line.split()[0]
        if name.startswith("WARPGROUP.DEPBAR"):
            if inside is not None:
                found.append(inside)
            inside = Counter() if line.endswith("0x1") else None
        elif inside is not None:
            inside[name.split(".")[0] if name != "MUFU.EX2" else name] += 1
    return found


def report(launch: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    kernel, args, options = launch
    compiled = kernel.warmup(*args, grid=(1,), **options)
    usage, lines = instructions(compiled.asm["cubin"])
    registers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert registers, usage
    names = [line.split()[0].split(".")[0] for line in lines]
    exponentials = sum(line.startswith("MUFU.EX2") for line in lines)
    waits = sum(line.startswith("WARPGROUP.DEPBAR") for line in lines)
    found = {
        "kernel": kernel.fn.__name__,
        "config": vars(args[-1]),
        "dtype": str(getattr(args[0], "base", args[0]).dtype).removeprefix("torch."),
        "registers": int(registers[1]),
        "stack": int(registers[2]),
        "local": int(registers[4]),
        "threads": 32 * compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "waits": waits,
        "exponentials": exponentials,
        "overlaps": overlaps(lines),
        **{name: names.count(name) for name in COUNTED},
    }
    return {**found, "objections": objections(found)}


def objections(kernel: dict[str, Any]) -> list[str]:
    prepares = kernel["kernel"] == "prepare_kernel"
    what = {
        "spills": any(kernel[name] for name in ("stack", "local", "LDL", "STL")),
        "takes too much shared memory": kernel["shared"] > SHARED[90],
        "takes too many registers": kernel["registers"] * kernel["threads"] > REGISTERS,
        "does not move registers": not (prepares or kernel["USETMAXREG"]),
        "has no product on tensor cores": not (prepares or kernel["HGMMA"]),
    }
    return [name for name, so in what.items() if so]


def calls() -> Iterator[dict[str, Any]]:
    """Options of forward calls: each mask and flag, some alone and all together."""
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    bounds = torch.zeros(1, 1, 8, dtype=torch.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    intervals = {"lo": bounds, "hi": bounds}
    window = {"left": 5, "right": 0}
    most = {**intervals, **window, "sink": torch.zeros(4)}
    # three warpgroups, and two where there are more registers needed
    yield {"size": 64, **packed, "right": 0, "sink": torch.zeros(4)}
    yield {"size": 64, **most, "dtype": torch.float16}
    yield {"size": 64, **most, **packed, "softcap": 20.0}
    yield {"size": 128}
    yield {"size": 128, "right": 0}
    yield {"size": 128, **packed, "right": 0}
    yield {"size": 128, **most, **packed, "dtype": torch.float16}
    yield {"size": 128, **most, **packed, "softcap": 20.0}


def backward_calls() -> Iterator[dict[str, Any]]:
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    yield {"size": 64, "right": 0}
    yield {"size": 128, "dlse": torch.empty(1, 4, 8)}
    yield {"size": 128, "right": 0}
    yield {"size": 128, **packed, "left": 5, "right": 0, "dtype": torch.float16}


NAMES = (
    "lo", "hi", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink", "bias", "seed",
    "scale", "left", "right", "softcap", "dropout_p",
)  # fmt: skip
PLAIN = {"scale": 0.1, "left": -1, "right": -1, "softcap": 0.0, "dropout_p": 0.0}


def every_call(backward: bool) -> Iterator[dict[str, Any]]:
    """Each pair of options that `hopper.refuses_call` lets pass."""
    flag = (False, True)
    options: dict[str, Any] = {
        "size": (64, 128),
        "dtype": (torch.bfloat16, torch.float16),
        "heads": ((4, 2), (4, 4)),
        "packed": flag,
        "left": flag,
        "right": flag,
        "sink": flag,
        **({"dlse": flag} if backward else {"intervals": flag, "softcap": flag}),
    }
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    bounds = torch.zeros(1, 1, 8, dtype=torch.int32)
    for case in pairs(options):
        call = {name: case[name] for name in ("size", "dtype", "heads")}
        call |= {"left": 5 if case["left"] else -1, "right": 0 if case["right"] else -1}
        call |= {"softcap": 20.0 if case.get("softcap") else 0.0}
        if case["packed"]:
            call |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        if case.get("intervals"):
            call |= {"lo": bounds, "hi": bounds}
        if case["sink"]:
            call["sink"] = torch.zeros(4)
        if case.get("dlse"):
            call["dlse"] = torch.empty(1, 4, 8)
        yield call


def launches(everything: bool) -> Iterator[Any]:
    recorder = Recorder(gluon_kernels, "forward_kernel")
    others = Recorder(gluon_backward, "prepare_kernel", "key_kernel", "query_kernel")
    forwards = itertools.chain(calls(), every_call(False) if everything else ())
    backwards = itertools.chain(backward_calls(), every_call(True) if everything else ())
    for source, run in ((forwards, gluon_kernels.forward), (backwards, _backward)):
        for call in source:
            given = [{**PLAIN, **call}.get(name) for name in NAMES]
            dtype = call.get("dtype", torch.bfloat16)
            counts = call.get("heads", (4, 2))
            q, k = (torch.empty(1, 8, heads, call["size"], dtype=dtype) for heads in counts)
            run(q, k, k, *given, **({"dlse": call.get("dlse")} if run is _backward else {}))
    yield from recorder.launches
    yield from others.launches


def _backward(q: Any, k: Any, v: Any, *given: Any, dlse: Any) -> None:
    gluon_backward.backward(q, dlse, q, k, v, q, torch.empty(1, 4, 8), *given)


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--all"]
    everything = "--all" in sys.argv[1:]
    since, found = time.perf_counter(), []
    for launch in launches(everything):
        if names and launch[0].fn.__name__ not in names:
            continue
        found.append(report(launch))
        if not everything or found[-1]["objections"]:
            print(json.dumps(found[-1]), flush=True)
    if everything:
        print(summary(found, since))
        sys.exit(any(kernel["objections"] for kernel in found))


if __name__ == "__main__":
    main()
