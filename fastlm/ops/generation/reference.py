"""Decoding in plain PyTorch, one Python step a token: specification, fallback and oracle.

Sequences are left-aligned: at step t every row reads its token t, from its prompt or of its own
making, so token i of a row comes from the logits at step prompt length - 1 + i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..embedding_gru import reference as gru

#: what fills `tokens` past the end of a row: the default ignore_index of the losses
PAD = -100

Cell = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# (tokens [B], state, rows that have ended [B]) -> (logits [B, V], state)
Step = Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
# (logits [n, V], rows [n], positions [n]) -> (tokens [n], log-probs [n])
Sampler = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Weights(NamedTuple):
    """In the dtype of the computation."""

    embedding: Tensor  # [V, D]
    cells: list[Cell]  # w_ih, w_hh, b_ih, b_hh of each layer
    head_weight: Tensor | None  # [classes, H]
    head_bias: Tensor | None


class Prompts(NamedTuple):
    tokens: Tensor  # [B, P], right-padded
    lengths: Tensor  # [B], in [1, P]


class Made(NamedTuple):
    tokens: Tensor  # [B, max_new], PAD past the end
    logprobs: Tensor  # [B, max_new], 0 past the end
    lengths: Tensor  # [B]
    state: Any


def step(weights: Weights, tokens: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B], h [L, B, H] -> logits [B, classes] (no class without a head), h."""
    batch, states = tokens.shape[0], []
    input = weights.embedding[tokens]
    for number, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights.cells):
        table = torch.nn.functional.linear(input, w_ih, b_ih)
        input = gru.forward(table, None, None, w_hh, b_hh, h[number], batch, True, False)[1]
        states.append(input)
    if weights.head_weight is None:
        return input.new_empty(batch, 0), torch.stack(states)
    logits = torch.nn.functional.linear(input, weights.head_weight, weights.head_bias)
    return logits, torch.stack(states)


def loop(
    step: Step, sampler: Sampler, prompts: Prompts, stops: Tensor | None, max_new: int, state: Any
) -> Made:
    """`stops`: tokens [n] that end their row. A row that has ended reads its last token again."""
    batch, device = prompts.tokens.shape[0], prompts.tokens.device
    tokens = torch.full((batch, max_new), PAD, device=device)
    logprobs = torch.zeros(batch, max_new, dtype=torch.float64, device=device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    width = prompts.tokens.shape[1]
    current = prompts.tokens[:, 0]
    for t in range(width + max_new - 1):
        logits, state = step(current, state, done)
        position = t + 1 - prompts.lengths
        following = prompts.tokens[:, min(t + 1, width - 1)]
        current = torch.where(position < 0, following, current)
        rows = ((position >= 0) & ~done).nonzero()[:, 0]
        if rows.numel():
            at = position[rows]
            chosen, logprob = sampler(logits[rows], rows, at)
            tokens[rows, at], logprobs[rows, at] = chosen, logprob.double()
            lengths[rows] = at + 1
            # a row that is no distribution gives -1, which no embedding takes
            ended = (chosen < 0) | (at + 1 == max_new)
            done[rows] = ended if stops is None else ended | torch.isin(chosen, stops)
            current = current.index_copy(0, rows, chosen.clamp(min=0))
        if bool(done.all()):
            break
    return Made(tokens, logprobs, lengths, state)


def sequence(prompts: Prompts, tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, P + max_new - 1]: what each row reads; 0 where it reads nothing any more."""
    batch, width = prompts.tokens.shape
    steps = width + tokens.shape[1] - 1
    at = torch.arange(steps, device=tokens.device).expand(batch, -1)
    own = at - prompts.lengths[:, None]
    read = torch.nn.functional.pad(prompts.tokens, (0, steps - width))
    if tokens.shape[1] == 0:
        return read
    made = tokens.gather(1, own.clamp(0, tokens.shape[1] - 1))
    made = torch.where(own + 1 < lengths[:, None], made, 0)
    return torch.where(own < 0, read, made)


def scored(prompts: Prompts, lengths: Tensor, max_new: int) -> tuple[Tensor, Tensor]:
    """Of all made tokens, row by row: their place in [B * max_new], and in [B * steps] that of
    the state their logits come from."""
    batch, width = prompts.tokens.shape
    at = torch.arange(max_new, device=lengths.device).expand(batch, -1)
    row = torch.arange(batch, device=lengths.device)[:, None]
    source = row * (width + max_new - 1) + prompts.lengths[:, None] - 1 + at
    kept = at < lengths[:, None]
    return kept.flatten().nonzero()[:, 0], source[kept]


def score(
    weights: Weights, prompts: Prompts, tokens: Tensor, lengths: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, row maxima and log sums [B, max_new] of made tokens; states and gates of every
    layer [L, B, steps, H] and [L, B, steps, 4H], 0 where a row reads nothing any more."""
    read = sequence(prompts, tokens, lengths)
    (batch, steps), outputs, all_gates = read.shape, [], []
    end = prompts.lengths + (lengths - 1).clamp(min=0)
    live = (torch.arange(steps, device=read.device) < end[:, None])[..., None]
    input = weights.embedding[read.flatten()]
    for w_ih, w_hh, b_ih, b_hh in weights.cells:
        table = torch.nn.functional.linear(input, w_ih, b_ih)
        input, _, gates = gru.forward(table, None, None, w_hh, b_hh, None, batch, True, False)
        outputs.append(torch.where(live, input.view(batch, steps, -1), 0.0))
        all_gates.append(torch.where(live, gates.view(batch, steps, -1), 0.0))
    place, source = scored(prompts, lengths, tokens.shape[1])
    assert weights.head_weight is not None
    logits = torch.nn.functional.linear(input[source], weights.head_weight, weights.head_bias)
    z = logits / (temperature if temperature > 0 else 1.0)
    top = z.amax(-1)
    log_sum = torch.exp(z - top[:, None]).sum(-1).log()
    picked = z.gather(1, tokens.flatten()[place][:, None])[:, 0]

    def spread(values: Tensor) -> Tensor:
        into = values.new_zeros(tokens.numel())
        return into.index_copy(0, place, values).view(tokens.shape)

    logprobs = spread((picked - top) - log_sum)
    return logprobs, spread(top), spread(log_sum), torch.stack(outputs), torch.stack(all_gates)
