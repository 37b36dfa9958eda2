"""The gradient of one batch: in parts that fit into memory, in the precision that was asked for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastlm import extension

from .config import TrainConfig
from .distributed import IGNORED, Loss, Ranks
from .kinds import LanguageModel


def slow_precision(device: torch.device, precision: str) -> str | None:
    """Why a precision that was asked for will not be the faster one here."""
    if precision == "bf16" and device.type == "cpu" and extension.cpu_isa() != "avx512_bf16":
        return (
            "note: this processor has no products of bfloat16 (AVX512_BF16): bf16 saves memory "
            "here, no time"
        )
    return None


def forward_context(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for "bf16": bfloat16 has the exponents of float32, so no loss is scaled."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def forward(
    loss_of: Loss, tokens: Tensor, targets: Tensor, state: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """(what training minimises, state); `loss_of`: `loss` of a model."""
    # models of a caller need know of smoothing only when it is on
    options: dict[str, Any] = {}
    if config.label_smoothing:
        options["label_smoothing"] = config.label_smoothing
    with forward_context(tokens.device, config.precision):
        return loss_of(tokens, targets, state, **options)


def _carried(model: LanguageModel, state: Tensor) -> Tensor | None:
    """In the dtype of the weights, whatever autocast made of it: the next step may be without."""
    return state.detach().to(model.head.weight.dtype) if model.carries_state else None


def backward(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    state: Tensor | None,
    config: TrainConfig,
    *,
    loss_of: Loss | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the gradient of the batch's mean loss; (that loss, the state to carry), both detached.

    Rows go through the model in `config.accumulate` parts. Each part counts by the targets it has,
    on all ranks, which makes the sum the mean over the batch even where targets are ignored; each
    takes and leaves its own rows of the state [L, B, H]. `loss_of`: `model.loss` over all ranks.
    """
    loss_of = loss_of or model.loss
    if config.accumulate == 1:
        loss, after = forward(loss_of, tokens, targets, state, config)
        loss.backward()
        return loss.detach(), _carried(model, after)
    token_parts = tokens.chunk(config.accumulate)
    target_parts = targets.chunk(config.accumulate)
    state_parts: Any = [None] * len(token_parts)
    if state is not None:
        state_parts = state.split([len(part) for part in token_parts], 1)
    ranks = ranks or Ranks()
    kept = ranks.totals([int((part != IGNORED).sum()) for part in target_parts])
    # the others leave their gradient on its rank, for this one to sum over all
    last = max((number for number, count in enumerate(kept) if count), default=len(kept) - 1)
    # of nothing the mean is NaN, here as in one part
    total, states = torch.full((), 0.0 if sum(kept) else torch.nan, device=tokens.device), []
    for number, (part, wanted, before, count) in enumerate(
        zip(token_parts, target_parts, state_parts, kept, strict=True)
    ):
        with ranks.apart(number != last):
            loss, after = forward(loss_of, part, wanted, before, config)
            # without any target too: FSDP2 gives its whole parameters back in the backward
            if count or not sum(kept):
                share = loss * (count / sum(kept)) if count else loss
                share.backward()
                total += share.detach()
        if (left := _carried(model, after)) is not None:
            states.append(left)
    return total, torch.cat(states, 1) if states else None
