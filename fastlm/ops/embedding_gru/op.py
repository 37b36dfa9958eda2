"""GRU over embedded tokens, and over dense input: the torch ops of one layer in one direction.

Contract. r = sigmoid(x_r + h_r), z = sigmoid(x_z + h_z), n = tanh(x_n + r * h_n), h' = n + z(h - n)
with x = W_ih e + b_ih and h_* = W_hh h + b_hh, gate order r, z, n: torch.nn.GRU. What depends on
the token alone, x, is computed once for each distinct token (`dedupe`), not for each position; the
gradient of an embedding row is one sum over its positions in a fixed order.

Saved for backward: the inputs, `output`, and `gates` [N, 4H] = (r, z, n, W_hn h + b_hn) in float32
(float64 for float64), or no gates with save="hidden": the backward recomputes them in one product.

Sequences of different lengths are the third op, `ragged_gru`, where each stands among N tokens:
see `ragged`. Its input may be rows that tokens share, which `index` chooses.

The second derivative is that of `differentiable`, evaluated again in PyTorch operations.

The cpu backend takes float32, bfloat16 and float16 (computed in float32) and refuses the rest; the
reference takes any float. precision="bf16" rounds the operands of all products to bfloat16; "tf32"
and "bf16x3" are allowances that the backends of the CPU do not use: they compute in float32. The
cuda backend takes bfloat16 up to H = 2048, float16 and float32 up to 1024, less where the device
is too small to hold the recurrent weights on chip; it is deterministic. The triton backend refuses
float64 and precision="bf16", launches once a step and never waits for the device.
Source: Cho et al. 2014 (arXiv:1406.1078), reset after the product as in cuDNN; one table row a
token type as in gather-based inference engines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import checks, extension, matmul, triton_backend
from ...dispatch import register
from ...library import define
from . import cpu_kernels, cuda_kernels, layer, ragged, reference, triton_recurrence

_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, Tensor? reset"
_TOKENS = f"Tensor tokens, Tensor weight, {_WEIGHTS}, Tensor? unique, Tensor? inverse"
_HOW = "str dedupe, int? padding_idx, bool batch_first, bool reverse"
_NEEDS = "bool need_weight, bool need_w_ih, bool need_w_hh"
_NEEDS_INPUT = _NEEDS.replace("need_weight", "need_input")
_WHERE = "Tensor? index, Tensor first, Tensor lengths, Tensor? offsets"
_PRECISION = 'str precision="ieee"'


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
    batch_first, _, save = rest[10:13]
    batch = _batch(tokens.shape, batch_first)
    return _fake_forward(tokens.shape, batch, weight, rest[1], save)


def _fake_embedding_backward(
    doutput: Tensor, dh_n: Tensor, tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_backward(weight, w_ih, w_hh, dh_n.shape[0], rest[12:15])


def _fake_gru_forward(input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> Any:
    batch_first, _, save = rest[4:7]
    batch = _batch(input.shape, batch_first)
    return _fake_forward(input.shape[:2], batch, input, w_hh, save)


def _fake_gru_backward(
    doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_backward(input, w_ih, w_hh, dh_n.shape[0], rest[8:11])


def _fake_ragged_forward(input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> Any:
    index, first, save = rest[4], rest[5], rest[10]
    hidden, tokens = w_hh.shape[1], (input if index is None else index).shape[0]
    return (
        input.new_empty(tokens, hidden),
        input.new_empty(first.shape[0], hidden),
        input.new_empty(tokens if save else 0, 4 * hidden, dtype=_wide_dtype(input)),
    )


def _fake_ragged_backward(
    doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_backward(input, w_ih, w_hh, dh_n.shape[0], rest[12:15])


def _check_tokens(named: dict[str, Any]) -> None:
    op, size, unique = "embedding_gru", named["weight"].shape[0], named["unique"]
    if unique is None:
        checks.index_range(op, "tokens", named["tokens"], size, None)
    else:
        # what the kernels index with; that the plan is of these tokens is the caller's word
        checks.index_range(op, "plan.unique", unique, size, None)
        checks.index_range(op, "plan.inverse", named["inverse"], unique.shape[0], None)


def _check_ragged(named: dict[str, Any]) -> None:
    """A kernel that trusts these would read and write elsewhere."""
    index, rows = named["index"], named["input"].shape[0]
    tokens = rows if index is None else index.shape[0]
    if index is not None:
        checks.index_range("ragged_gru", "index", index, rows, None)
    first, lengths, offsets = named["first"], named["lengths"], named["offsets"]
    if lengths.numel() == 0 or lengths.device.type != "cpu":
        return
    checks.index_range("ragged_gru", "lengths", lengths, tokens + 1, None)
    if offsets is not None:
        checks.index_range("ragged_gru", "lengths", lengths, offsets.shape[0] + 1, None)
        moved = torch.cat((offsets.new_zeros(1), offsets))[lengths]
    else:
        moved = (lengths - 1).clamp(min=0) * named["stride"]
    filled = lengths > 0
    checks.index_range("ragged_gru", "tokens of a sequence", first[filled], tokens, None)
    last = (first + moved)[filled]
    checks.index_range("ragged_gru", "tokens of a sequence", last, tokens, None)


embedding_gru_forward = define(
    "embedding_gru",
    "forward",
    f"({_TOKENS}, {_HOW}, bool save, {_PRECISION}) -> (Tensor output, Tensor h_n, Tensor gates)",
    _fake_embedding_forward,
    _check_tokens,
)
embedding_gru_backward = define(
    "embedding_gru",
    "backward",
    f"(Tensor doutput, Tensor dh_n, {_TOKENS}, Tensor output, Tensor gates, {_HOW}, {_NEEDS}, "
    f"{_PRECISION}) -> "
    "(Tensor dweight, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dh0)",
    _fake_embedding_backward,
)
gru_forward = define(
    "gru",
    "forward",
    f"(Tensor input, {_WEIGHTS}, bool batch_first, bool reverse, bool save, {_PRECISION}) -> "
    "(Tensor output, Tensor h_n, Tensor gates)",
    _fake_gru_forward,
)
gru_backward = define(
    "gru",
    "backward",
    f"(Tensor doutput, Tensor dh_n, Tensor input, {_WEIGHTS}, Tensor output, Tensor gates, "
    f"bool batch_first, bool reverse, {_NEEDS_INPUT}, {_PRECISION}) -> "
    "(Tensor dinput, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dh0)",
    _fake_gru_backward,
)
ragged_gru_forward = define(
    "ragged_gru",
    "forward",
    f"(Tensor input, {_WEIGHTS}, {_WHERE}, int stride, bool reverse, bool save, {_PRECISION}) -> "
    "(Tensor output, Tensor h_n, Tensor gates)",
    _fake_ragged_forward,
    _check_ragged,
)
ragged_gru_backward = define(
    "ragged_gru",
    "backward",
    f"(Tensor doutput, Tensor dh_n, Tensor input, {_WEIGHTS}, {_WHERE}, Tensor output, "
    f"Tensor gates, int stride, bool reverse, {_NEEDS_INPUT}, {_PRECISION}) -> "
    "(Tensor dinput, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dh0)",
    _fake_ragged_backward,
)


def _reference_token_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    unique, inverse = torch.unique(tokens, sorted=True, return_inverse=True)
    return unique, inverse


def _refuses(w_hh: Tensor, **_: Any) -> str | None:
    if w_hh.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {checks.short(w_hh.dtype)}"
    return None


def _of_lengths(dense: Any, sequences: Any) -> Any:
    """The reference of a batch: `sequences` where it has a plan, and no layout then."""

    def recurrence(*args: Any, round: bool = False, plan: Any = None) -> Any:
        if plan is None:
            return dense(*args, round)
        return sequences(*args[:-3], plan, args[-1], round)

    return recurrence


_cpu = layer.Recurrence(
    cpu_kernels.forward,
    cpu_kernels.backward,
    cpu_kernels.token_plan,
    matmul.fastest,
    matmul.each_row,
    cpu_kernels.recompute_gates,
    takes_bfloat16=True,
    multiplies_pairs=matmul.multiplies_pairs,
    may_drop_gates=True,
)
_reference = layer.Recurrence(
    _of_lengths(reference.forward, ragged.forward),
    _of_lengths(reference.backward, ragged.backward),
    _reference_token_plan,
)

for _name, _forward, _backward in (
    ("embedding_gru", layer.embedding_forward, layer.embedding_backward),
    ("gru", layer.gru_forward, layer.gru_backward),
    ("ragged_gru", layer.ragged_forward, layer.ragged_backward),
):
    if _name != "ragged_gru":  # whose sequences the kernels do not know
        register(
            _name,
            "cuda",
            cuda_kernels.of_layer(_forward),
            cuda_kernels.of_layer(_backward),
            devices=("cuda",),
            unavailable=cuda_kernels.unavailable,
            refuses=cuda_kernels.refuses,
            proven=False,
        )
        register(
            _name,
            "triton",
            triton_recurrence.of_layer(_forward),
            triton_recurrence.of_layer(_backward),
            devices=triton_backend.devices,
            unavailable=triton_backend.unavailable,
            refuses=triton_recurrence.refuses,
            proven=False,
        )
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


def distinct_tokens(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """Distinct tokens [U] in ascending order, and the rank of each token [N] among them."""
    use_cpu = not extension.unavailable and tokens.device.type == "cpu"
    return (_cpu if use_cpu else _reference).token_plan(tokens.contiguous(), num_embeddings)
