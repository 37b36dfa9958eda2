"""Row statistics and their gradient in plain PyTorch: the specification, for any float dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """z = scale * softcap(logits), and tanh(logits / softcap) (the logits without softcap)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap == 0:
        return (wide if scale == 1 else wide * scale), wide
    squashed = torch.tanh(wide / softcap)
    return squashed * softcap * scale, squashed


def kept_rows(target: Tensor | None, rows: int, ignore_index: int, device: torch.device) -> Tensor:
    if target is None:
        return torch.ones(rows, dtype=torch.bool, device=device)
    return target.reshape(-1) != ignore_index


def at_target(target: Tensor, kept: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A valid index for every row, and whether the row's own index was valid."""
    index = target.reshape(-1).where(kept, 0)
    valid = (index >= 0) & (index < classes)
    return index.where(valid, 0)[:, None], valid


def forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    entropy: bool,
    sum_sq: bool,
    weighted_sum: bool,
    argmax: bool,
    caller: str,
) -> tuple[Tensor, ...]:
    rows, classes = logits.shape
    z, _ = scores(logits, scale, softcap)
    kept = kept_rows(target, rows, ignore_index, logits.device)
    top = z.amax(-1)
    # a row of -inf alone is measured from 0: -inf - -inf would be NaN
    shifted = z - top.where(top != -math.inf, 0)[:, None]
    e = shifted.exp()
    total = e.sum(-1)
    log_sum = total.log()

    def none(dtype: torch.dtype = z.dtype) -> Tensor:  # outputs must not be one tensor
        return z.new_empty(0, dtype=dtype)

    def per_row(value: Tensor) -> Tensor:
        return torch.where(kept, value, torch.zeros_like(value))

    logprob, spread, squares, weighted, mass = (none() for _ in range(5))
    best = none(torch.int64)
    if target is not None:
        index, valid = at_target(target, kept, classes)
        picked = (z.gather(-1, index)[:, 0] - top) - log_sum
        logprob = per_row(picked.where(valid, math.nan))
    if entropy:
        # 0 log 0 = 0
        moment = torch.where(e == 0, torch.zeros_like(e), e * shifted).sum(-1)
        spread = per_row(log_sum - moment / total)
    if sum_sq:
        squares = per_row(e.square().sum(-1) / total.square())
    if weighted_sum:
        log_p = shifted - log_sum[:, None]
        weight = torch.ones_like(z[:1, :]) if class_weight is None else class_weight
        weighted = per_row((log_p * weight).sum(-1))
        mass = per_row(weight.sum(-1).expand(rows))
    if argmax:
        best = torch.where(kept, (-logits if scale < 0 else logits).argmax(-1), -1)
    lse = per_row(top + log_sum)
    return logprob, lse, spread, squares, weighted, best, per_row(top), per_row(log_sum), mass


def backward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    on_p: Tensor | None,
    on_p_log_p: Tensor | None,
    on_p_squared: Tensor | None,
    on_weight: Tensor | None,
    on_target: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> Tensor:
    rows, classes = logits.shape
    z, squashed = scores(logits, scale, softcap)
    kept = kept_rows(target, rows, ignore_index, logits.device)
    log_p = (z - row_max[:, None]) - log_sum[:, None]
    p = log_p.exp()
    dz = torch.zeros_like(z)
    if on_p is not None:
        dz = dz + p * on_p[:, None]
    if on_p_log_p is not None:
        p_log_p = torch.where(p == 0, torch.zeros_like(p), p * log_p)
        dz = dz + p_log_p * on_p_log_p[:, None]
    if on_p_squared is not None:
        dz = dz + p.square() * on_p_squared[:, None]
    if on_weight is not None:
        weight = torch.ones_like(z[:1, :]) if class_weight is None else class_weight
        dz = dz + weight * on_weight[:, None]
    if on_target is not None and target is not None:
        index, valid = at_target(target, kept, classes)
        dz = dz.scatter_add(-1, index, on_target[:, None])
        # the log-prob of a target out of range is NaN, and so is its gradient
        dz = dz.where(valid[:, None], math.nan)
    slope = scale * (1 - squashed.square()) if softcap != 0 else scale
    return torch.where(kept[:, None], dz * slope, torch.zeros_like(dz)).to(logits.dtype)
