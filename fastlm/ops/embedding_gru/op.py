"""GRU over embedded tokens, and over dense input: the torch ops of one layer in one direction.

Contract. r = sigmoid(x_r + h_r), z = sigmoid(x_z + h_z), n = tanh(x_n + r * h_n), h' = n + z(h - n)
with x = W_ih e + b_ih and h_* = W_hh h + b_hh, gate order r, z, n: torch.nn.GRU. What depends on
the token alone, x, is computed once for each distinct token (`dedupe`), not for each position; the
gradient of an embedding row is one sum over its positions in a fixed order.

Saved for backward: the inputs, `output`, and `gates` [N, 4H] = (r, z, n, W_hn h + b_hn) in float32
(float64 for float64), or no gates with save="hidden": the backward recomputes them in one product.

The cpu backend takes float32 and bfloat16 and refuses the rest; the reference takes any float.
Source: Cho et al. 2014 (arXiv:1406.1078), reset after the product as in cuDNN; one table row a
token type as in gather-based inference engines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import checks, extension, matmul
from ...dispatch import register
from ...library import define, once_differentiable
from . import cpu_kernels, layer, reference

_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, Tensor? reset"
_TOKENS = f"Tensor tokens, Tensor weight, {_WEIGHTS}, Tensor? unique, Tensor? inverse"
_HOW = "str dedupe, int? padding_idx, bool batch_first, bool reverse"
_NEEDS = "bool need_weight, bool need_w_ih, bool need_w_hh"


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_forward(
    leading: torch.Size, batch: int, like: Tensor, w_hh: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = w_hh.shape[1]
    tokens = leading[0] * leading[1] if save else 0
    return (
        like.new_empty(*leading, hidden),
        like.new_empty(batch, hidden),
        like.new_empty(tokens, 4 * hidden, dtype=_wide_dtype(like)),
    )


def _fake_backward(
    first: Tensor, w_ih: Tensor, w_hh: Tensor, batch: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    hidden = w_hh.shape[1]
    grads = [
        x.new_empty(x.shape if need else 0)
        for x, need in zip((first, w_ih, w_hh), needs, strict=True)
    ]
    return (*grads, w_hh.new_empty(2, 3 * hidden), w_hh.new_empty(batch, hidden))


def _batch(leading: torch.Size, batch_first: bool) -> int:
    return leading[0] if batch_first else leading[1]


def _fake_embedding_forward(tokens: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch_first, _, save = rest[-3:]
    batch = _batch(tokens.shape, batch_first)
    return _fake_forward(tokens.shape, batch, weight, rest[1], save)


def _fake_embedding_backward(
    doutput: Tensor, dh_n: Tensor, tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_backward(weight, w_ih, w_hh, dh_n.shape[0], rest[-3:])


def _fake_gru_forward(input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> Any:
    batch_first, _, save = rest[-3:]
    batch = _batch(input.shape, batch_first)
    return _fake_forward(input.shape[:2], batch, input, w_hh, save)


def _fake_gru_backward(
    doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_backward(input, w_ih, w_hh, dh_n.shape[0], rest[-3:])


def _check_tokens(named: dict[str, Any]) -> None:
    op, size, unique = "embedding_gru", named["weight"].shape[0], named["unique"]
    if unique is None:
        checks.index_range(op, "tokens", named["tokens"], size, None)
    else:
        # what the kernels index with; that the plan is of these tokens is the caller's word
        checks.index_range(op, "plan.unique", unique, size, None)
        checks.index_range(op, "plan.inverse", named["inverse"], unique.shape[0], None)


_embedding_forward = define(
    "embedding_gru",
    "forward",
    f"({_TOKENS}, {_HOW}, bool save) -> (Tensor output, Tensor h_n, Tensor gates)",
    _fake_embedding_forward,
    _check_tokens,
)
_embedding_backward = define(
    "embedding_gru",
    "backward",
    f"(Tensor doutput, Tensor dh_n, {_TOKENS}, Tensor output, Tensor gates, {_HOW}, {_NEEDS}) -> "
    "(Tensor dweight, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dh0)",
    _fake_embedding_backward,
)
_gru_forward = define(
    "gru",
    "forward",
    f"(Tensor input, {_WEIGHTS}, bool batch_first, bool reverse, bool save) -> "
    "(Tensor output, Tensor h_n, Tensor gates)",
    _fake_gru_forward,
)
_gru_backward = define(
    "gru",
    "backward",
    f"(Tensor doutput, Tensor dh_n, Tensor input, {_WEIGHTS}, Tensor output, Tensor gates, "
    f"bool batch_first, bool reverse, {_NEEDS.replace('need_weight', 'need_input')}) -> "
    "(Tensor dinput, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dh0)",
    _fake_gru_backward,
)
# one step of decoding: no gradient, and weights packed once for many steps
_step = define(
    "gru_step",
    "forward",
    "(Tensor table, Tensor? index, Tensor w_hh, Tensor? b_hh, Tensor? packed, Tensor h) -> Tensor",
    lambda table, index, w_hh, b_hh, packed, h: torch.empty_like(h),
)


def _reference_token_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    unique, inverse = torch.unique(tokens, sorted=True, return_inverse=True)
    return unique, inverse


def _refuses(w_hh: Tensor, **_: Any) -> str | None:
    if w_hh.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {checks.short(w_hh.dtype)}"
    return None


def _refuses_step(w_hh: Tensor, packed: Tensor | None, **_: Any) -> str | None:
    return "weights were not packed" if packed is None else _refuses(w_hh)


def _cpu_step(
    table: Tensor, index: Tensor | None, w_hh: Tensor, b_hh: Tensor | None, packed: Tensor,
    h: Tensor,
) -> Tensor:  # fmt: skip
    return cpu_kernels.step(table, index, w_hh, packed, h.contiguous())


def _reference_step(
    table: Tensor, index: Tensor | None, w_hh: Tensor, b_hh: Tensor | None,
    packed: Tensor | None, h: Tensor,
) -> Tensor:  # fmt: skip
    return reference.forward(table, index, None, w_hh, b_hh, h, h.shape[0], True, False)[1]


_cpu = layer.Recurrence(
    cpu_kernels.forward, cpu_kernels.backward, cpu_kernels.token_plan, matmul.fastest
)
_reference = layer.Recurrence(
    reference.forward, reference.backward, _reference_token_plan, matmul.plain
)

for _name, _forward, _backward in (
    ("embedding_gru", layer.embedding_forward, layer.embedding_backward),
    ("gru", layer.gru_forward, layer.gru_backward),
):
    register(
        _name,
        "cpu",
        partial(_forward, _cpu),
        partial(_backward, _cpu),
        devices=("cpu",),
        unavailable=extension.unavailable,
        refuses=_refuses,
    )
    register(_name, "reference", partial(_forward, _reference), partial(_backward, _reference))
register(
    "gru_step",
    "cpu",
    _cpu_step,
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_refuses_step,
)
register("gru_step", "reference", _reference_step)


class EmbeddingGRULayer(torch.autograd.Function):
    """tokens [B, T] (or [T, B]) -> output [B, T, H], h_n [B, H]."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tensors, how, save = args[:10], args[10:14], args[14]
        keep = any(ctx.needs_input_grad) and save == "gates"
        output, h_n, gates = _embedding_forward(*tensors, *how, keep)
        ctx.save_for_backward(*tensors, output, gates)
        ctx.how = how
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor, dh_n: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dweight, dw_ih, dw_hh, dbias, dh0 = _embedding_backward(
            doutput.contiguous(), dh_n.contiguous(), *saved, *ctx.how, *needs[1:4]
        )
        grads = (None, dweight, dw_ih, dw_hh, dbias[0], dbias[1], dh0)
        kept = (g if need else None for g, need in zip(grads, needs, strict=False))
        return (*kept, *(None,) * 8)


class GRULayer(torch.autograd.Function):
    """input [B, T, C] (or [T, B, C]) -> output [B, T, H], h_n [B, H]."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tensors, how, save = args[:7], args[7:9], args[9]
        keep = any(ctx.needs_input_grad) and save == "gates"
        output, h_n, gates = _gru_forward(*tensors, *how, keep)
        ctx.save_for_backward(*tensors, output, gates)
        ctx.how = how
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor, dh_n: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dinput, dw_ih, dw_hh, dbias, dh0 = _gru_backward(
            doutput.contiguous(), dh_n.contiguous(), *ctx.saved_tensors, *ctx.how, *needs[:3]
        )
        grads = (dinput, dw_ih, dw_hh, dbias[0], dbias[1], dh0)
        kept = (g if need else None for g, need in zip(grads, needs, strict=False))
        return (*kept, *(None,) * 4)


def step(
    table: Tensor,
    index: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    packed: Tensor | None,
    h: Tensor,
) -> Tensor:
    """The next state [B, H], without gradient; `table` and `index` as in `reference.forward`."""
    return _step(table, index, w_hh, b_hh, packed, h)


def pack(w_hh: Tensor, b_hh: Tensor | None) -> Tensor | None:
    """What `step` takes as `packed`: None where no kernel would use it."""
    if extension.unavailable or w_hh.device.type != "cpu" or w_hh.dtype != torch.float32:
        return None
    return cpu_kernels.pack(w_hh.contiguous(), b_hh)
