"""Checks that `gru` and `embedding_gru` share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import checks

PRECISIONS = ("auto", "ieee", "bf16x3", "tf32", "bf16")

Cell = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh


def check_weights(
    op: str, features: int, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> int:
    """The hidden size."""
    checks.floating(op, "w_ih", w_ih)
    hidden = w_hh.shape[-1]
    checks.shape(op, "w_hh", w_hh, (3 * hidden, hidden), "three gates r, z, n")
    checks.shape(op, "w_ih", w_ih, (3 * hidden, features), "three gates, input size")
    for name, value in (("w_hh", w_hh), ("b_ih", b_ih), ("b_hh", b_hh)):
        if value is not None:
            checks.same_dtype(op, name, value, "w_ih", w_ih)
            checks.same_device(op, name, value, "w_ih", w_ih)
            if name != "w_hh":
                checks.shape(op, name, value, (3 * hidden,))
    return hidden


def cells_of(op: str, flat_weights: Sequence[Tensor], count: int, bias: bool) -> list[Cell]:
    """The weights of every layer and direction."""
    size = 4 if bias else 2
    if len(flat_weights) != count * size:
        checks.bad_value(op, "flat_weights", f"{count * size} tensors", len(flat_weights))
    groups = (flat_weights[i * size : (i + 1) * size] for i in range(count))
    return [(g[0], g[1], g[2] if bias else None, g[3] if bias else None) for g in groups]


def check_options(op: str, precision: str, save: str) -> str:
    checks.one_of(op, "precision", precision, PRECISIONS)
    checks.one_of(op, "save", save, ("gates", "hidden"))
    return precision


def check_state(op: str, name: str, h: Tensor | None, shape: tuple[int, ...], w: Tensor) -> None:
    if h is not None:
        checks.shape(op, name, h, shape)
        checks.same_dtype(op, name, h, "the weights", w)


def is_single(
    op: str, name: str, dims: int, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> bool:
    """Whether there is no batch dimension; `dims` counts batch and steps."""
    if dims not in (1, 2):
        checks.bad_value(op, name, "batched or one sequence", f"{dims} leading dimensions")
    if cu_seqlens is not None and dims == 2:
        checks.bad_value(op, f"{name} with cu_seqlens", "packed [total]", "a batch")
    if lengths is not None and (dims == 1 or cu_seqlens is not None):
        checks.bad_value(op, f"{name} with lengths", "a batch without cu_seqlens", "something else")
    return dims == 1
