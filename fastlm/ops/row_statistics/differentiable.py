"""The statistics in PyTorch operations: derivatives of any order, forward mode, `torch.func`.

The first derivative is the kernels' always; what is asked of it afterwards goes through here and
holds several tensors of the size of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...second_order import gradients
from . import reference


def statistics(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    wanted: Any,
) -> tuple[Tensor, ...]:
    """logprob, lse, entropy, sum_sq and weighted_sum; no elements where not wanted."""
    z, _ = reference.scores(logits, scale, softcap)
    kept = reference.kept_rows(target, z.shape[0], ignore_index, z.device)
    # a row that is ignored is not read
    z = torch.where(kept[:, None], z, 0.0)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logprob = spread = squares = weighted = z.new_empty(0)
    if target is not None:
        index, valid = reference.at_target(target, kept, z.shape[1])
        logprob = torch.where(valid, log_p.gather(-1, index)[:, 0], torch.nan)
    if wanted.entropy:
        spread = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)  # 0 log 0 = 0
    if wanted.sum_sq:
        squares = p.square().sum(-1)
    if wanted.weighted_sum:
        weighted = (log_p if class_weight is None else log_p * class_weight).sum(-1)
    found = (logprob, z.logsumexp(-1), spread, squares, weighted)
    return tuple(torch.where(kept, v, 0.0) if v.numel() else v.clone() for v in found)


def class_weight_gradient(
    on_weighted_sum: Tensor,
    logits: Tensor,
    target: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """[N, V], of weights that differ from row to row."""
    z, _ = reference.scores(logits, scale, softcap)
    log_p = (z - row_max[:, None]) - log_sum[:, None]
    dweight = on_weighted_sum[:, None] * log_p
    if target is None:
        return dweight
    return dweight.masked_fill((target.reshape(-1) == ignore_index)[:, None], 0.0)


def first_derivative(
    fast: Callable[..., Sequence[Tensor | None]],
    plain: Callable[..., tuple[Tensor, ...]],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `inputs`, differentiable where that is asked for; fast: upstream, inputs,
    saved -> gradients. upstream: of each output of `plain`; None: not used."""
    if not torch.is_grad_enabled():
        return list(fast(upstream, *inputs, *saved))
    used = [i for i, d in enumerate(upstream) if d is not None]

    def kernels(*tensors: Tensor) -> Sequence[Tensor | None]:
        full: list[Tensor | None] = [None] * len(upstream)
        for i, value in zip(used, tensors, strict=False):
            full[i] = value
        return fast(full, *tensors[len(used) :])

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = plain(*tensors)
        return tuple(found[i] for i in used)

    given = [d for d in upstream if d is not None]
    return gradients(kernels, outputs, given, inputs, saved, needs)  # type: ignore[arg-type]
