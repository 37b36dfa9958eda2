"""The gradient of a decoding: from what it stored, without a second forward through the GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...library import once_differentiable
from ..linear_row_statistics import op as linear
from ..linear_row_statistics.chunks import Compared, Layer, Needs
from ..row_statistics.op import Upstream
from . import reference
from .reference import PAD, Prompts


class Kept(NamedTuple):
    """What `MadeLogprobs` needs: `made` of [B, max_new], the rest as the ops return it."""

    logprobs: Tensor
    prompts: Tensor
    prompt_lengths: Tensor
    tokens: Tensor
    lengths: Tensor
    row_max: Tensor
    log_sum: Tensor
    output: Tensor
    gates: Tensor


class MadeLogprobs(torch.autograd.Function):
    """The log-probs of a decoding, with the gradient that its stored gates and states give."""

    @staticmethod
    def forward(
        ctx: Any, kept: Kept, temperature: float, padding_idx: int | None, rows: Tensor | None,
        *parameters: Any,
    ) -> Tensor:  # fmt: skip
        embedding = parameters[0] if rows is None else rows
        ctx.save_for_backward(*kept[1:], embedding, *parameters[1:])
        ctx.scale = 1.0 / temperature if temperature > 0 else 1.0
        ctx.padding_idx = padding_idx
        return kept.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        kept, parameters = Kept(dlogprobs, *saved[:8]), saved[8:]
        embedding, *cells, head_weight, head_bias = parameters
        needs = ctx.needs_input_grad[4:]
        doutput, dhead, dbias = _head_backward(kept, ctx.scale, head_weight, head_bias, needs[-2:])
        grads: list[Tensor | None] = []
        batch, hidden = kept.prompts.shape[0], doutput.shape[-1]
        for number in range(len(cells) // 4 - 1, -1, -1):
            w_ih, w_hh, b_ih, b_hh = cells[4 * number : 4 * number + 4]
            shared = (w_ih, w_hh, b_ih, b_hh, None, None)
            ends = (doutput.to(w_hh.dtype), doutput.new_zeros(batch, hidden, dtype=w_hh.dtype))
            state, gates = kept.output[number], kept.gates[number]
            gates = gates.flatten(0, 1)
            of_cell = needs[1 + 4 * number : 5 + 4 * number]
            if number:
                below = kept.output[number - 1].to(w_hh.dtype)
                doutput, dw_ih, dw_hh, db, _ = torch.ops.fastlm.gru_backward(
                    *ends, below, *shared, state, gates, True, False, True, *of_cell[:2]
                )
            else:
                read = reference.sequence(Prompts(*kept[1:3]), kept.tokens, kept.lengths)
                dweight, dw_ih, dw_hh, db, _ = torch.ops.fastlm.embedding_gru_backward(
                    *ends, read, embedding, *shared, None, None, state, gates, "batch",
                    ctx.padding_idx, True, False, needs[0], *of_cell[:2],
                )  # fmt: skip
            grads = [dw_ih, dw_hh, db[0], db[1], *grads]
        every = (dweight, *grads, dhead, dbias)
        kept_grads = (g if need else None for g, need in zip(every, needs, strict=True))
        return (None, None, None, None, *kept_grads)


def _head_backward(
    kept: Kept, scale: float, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the last layer's states [B, steps, H], of the head's weight and bias."""
    place, source = reference.scored(Prompts(*kept[1:3]), kept.lengths, kept.tokens.shape[1])
    last = kept.output[-1]
    # in the dtype of the states: a bfloat16 head was widened to make the tokens
    layer = Layer(
        last.flatten(0, 1)[source],
        weight.detach().to(last.dtype),
        None if bias is None else bias.detach().to(last.dtype),
    )
    upstream = kept.logprobs.flatten()[place].to(last.dtype)
    statistics = (x.flatten()[place] for x in (kept.row_max, kept.log_sum))
    unused = last.new_empty(0)
    compared = Compared(kept.tokens.flatten()[place], None, PAD, scale, 0.0)
    dinput, dweight, dbias = linear.gradients(
        layer,
        compared,
        (*statistics, unused, unused, unused),
        Upstream(logprob=upstream),
        Needs(True, *needs),
        0,
    )
    assert dinput is not None
    doutput = torch.zeros_like(last).flatten(0, 1).index_copy(0, source, dinput).view(last.shape)
    dtype = weight.dtype
    return (
        doutput,
        None if dweight is None else dweight.to(dtype),
        None if dbias is None else dbias.to(dtype),
    )
