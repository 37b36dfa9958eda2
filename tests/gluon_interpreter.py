"""Runs Gluon kernels on CPU tensors: their own source, with stand-ins for the language.

What runs where and when is up to `gluon_machine.py`. Layouts are not checked: the compiler does.
"""

from __future__ import annotations

import ast
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gluon_machine import (
    Barrier,
    Machine,
    Memory,
    Pointer,
    TensorDescriptor,
    arrive,
    copy,
    expect,
    init,
    load,
    product,
    product_wait,
    store,
    wait,
)
from torch import Tensor

# -- the language ---------------------------------------------------------------------------------


class Kernel:
    """A jit function: called within a kernel, or launched."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.fn(*args, **named)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int) -> None:
            fixed = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            for program in range(grid[0]):
                Machine.current = Machine(program, grid[0], random.getrandbits(32))
                self.fn(*fixed)

        return launch


def _jit(fn: Any = None, **_: Any) -> Any:
    return Kernel(fn) if fn is not None else Kernel


def _pairwise(tensors: Callable[..., Tensor], numbers: Callable[..., Any]) -> Callable[..., Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            like = a if isinstance(a, Tensor) else b
            return tensors(*(torch.as_tensor(x, dtype=like.dtype) for x in (a, b)))
        return numbers(a, b)

    return apply


def _where(keep: Any, a: Any, b: Any) -> Any:
    return torch.where(keep, a, b) if isinstance(keep, Tensor) else (a if keep else b)


def _cast(x: Any, dtype: torch.dtype, bitcast: bool = False) -> Any:
    if not isinstance(x, Tensor):
        return float(x) if dtype.is_floating_point else int(x)
    return x.view(dtype) if bitcast else x.to(dtype)


def _asm(text: str, _: str, args: list[Tensor], **__: Any) -> Tensor:
    """The two pieces of assembly that there are: the pin, and two values as 16 bits each."""
    if text.startswith("cvt.rn"):
        assert "$0, $2, $1" in text  # the first operand goes into the upper half
        to = torch.bfloat16 if "bf16x2" in text else torch.float16
        low, high = (x.to(to).view(torch.int16).int() for x in args)
        return (high << 16) | (low & 0xFFFF)
    assert "@p st.shared" in text
    return args[0]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
    if dtype == torch.int64:  # barriers
        return Memory([[Barrier()] for _ in range(shape[0])] if len(shape) > 1 else [Barrier()])
    return Memory(torch.full(shape, float("nan"), dtype=dtype))


def _reduced(reduce: Callable[..., Any]) -> Callable[[Tensor, int], Any]:
    def apply(x: Tensor, axis: int) -> Any:
        found = reduce(x, axis)
        return found if found.dim() else found.item()

    return apply


def _language() -> types.SimpleNamespace:
    def layout(*_: Any, **__: Any) -> None:
        return None

    shared = types.SimpleNamespace(get_default_for=layout)
    names = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout")
    return types.SimpleNamespace(
        **dict.fromkeys((*names, "DistributedLinearLayout"), layout),
        NVMMASharedLayout=shared,
        **{
            n: getattr(torch, n)
            for n in ("int16", "int32", "int64", "float16", "float32", "bfloat16")
        },
        constexpr=Constant,
        static_range=range,
        program_id=lambda axis: Machine.current.program,
        num_programs=lambda axis: Machine.current.programs,
        arange=lambda a, b, layout: torch.arange(a, b, dtype=torch.int32),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        maximum=_pairwise(torch.fmax, max),
        minimum=_pairwise(torch.fmin, min),
        max=_reduced(torch.amax),
        min=_reduced(torch.amin),
        sum=_reduced(torch.sum),
        reduce_or=lambda x, axis: torch.ones(x.shape[0], dtype=x.dtype),
        where=_where,
        exp2=torch.exp2,
        log2=torch.log2,
        expand_dims=torch.unsqueeze,
        load=load,
        store=store,
        cast=_cast,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        join=lambda a, b: torch.stack([a, b], -1),
        split=lambda x: x.unbind(-1),
        inline_asm_elementwise=_asm,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda roles, warps, registers: Machine.current.run(roles),
    )


def Constant(value: Any) -> Any:  # noqa: N802
    """A number that also has `.value`."""
    if isinstance(value, str):
        return value
    return type("Constant", (type(value),), {"value": value})(value)


LANGUAGE = _language()


def interpreted(path: Path, package: str, change: tuple[str, str] = ("", "")) -> Any:
    """The module at `path` with the language replaced, also in the gluon_*.py that it imports.
    `change`: a piece of its text, and another in its place."""
    names: dict[str, Any] = {}
    text = path.read_text()
    tree = ast.parse(text.replace(*change, 1) if change[0] else text)
    for node in list(tree.body):
        if not isinstance(node, ast.ImportFrom):
            continue
        if (node.module or "").startswith("triton"):
            tree.body.remove(node)
        elif node.level == 1 and (node.module or "").startswith("gluon_"):
            tree.body.remove(node)
            other = interpreted(path.with_name(f"{node.module}.py"), package, change)
            names |= {alias.name: getattr(other, alias.name) for alias in node.names}
    module = types.ModuleType(f"{package}.{path.stem}_interpreted")
    module.__package__ = package
    sys.modules[module.__name__] = module  # dataclass looks itself up there
    module.__dict__.update(
        gluon=types.SimpleNamespace(jit=_jit),
        gl=LANGUAGE,
        hopper=types.SimpleNamespace(
            warpgroup_mma=product,
            warpgroup_mma_wait=product_wait,
            fence_async_shared=lambda: None,
        ),
        mbarrier=types.SimpleNamespace(
            init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: None
        ),
        tma=types.SimpleNamespace(async_copy_global_to_shared=copy),
        TensorDescriptor=TensorDescriptor,
        **names,
    )
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module
