"""Compiles what ops launch for GPUs that need not be here, and says what each kernel takes.

    python tests/triton_compile.py                  one JSON object per kernel and GPU; of attention
                                                    a part of its table of tiles
    python tests/triton_compile.py --all [WORD...]  every entry of the tables with each pair of
                                                    options; prints what is wrong, then a summary

WORD keeps the entries that it names: attention, sm_80, D128, 32-bit, scores.

Run without TRITON_INTERPRET. The launches are those that the ops' own launchers make, on CPU
tensors, with a recorder in the kernel's place; arguments are specialised as Triton does it.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cover import (
    BITS,
    KINDS,
    SIZES,
    attention_call,
    attention_cases,
    decode_calls,
    embedding_gru_calls,
    most,
    row_statistics_calls,
)
from triton_report import objections, summary

CAPABILITIES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands for the kernels of a module and keeps their launches."""

    def __init__(self, module: ModuleType, *names: str) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for name in names:
            setattr(module, name, _Stand(self, getattr(module, name)))


class _Stand:
    def __init__(self, recorder: Recorder, kernel: Any) -> None:
        self.recorder, self.kernel = recorder, kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *a, **k: self.recorder.launches.append((self.kernel, a, k))


def _argument(
    value: Any, path: tuple[int, ...], specialises: bool, constants: Any, attributes: Any
) -> Any:
    """The type of an argument; what of it is compiled in goes to `constants`."""
    if isinstance(value, tuple):
        kinds = (_argument(x, (*path, i), True, constants, attributes) for i, x in enumerate(value))
        return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
    is_integer = isinstance(value, int)
    fixed = value is None or isinstance(value, bool)
    if fixed or (is_integer and specialises and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        kind, number = TYPES[value.dtype], value.data_ptr()
    elif is_integer:
        kind, number = "i32" if -(2**31) <= value < 2**31 else "i64", value
    else:
        kind, number = "fp32", 1
    if specialises and number % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _source(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> ASTSource:
    """None, constexpr and the number 1 are compiled in; what 16 divides is known to be so."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        name, value, path = parameter.name, values[parameter.name], (parameter.num,)
        if parameter.is_constexpr:
            signature[name], constants[path] = "constexpr", value
        else:
            specialises = not parameter.do_not_specialize
            signature[name] = _argument(value, path, specialises, constants, attributes)
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(op: str, launch: tuple[Any, tuple[Any, ...], dict[str, Any]], capability: int) -> Any:
    """Registers, stack and local memory a thread, shared memory a block, in bytes; and how many
    products stand in the code for tensor cores of sm_90, and of sm_80."""
    kernel, _args, named = launch
    options = {name: named[name] for name in OPTIONS if name in named}
    source = _source_of(launch)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found, text
    registers, stack, shared, local = map(int, found.groups())
    kernel_found = {
        "op": op,
        "kernel": kernel.fn.__name__,
        "products": {n: compiled.asm["ptx"].count(n) for n in ("wgmma.mma_async", "mma.sync")},
        "capability": capability,
        "arguments": {k: v for k, v in source.signature.items() if v != "constexpr"},
        "constants": {".".join(map(str, k)): v for k, v in _named(source).items()},
        "registers": registers,
        "stack": stack,
        "local": local,
        # the first counts what is reserved, the second what the launch asks for
        "shared": max(shared, compiled.metadata.shared),
        "threads": 32 * named.get("num_warps", 4),
        "tiles": [named.get(n) for n in ("ROWS", "KEYS", "num_warps", "STAGES")],
    }
    return {**kernel_found, "objections": objections(kernel_found)}


def _named(source: ASTSource) -> dict[Any, Any]:
    names = source.fn.arg_names
    return {(names[path[0]], *path[1:]): value for path, value in source.constants.items()}


def row_statistics(everything: bool) -> Iterator[Any]:
    """Every flag both ways, with each dtype; sizes that specialise and sizes that do not."""
    from fastlm.ops.row_statistics import triton_kernels as kernels

    recorder = Recorder(kernels, "forward_kernel", "backward_kernel")
    n = torch.empty(3)
    best = torch.empty(3, dtype=torch.int64)
    target = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        long, odd, one = (torch.empty(3, size, dtype=dtype) for size in (50304, 1001, 1))
        far = torch.empty_strided((3, 50304), (0, 1), dtype=dtype).as_strided(
            (1, 50304), (2**33, 1)
        )
        weight, each = torch.empty(1001), torch.empty(3, 50304)
        # logits, target, class weight, scale, softcap; entropy, sum_sq, weighted_sum, argmax
        forwards = [
            (long, target, None, 1.0, 0.0, None, None, None, None),
            (long, target, None, 1.0, 0.0, n, None, None, None),
            (long, target, None, 0.5, 30.0, n, n, None, best),
            (long, target, each, -1.0, 30.0, n, n, n, best),
            (odd, target, weight, 1.0, 0.0, n, n, n, best),
            (odd, None, None, -1.0, 0.0, None, None, n, best),
            (one, target, None, 1.0, 2.0, n, n, n, best),
            (far, None, None, 1.0, 0.0, n, None, None, None),
            (torch.empty(1, 1, dtype=dtype).expand(3, 50304), None, None, 1.0, 0.0, n, n, n, best),
        ]
        for logits, index, weights, scale, softcap, entropy, squares, total, top in forwards:
            out = (n, n, n, None if index is None else n, entropy, squares, total, total, top)
            kernels.forward(logits, index, weights, -100, scale, softcap, out)
        # logits, target, class weight, scale, softcap; the five coefficients
        backwards = [
            (long, target, None, 1.0, 0.0, n, None, None, None, n),
            (long, target, None, 1.0, 30.0, n, n, None, None, n),
            (long, None, None, -1.0, 30.0, n, n, n, n, None),
            (odd, target, weight, 1.0, 0.0, n, n, n, n, n),
            (long, target, each, 0.5, 30.0, n, n, n, n, n),
            (one, target, None, 1.0, 0.0, n, n, n, n, n),
            (far, None, None, 1.0, 0.0, n, None, None, None, None),
        ]
        for logits, index, weights, scale, softcap, *factors in backwards:
            saved = (logits, index, weights, n, n, tuple(factors))
            kernels.backward_into(torch.empty_like(logits), *saved, -100, scale, softcap)
    if everything:
        row_statistics_calls(kernels)
    yield from unlike(recorder.launches)


def linear_kl_div(everything: bool) -> Iterator[Any]:
    """Each divergence, with and without a gradient; sizes that specialise and sizes that do not."""
    from fastlm.ops.linear_kl_div import triton_kernels as kernels

    recorder = Recorder(kernels, "divergence_kernel")
    for classes in (50304, 1001, 500, 200, 1) if everything else (50304, 1001, 1):
        value, rows = torch.empty(3), torch.empty(3, classes)
        for kind in ("forward", "reverse", "jsd"):
            for factor in (None, torch.empty(3)):
                kernels.divergence(value, rows, torch.empty_like(rows), factor, kind, 0.3, 0.7)
    yield from recorder.launches


def embedding_gru(everything: bool) -> Iterator[Any]:
    """Every launch of both passes: each dtype of the weights, few rows
    and many, with and without each tensor that may be missing; sizes that specialise and not."""
    from fastlm.ops.embedding_gru import triton_kernels as kernels

    names = ("forward_kernel", "backward_kernel", "segment_sum_kernel")
    recorder = Recorder(kernels, *names)
    # dtype of the weights, batch, hidden size; index, reset, bias
    cases = [
        (d, b, 512, True, True, True) for d in (torch.float32, torch.bfloat16) for b in (64, 256)
    ]
    cases += [
        (torch.float16, 256, 512, True, False, True),
        (torch.float32, 3, 1, True, True, False),
    ]
    cases += [(d, 3, 19, False, True, True) for d in (torch.float16, torch.bfloat16)]
    for dtype, batch, hidden, shared, resets, bias in cases:
        tokens, width = 2 * batch, 3 * hidden
        table, index = torch.empty(tokens, width), torch.zeros(tokens, dtype=torch.int64)
        reset = torch.zeros(tokens, dtype=torch.uint8) if resets else None
        w_hh, b_hh = torch.empty(width, hidden, dtype=dtype), torch.empty(width) if bias else None
        layout = (batch, batch == 64, False)
        where = index if shared else None
        output, h_n, gates = kernels.forward(table, where, reset, w_hh, b_hh, None, *layout)
        saved = (torch.empty_like(output), h_n, where, tokens, reset, w_hh, None, output, gates)
        kernels.backward(*saved, *layout)
    if everything:
        embedding_gru_calls(kernels)
    # steps differ in numbers that are not specialised
    yield from unlike(recorder.launches)


# head sizes, kinds and dtypes that are compiled each time, the most of each kind
SOME = {
    80: [(128, "causal", "bfloat16"), (64, "scores", "float32")],
    90: [
        (64, "causal", "bfloat16"),
        (128, "causal", "bfloat16"),
        (128, "band", "float16"),
        (256, "scores", "bfloat16"),
        (128, "all", "bfloat16"),
    ],
}


def attention(capability: int, everything: bool, words: list[str]) -> Iterator[Any]:
    """Of some entries of the table of tiles the most that a call may ask for; or, of every entry
    whose label has the words, each pair of options."""
    from fastlm.ops.attention import triton_backward, triton_bias, triton_forward, triton_rows
    from fastlm.ops.attention import triton_kernels as shared
    from fastlm.ops.attention.op import _OPTIONS, _triton_refuses

    if not everything:
        cases = [most(size, kind, (dtype, "ieee")) for size, kind, dtype in SOME[capability]]
        if capability == 80:
            # the bias' kernel without slopes, which Triton compiles from other types
            cases.append({**most(64, "all", ("bfloat16", "ieee")), "slopes": None})
    else:
        cases = [
            case
            for size, bits, kind in itertools.product(SIZES, BITS, KINDS)
            if set(words) <= {"attention", f"sm_{capability}", f"D{size}", f"{bits}-bit", kind}
            for case in attention_cases(size, bits, kind)
        ]
    names = {
        triton_forward: ("forward_kernel",),
        triton_backward: ("dkdv_kernel", "dq_kernel"),
        triton_rows: ("rows_kernel", "ranges_kernel"),
        triton_bias: ("bias_kernel",),
    }
    recorders = [Recorder(module, *kernels) for module, kernels in names.items()]
    before = shared.capability, shared.precision
    shared.capability = lambda _: capability
    for case in cases:
        shared.precision = lambda _, case=case: case["way"][1]
        (q, k, v), given, needs = attention_call(case)
        if _triton_refuses(q, k, v, **dict(zip(_OPTIONS, given, strict=True))):
            continue
        out, lse = triton_forward.forward(q, k, v, *given)
        dlse = lse if case["dlse"] else None
        triton_backward.backward(out, dlse, q, k, v, out, lse, *given, needs)
    shared.capability, shared.precision = before
    for recorder, (module, kernels) in zip(recorders, names.items(), strict=True):
        for name in kernels:
            setattr(module, name, getattr(module, name).kernel)
        yield from unlike(recorder.launches)


def unlike(launches: list[Any]) -> Iterator[Any]:
    """Those that are not compiled to the same as one before."""
    seen = set()
    for launch in launches:
        options = [launch[2].get(name) for name in OPTIONS]
        if (key := str([_source_of(launch).hash(), options])) not in seen:
            seen.add(key)
            yield launch


def decode_attention(everything: bool) -> Iterator[Any]:
    """Dense and paged caches, with and without what may be missing."""
    from fastlm.ops.decode_attention import reference
    from fastlm.ops.decode_attention import triton_kernels as kernels

    recorder = Recorder(kernels, "part_kernel", "join_kernel")
    ints = torch.zeros(2, dtype=torch.int32)
    for dtype, size, paged in (
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 256, False),
        (torch.float32, 64, True),
    ):
        q = torch.empty(2, 1, 32, size, dtype=dtype)
        slots = (40, 16) if paged else (2, 4096)
        caches = torch.empty(*slots, 8, size, dtype=dtype)
        table = torch.zeros(2, 300, dtype=torch.int32) if paged else None
        row, heads = (None, torch.empty(32)) if paged else (ints, None)
        numbers = (0.1, 100 if paged else -1, 0, 30.0 if paged else 0.0, 0)
        given = reference.Options(table, row, row, heads, heads, *numbers)
        kernels.forward(q, caches, caches, ints, given)
    if everything:
        decode_calls(kernels, reference.Options)
    yield from unlike(recorder.launches)


def _source_of(launch: Any) -> ASTSource:
    kernel, args, named = launch
    return _source(kernel, args, {k: v for k, v in named.items() if k not in OPTIONS})


def launches(words: list[str], everything: bool) -> Iterator[tuple[str, int, Any]]:
    """Op, GPU and launch; all of them, or those that the words name."""
    for capability in CAPABILITIES:
        for launch in attention(capability, everything, words):
            yield "attention", capability, launch
    for of_op in (row_statistics, linear_kl_div, embedding_gru, decode_attention):
        for launch in of_op(everything):
            for capability in CAPABILITIES:
                if set(words) <= {of_op.__name__, f"sm_{capability}"}:
                    yield of_op.__name__, capability, launch


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--all"]
    everything = "--all" in sys.argv[1:]
    since, found = time.perf_counter(), []
    for op, capability, launch in launches(words, everything):
        found.append(resources(op, launch, capability))
        if not everything or found[-1]["objections"]:
            print(json.dumps(found[-1]), flush=True)
    if everything:
        print(summary(found, since))
        sys.exit(any(kernel["objections"] for kernel in found))


if __name__ == "__main__":
    main()
