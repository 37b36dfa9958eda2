"""Derivatives of any order for an op whose kernels know the first one.

The first derivative is the kernels', also under `create_graph=True`. The derivative of that one is
taken through `plain`: the same function in PyTorch operations, evaluated again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Plain = Callable[..., tuple[Tensor, ...]]


def transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, for which a Function has a slower form."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _of(
    plain: Plain, inputs: Sequence[Tensor | None], moved: Sequence[int]
) -> tuple[Plain, list[Tensor]]:
    """`plain` as a function of the inputs `moved`, and these."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, value in zip(moved, values, strict=True):
            full[i] = value
        return tuple(plain(*full))

    return function, [x for x in (inputs[i] for i in moved) if x is not None]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is derived: no tuple, in which vmap would look for tensors."""

    fast: Callable[..., tuple[Tensor, ...]]
    plain: Plain
    needs: list[int]  # positions among the inputs
    upstream: int  # how many tensors are upstream gradients
    given: int  # and how many these and the inputs; the rest only `fast` takes

    def derivative(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the inputs in `needs`, in PyTorch operations."""
        function, primals = _of(self.plain, tensors[self.upstream :], self.needs)
        return torch.func.vjp(function, *primals)[1](tensors[: self.upstream])


class _Gradient(torch.autograd.Function):
    """upstream, inputs -> gradients of the inputs in `needs`, by `fast`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        return call.fast(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.call.given])
        ctx.save_for_forward(*tensors[: ctx.call.given])

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
        # what only the kernels take is a function of the inputs: it has no gradient of its own
        own = ctx.needs_input_grad[1:]
        wanted = [i for i in range(ctx.call.given) if own[i]]
        function, primals = _of(ctx.call.derivative, ctx.saved_tensors, wanted)
        grads: list[Tensor | None] = [None] * len(own)
        for i, grad in zip(wanted, torch.func.vjp(function, *primals)[1](second), strict=True):
            grads[i] = grad
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        moved = given[1 : 1 + ctx.call.given]
        return tangents(ctx.call.derivative, ctx.saved_tensors, moved)


def gradients(
    fast: Callable[..., Sequence[Tensor | None]],
    plain: Plain,
    upstream: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward of an autograd.Function, itself differentiable where that is asked for.

    Args:
        fast: upstream, inputs, saved -> the gradient of each input, None where not needed.
        plain: inputs -> outputs, in PyTorch operations.
        upstream: the gradient of each output.
        inputs, saved: the tensors that the forward took, and what it saved beside them.
        needs: which of them have a gradient.
    """
    wanted = [i for i, need in enumerate(needs) if need]
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        with torch.no_grad():
            return list(fast(*upstream, *inputs, *saved))

    def kernels(*tensors: Any) -> tuple[Tensor, ...]:
        found = fast(*tensors)
        return tuple(g for g in (found[i] for i in wanted) if g is not None)

    call = _Call(kernels, plain, wanted, len(upstream), len(upstream) + len(inputs))
    marked = _Gradient.apply(call, *upstream, *inputs, *saved)
    grads: list[Tensor | None] = [None] * len(needs)
    for i, grad in zip(wanted, marked, strict=True):
        grads[i] = grad
    return grads


def _primal(value: Tensor) -> Tensor:
    """Without the tangent of the forward mode that is innermost; vmap has no rule for that."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(value):
        return forward_ad.unpack_dual(value).primal
    level, dim = functorch.maybe_get_level(value), functorch.maybe_get_bdim(value)
    return functorch._add_batch_dim(_primal(functorch.get_unwrapped(value)), dim, level)


def tangents(
    plain: Plain, inputs: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Forward mode: the tangent of each output. The backward pass is linear in the upstream
    gradient, and its own backward pass is the forward mode."""
    moved = [i for i, tangent in enumerate(given) if tangent is not None]
    # autograd turns forward mode off here, and with it that of transforms around this one; what is
    # on then is the one that asks, which the inputs must not carry
    with forward_ad._set_fwd_grad_enabled(True):
        own = [x if x is None else _primal(x) for x in inputs]
        function, primals = _of(plain, own, moved)
        outputs, pull = torch.func.vjp(function, *primals)[:2]
        push = torch.func.vjp(pull, tuple(torch.zeros_like(o) for o in outputs))[1]
        return push(tuple(given[i] for i in moved))[0]
