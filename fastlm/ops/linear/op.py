"""A linear layer by the product that is fastest on this processor.

    out = input @ weight.T + bias                              [N, K] and [M, K] -> [N, M]
    dinput = dout @ weight;  dweight = dout.T @ input;  dbias = sum of dout over rows

Every one of the three products is a linear layer of views of the tensors, so the backward is the
same function again and can be differentiated as often as one likes. Saved: input and weight.

Backends: cpu (our own product: float32 on a processor where PyTorch's runs at half its rate, sizes
from `_LEAST_WORK` on), torch and reference (everything, by PyTorch). Calls that the first one does
not take go to torch.nn.functional.linear as they are, without an op of ours around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ... import checks, dispatch, extension, library, matmul

_OP = "linear"
# multiply-adds below which PyTorch's product and no autograd function of ours is faster: see
# benchmarks/LOG.md, linear
_LEAST_WORK = 1 << 22
_LEAST_ROWS, _LEAST_COLUMNS, _LEAST_DEPTH = 8, 24, 16


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


_FORWARD = library.define(
    _OP, "forward", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _fake
)


def _cpu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return matmul.own_into(
        input.new_empty(input.shape[0], weight.shape[0]), input, weight.t(), bias
    )


def _cpu_refuses(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not matmul.own_is_faster():
        return "PyTorch's products are as fast on this processor"
    if any(x is not None and x.dtype != torch.float32 for x in (input, weight, bias)):
        return "not all of it is float32"
    return "there is nothing to add up" if input.shape[-1] == 0 else None


dispatch.register(
    _OP,
    "cpu",
    _cpu,
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_cpu_refuses,
)
for _name in ("torch", "reference"):
    dispatch.register(_OP, _name, functional.linear)


def _small(input: Tensor, weight: Tensor) -> str | None:
    """Why PyTorch's product is the faster one for these sizes."""
    depth, columns = input.shape[-1], weight.shape[0]
    elements = input.numel()
    if elements * columns < _LEAST_WORK:
        return f"{elements * columns} multiply-adds are too few"
    if elements < _LEAST_ROWS * depth or columns < _LEAST_COLUMNS or depth < _LEAST_DEPTH:
        return f"a product of {elements // depth} x {depth} x {columns} leaves its tiles empty"
    return None


def _why_not(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why our op is not asked: the call is PyTorch's then, whatever it may be."""
    if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        return "it takes rows [..., N, K] and a weight [M, K]"
    forced = dispatch.forced() is not None
    # first, because an op around a call of PyTorch costs more than a small product
    if not forced and (reason := _small(input, weight)) is not None:
        return reason
    if bias is not None and bias.shape != weight.shape[:1]:
        return "it takes a bias [M]"
    given = (input, weight, bias)
    if not all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in given):
        return "not plain tensors"
    if any(x is not None and x.device.type != "cpu" for x in given):
        return "not on a CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype"
    if forced or torch.compiler.is_compiling():
        return None
    return extension.unavailable or _cpu_refuses(input, weight, bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, differentiable."""
    if dispatch.forced() is None and _small(a, b) is not None:
        return functional.linear(a, b)
    return _Linear.apply(a, b, None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _FORWARD(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        dinput = _product(dout, weight.t()) if needs[0] else None
        dweight = _product(dout.t(), input.t()) if needs[1] else None
        return dinput, dweight, dout.sum(0) if needs[2] else None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the fastest product of matrices on this processor.

    Same as:
        torch.nn.functional.linear(input, weight, bias)

    Where PyTorch's own product is the faster one, on a GPU, for half precision and for what is not
    a plain tensor, it is that very call.

    Args:
        input: [..., K]. weight: [M, K]. bias: [M] or None.

    Returns:
        [..., M]; differentiable any number of times.

    Raises: what `torch.nn.functional.linear` raises.

    Source: the blocked product of `csrc/matmul`.
    """
    checks.tensor(_OP, "input", input)
    reason = _why_not(input, weight, bias)
    if reason is not None:
        dispatch.note(_OP, "torch", {"cpu": reason})
        return functional.linear(input, weight, bias)
    if input.dim() == 2:
        return _Linear.apply(input, weight, bias)
    return _Linear.apply(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])
