"""The formulas of the preference losses, in plain PyTorch on [B]; autograd differentiates them.

What `op.py` hands over is checked and at least float32. Every sigmoid is taken in the form that
neither overflows nor loses a small probability: log sigmoid, and 1 - sigmoid(x) as sigmoid(-x).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def _unlikely(scaled: Tensor) -> Tensor:
    """-log sigmoid(-x), exact to the last digit of float64 on both sides of the threshold."""
    return softplus(scaled, threshold=50.0)


def pairwise(margin: Tensor, loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """Loss of the difference of (chosen - rejected) log-probs or log-ratios."""
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    right = _unlikely(-beta * margin)
    if label_smoothing == 0:
        return right
    wrong = _unlikely(beta * margin)
    if loss_type == "robust":
        smoothed = (1 - label_smoothing) * right - label_smoothing * wrong
        return smoothed / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)). p = 1 would be infinite, with a gradient of NaN: it counts as 1 - eps."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return logprobs - (-torch.expm1(logprobs)).log()


def kto(
    chosen: Tensor, rejected: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """[B1 + B2] of the log-ratios: a completion gains by being on its side of the baseline."""
    gains = torch.sigmoid(beta * (kl - chosen))
    losses = torch.sigmoid(beta * (rejected - kl))
    return torch.cat((weights[0] * gains, weights[1] * losses))


def reduce(values: Tensor, reduction: str) -> Tensor:
    """The mean of nothing is 0."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" and values.shape[0] else values.sum()
