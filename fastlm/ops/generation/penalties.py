"""Penalties on tokens that a row has, applied to its logits before temperature and filters.

A token that was read or made:  logit / repetition above 0, logit * repetition below
A token that was made n times:  then less presence + n * frequency

Sources: repetition, Keskar et al. 2019 (arXiv:1909.05858), section 4.1, with the product for
negative logits that has become usual; presence and frequency as in common text-generation APIs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks


class Penalties(NamedTuple):
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def any(self) -> bool:
        return self != (1.0, 0.0, 0.0)


class Counted(NamedTuple):
    """The state of a generation with penalties: that of the decoder, and the tokens of each row."""

    state: Any
    seen: Tensor  # [B, V] int32: twice how often a token was made, + 1 if it was read


def checked(op: str, repetition: float, presence: float, frequency: float) -> Penalties:
    if not 0 < repetition < math.inf:
        checks.bad_value(op, "repetition_penalty", "finite and > 0", repetition, "1 is none")
    for what, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not math.isfinite(value):
            checks.bad_value(op, what, "finite", value, "0 is none")
    return Penalties(float(repetition), float(presence), float(frequency))


def mark_read(seen: Tensor, tokens: Tensor) -> None:
    """Tokens [B, n] of the rows of `seen`; what is out of its range is left out."""
    inside = (tokens >= 0) & (tokens < seen.shape[1])
    read = torch.zeros_like(seen, dtype=torch.bool)
    read.scatter_(1, torch.where(inside, tokens, 0), inside)
    # what is left out was written there too
    read[:, :1] = (tokens == 0).any(1, keepdim=True)
    seen |= read


def apply(logits: Tensor, seen: Tensor, penalties: Penalties) -> Tensor:
    """[n, V], of the rows of `seen`."""
    repetition, presence, frequency = penalties
    made = (seen >> 1).to(logits.dtype)
    moved = torch.where(logits < 0, logits * repetition, logits / repetition)
    return torch.where(seen > 0, moved, logits) - (presence * made.sign() + frequency * made)
