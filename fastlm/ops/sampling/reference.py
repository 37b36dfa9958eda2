"""Sampling in plain PyTorch, in float64: the specification of the kernels.

Every filter keeps the tokens at or above some logit, so a row has one threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...philox import uniform

# rows are taken in pieces, so that the float64 copies stay small
_PIECE = 1 << 24


def _top_p_threshold(x: Tensor, weights: Tensor, p: float) -> Tensor:
    """[n]: the largest logit t such that the tokens >= t have p of the mass, in weights [n, V]."""
    order = x.sort(dim=-1, descending=True)
    mass = weights.gather(-1, order.indices).cumsum(-1)
    short = (mass < p * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=x.shape[-1] - 1)
    return order.values.gather(-1, short)[..., 0]


def _threshold(
    x: Tensor, weights: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    threshold = x.new_full(x.shape[:-1], -math.inf)
    if 0 < top_k < x.shape[-1]:
        threshold = x.topk(top_k, dim=-1).values[..., -1]
    if top_p < 1:
        left = torch.where(x >= threshold[..., None], weights, 0.0)
        threshold = torch.maximum(threshold, _top_p_threshold(x, left, top_p))
    if min_p > 0:
        threshold = torch.maximum(threshold, x.amax(-1) + temperature * math.log(min_p))
    return threshold


def _piece(
    logits: Tensor, u: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    x = logits.double()
    top = x.amax(-1)
    valid = top.isfinite()  # amax hands on a NaN
    weights = torch.exp((x - top[:, None]) / (temperature if temperature > 0 else 1.0))
    if temperature > 0:
        threshold = _threshold(x, weights, temperature, top_k, top_p, min_p)
        kept = torch.where(x >= threshold[:, None], weights, 0.0)
        cumulative = kept.cumsum(-1)
        hit = (cumulative > u[:, None] * cumulative[:, -1:]) & (kept > 0)
        tokens = hit.to(torch.int8).argmax(-1)
    else:
        tokens = x.argmax(-1)
    logprobs = weights.gather(-1, tokens[:, None])[:, 0].log() - weights.sum(-1).log()
    return torch.where(valid, tokens, -1), torch.where(valid, logprobs, math.nan).float()


def forward(
    logits: Tensor,
    rows: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    seed: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    count, classes = logits.shape
    device = logits.device
    row = torch.arange(count, device=device) if rows is None else rows
    key = torch.full_like(row, seed) if seeds is None else seeds
    when = torch.full_like(row, step) if steps is None else steps
    u = uniform(key, row, when)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    piece = max(1, _PIECE // classes)
    for begin in range(0, count, piece):
        part = slice(begin, begin + piece)
        tokens[part], logprobs[part] = _piece(
            logits[part], u[part], temperature, top_k, top_p, min_p
        )
    return tokens, logprobs
