"""Derivatives of any order for an op whose kernels know the first one.

The first derivative is the kernels', also under `create_graph=True`. The derivative of that one is
taken through `plain`: the same function in PyTorch operations, evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Plain = Callable[..., tuple[Tensor, ...]]


def _aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views that no other input was computed from: a derivative ends at each of them."""
    return [t.view_as(t) if t is not None and t.is_floating_point() else t for t in tensors]


class _Gradient(torch.autograd.Function):
    """upstream, inputs -> gradients of the inputs in `needs`, by `fast`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        fast: Any, plain: Plain, needs: Sequence[int], split: tuple[int, int], *tensors: Any
    ) -> tuple[Tensor, ...]:
        return fast(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.plain, ctx.needs, (ctx.upstream, ctx.given), *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.given])

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            given = _aliases(ctx.saved_tensors)
            upstream, inputs = given[: ctx.upstream], given[ctx.upstream :]
            outputs = ctx.plain(*inputs)
            needed = [x for x in (inputs[i] for i in ctx.needs) if x is not None]
            first = torch.autograd.grad(
                outputs, needed, upstream, create_graph=True,
                materialize_grads=True,
            )  # fmt: skip
        # what only the kernels take is a function of the inputs: it has no gradient of its own
        own = ctx.needs_input_grad[4:]
        wanted = [i for i in range(ctx.given) if own[i]]
        sources = [x for x in (given[i] for i in wanted) if x is not None]
        live = [(a, b) for a, b in zip(first, second, strict=True) if a.requires_grad]
        grads: list[Tensor | None] = [None] * len(own)
        if live:
            found = torch.autograd.grad(
                [a for a, _ in live], sources, [b for _, b in live],
                create_graph=further, allow_unused=True,
            )  # fmt: skip
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
        return (None, None, None, None, *grads)


def gradients(
    fast: Callable[..., Sequence[Tensor | None]],
    plain: Plain,
    upstream: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    saved: Sequence[Tensor],
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
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        with torch.no_grad():
            return list(fast(*upstream, *inputs, *saved))
    wanted = [i for i, need in enumerate(needs) if need]

    def kernels(*tensors: Any) -> tuple[Tensor, ...]:
        found = fast(*tensors)
        return tuple(g for g in (found[i] for i in wanted) if g is not None)

    split = (len(upstream), len(upstream) + len(inputs))
    marked = _Gradient.apply(kernels, plain, wanted, split, *upstream, *inputs, *saved)
    grads: list[Tensor | None] = [None] * len(needs)
    for i, grad in zip(wanted, marked, strict=True):
        grads[i] = grad
    return grads


def tangents(
    plain: Plain, inputs: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Forward mode: the tangent of each output. The backward pass is linear in the upstream
    gradient, and its own backward pass is the forward mode."""
    moved = [i for i, tangent in enumerate(given) if tangent is not None]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, value in zip(moved, values, strict=True):
            full[i] = value
        return tuple(plain(*full))

    primals = [x.detach() for x in (inputs[i] for i in moved) if x is not None]
    outputs, pull = torch.func.vjp(function, *primals)[:2]
    push = torch.func.vjp(pull, tuple(torch.zeros_like(o) for o in outputs))[1]
    return push(tuple(given[i] for i in moved))[0]
