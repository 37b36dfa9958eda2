"""Log-probs of the targets alone, by the compiled kernel without the torch op around it.

The op and the choice of a backend take longer than the kernel does with some thousand logits. The
numbers are those of the op, to the bit: what `sample` and `generate` report of a token is what is
computed here for it, however few the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, extension, matmul
from ...second_order import gradients
from . import differentiable, small
from .op import Wanted, cpu_backward_into


def takes(logits: Tensor, target: Tensor) -> bool:
    """[N, V] or [..., V] and one target for each row, and nobody who watches or chooses."""
    if extension.unavailable is not None or not dispatch.direct(logits, target):
        return False
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.dim() == 0:
        return False
    if target.dtype not in checks.INTEGERS or target.shape != logits.shape[:-1]:
        return False
    return logits.numel() > 0


def _forward(logits: Tensor, target: Tensor, ignore_index: int, scale: float) -> Tensor:
    """[4, N]: max, log sum, lse and log-prob; logits [N, V], target int64 [N]."""
    out = logits.new_empty(4, len(logits), dtype=torch.float32)
    if logits.stride(1) != 1 and 0 not in logits.stride():
        logits = logits.contiguous()
    extension.raw("row_statistics_forward")(
        logits, target, None, ignore_index, scale, 0.0, *out.unbind(), None, None, None, None, None
    )
    return out


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, scale: float
    ) -> Tensor:
        out = _forward(logits, target, ignore_index, scale)
        ctx.save_for_backward(logits, target, out)
        ctx.options = (ignore_index, scale, 0.0)
        return out[3].clone()  # a view would be of what is saved

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, out = ctx.saved_tensors
        options = ctx.options

        def kernel(dlogprobs: Tensor, logits: Tensor) -> list[Tensor]:
            upstream = dlogprobs.contiguous()
            factors = (-upstream, None, None, None, upstream)
            dlogits = logits.new_empty(logits.shape)
            cpu_backward_into(dlogits, logits, target, None, out[0], out[1], factors, *options)
            return [dlogits]

        def plain(logits: Tensor) -> tuple[Tensor, ...]:
            compared: Any = (target, None, *options, Wanted())
            return differentiable.statistics(logits, *compared)[:1]

        return *gradients(kernel, plain, [dlogprobs], [logits], [], [True]), None, None, None


class _Product(torch.autograd.Function):
    """rows @ weight.T + bias in float32, by the product that the loop over chunks takes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        return matmul.fastest(rows, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad

        def products(dlogits: Tensor, rows: Tensor, weight: Tensor, *_: Any) -> Any:
            return (
                matmul.fastest(dlogits, weight) if needs[0] else None,
                matmul.fastest(dlogits.t(), rows) if needs[1] else None,
                dlogits.sum(0) if needs[2] else None,
            )

        def plain(*layer: Any) -> tuple[Tensor, ...]:
            return (torch.nn.functional.linear(*layer),)

        return tuple(gradients(products, plain, [dlogits], ctx.saved_tensors, [], needs))


def logprobs(op: str, logits: Tensor, target: Tensor, ignore_index: int, scale: float) -> Tensor:
    """[...], of logits [..., V] and target [...]; IndexError names what is out of range."""
    checks.index_range(op, "target", target, logits.shape[-1], ignore_index)
    flat = target.long() if target.dim() == 1 else target.long().reshape(-1)
    rows = logits if target.dim() == 1 else logits.reshape(-1, logits.shape[-1])
    flat = flat.contiguous()
    if small.trained(rows):
        value = _Logprobs.apply(rows, flat, ignore_index, scale)
    else:
        value = _forward(rows.detach(), flat, ignore_index, scale)[3]
    return value if target.dim() == 1 else value.view(target.shape)


def layer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., V] in float32, of a float32 layer."""
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    if small.trained(input, weight, bias):
        logits = _Product.apply(rows, weight, bias)
    else:
        logits = matmul.fastest(rows.detach(), weight.detach().t(), bias)
    return logits if input.dim() == 2 else logits.view(*input.shape[:-1], weight.shape[0])
