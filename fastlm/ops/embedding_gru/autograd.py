"""The gradients of the three layer ops: embedded tokens, dense input, sequences of any length.

Every op takes (tensors, how it is laid out, save, precision) and returns (output, h_n, gates);
`gates` is for the backward alone. With save="hidden" it is empty and computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...second_order import gradients, tangents
from . import differentiable
from .op import (
    embedding_gru_backward,
    embedding_gru_forward,
    gru_backward,
    gru_forward,
    ragged_gru_backward,
    ragged_gru_forward,
)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One of the ops: its kernels, the same in PyTorch operations, and where its floats stand."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, Tensor]]
    input: int  # position of the input; w_ih, w_hh, b_ih, b_hh, h0 follow


def _plain_embedding(*args: Any) -> tuple[Tensor, Tensor]:
    # unique and inverse, and how tokens are shared, change nothing but the time
    tensors, (_, padding_idx, batch_first, reverse, precision) = args[:8], args[10:]
    return differentiable.embedding_gru(
        *tensors,
        padding_idx,
        batch_first,
        reverse,
        precision,  # type: ignore[call-arg]
    )


EMBEDDING = _Layer(embedding_gru_forward, embedding_gru_backward, _plain_embedding, 1)
DENSE = _Layer(gru_forward, gru_backward, differentiable.gru, 0)
RAGGED = _Layer(ragged_gru_forward, ragged_gru_backward, differentiable.ragged_gru, 0)


@dataclasses.dataclass(frozen=True)
class _How:
    """How a layer is laid out: no tuple, in which vmap of a forward mode would look for tensors."""

    arguments: tuple[Any, ...]


class _Apply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        layer: _Layer, how: _How, save: bool, precision: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return layer.forward(*tensors, *how.arguments, save, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer, how, _, ctx.precision, *tensors = inputs
        ctx.how = how.arguments
        out, _, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, gates)
        ctx.save_for_forward(*tensors, out, gates)

    @staticmethod
    def backward(ctx: Any, doutput: Any, dh_n: Any, _: Any) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        *tensors, output, gates = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        first = layer.input
        w_hh = tensors[first + 2]
        if doutput is None:
            doutput = output.new_zeros(output.shape)
        if dh_n is None:
            dh_n = output.new_zeros(_sequences(ctx, tensors), w_hh.shape[1])

        def kernels(doutput: Tensor, dh_n: Tensor, *saved: Tensor) -> list[Tensor | None]:
            dinput, dw_ih, dw_hh, dbias, dh0 = layer.backward(
                doutput.contiguous(), dh_n.contiguous(), *saved, *ctx.how,
                *needs[first : first + 3], ctx.precision,
            )  # fmt: skip
            own = (dinput, dw_ih, dw_hh, dbias[0], dbias[1], dh0)
            grads = (*(None,) * first, *own, *(None,) * (len(needs) - first - len(own)))
            return [g if need else None for g, need in zip(grads, needs, strict=True)]

        plain = partial(_plain, layer, ctx.how, ctx.precision)
        return (
            None, None, None, None,
            *gradients(kernels, plain, (doutput, dh_n), tensors, (output, gates), needs),
        )  # fmt: skip


class _ApplyWithTangents(_Apply):
    """For eager calls; torch.compile traces no Function that has a forward mode."""

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        *tensors, _, gates = ctx.saved_tensors
        plain = partial(_plain, ctx.layer, ctx.how, ctx.precision)
        return (*tangents(plain, tensors, given[4:]), None)


class _Eager(torch.autograd.Function):
    """`_ApplyWithTangents` outside of transforms, for which torch binds a signature at each call:
    a third of the time of a small one."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, how: _How, save: bool, precision: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = layer.forward(*tensors, *how.arguments, save, precision)
        _Apply.setup_context(ctx, (layer, how, save, precision, *tensors), output)
        return output

    backward = _Apply.backward
    jvp = _ApplyWithTangents.jvp


def _sequences(ctx: Any, tensors: Sequence[Any]) -> int:
    if ctx.layer is RAGGED:
        return tensors[8].shape[0]
    return tensors[0].shape[0 if ctx.how[-2] else 1]


def _plain(
    layer: _Layer, how: tuple[Any, ...], precision: str, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    return layer.plain(*tensors, *how, precision)


def _needs_plain(differentiable: bool) -> bool:
    """Whether forward mode meets another derivative: torch.func.hessian, jvp of jvp, of grad or of
    vmap, a backward over dual numbers. There torch loses what a Function with a jvp of its own has
    kept, some of it without a word."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if not stack:
        return differentiable and forward_ad._current_level >= 0
    jvp = torch._C._functorch.TransformType.Jvp
    return len(stack) > 1 and any(level.key() == jvp for level in stack)


def apply(
    layer: _Layer, tensors: Sequence[Tensor | None], how: tuple[Any, ...], save: str, precision: str
) -> tuple[Tensor, Tensor]:
    """output and h_n, differentiable."""
    differentiable = torch.is_grad_enabled()
    differentiable = differentiable and any(t is not None and t.requires_grad for t in tensors)
    keep = save == "gates" and differentiable
    if torch.compiler.is_compiling():
        output, h_n, _ = _Apply.apply(layer, _How(how), keep, precision, *tensors)
    elif _needs_plain(differentiable):
        output, h_n = _plain(layer, how, precision, *tensors)
    elif torch._C._are_functorch_transforms_active():
        output, h_n, _ = _ApplyWithTangents.apply(layer, _How(how), keep, precision, *tensors)
    elif differentiable or forward_ad._current_level >= 0:
        output, h_n, _ = _Eager.apply(layer, _How(how), keep, precision, *tensors)
    else:
        output, h_n, _ = layer.forward(*tensors, *how, keep, precision)
    return output, h_n
