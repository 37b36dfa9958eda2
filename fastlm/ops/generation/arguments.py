"""The arguments of `generate` and `generation_logprobs`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from . import penalties
from .penalties import Penalties
from .reference import PAD, Prompts
from .weights import DecoderWeights


def _one_prompt(op: str, name: str, prompt: Any) -> Tensor:
    if not isinstance(prompt, Tensor):
        prompt = torch.tensor(prompt, dtype=torch.int64) if len(prompt) else torch.empty(0).long()
    checks.integer(op, name, prompt)
    checks.shape(op, name, prompt, (None,), "one prompt")
    return prompt.long()


def read_prompts(op: str, prompts: Any, prompt_lengths: Tensor | None) -> tuple[Prompts, bool]:
    """Right-padded with 0, and whether it is a single prompt."""
    if not isinstance(prompts, Tensor) and all(isinstance(p, int) for p in prompts):
        prompts = _one_prompt(op, "prompts", prompts)
    single = isinstance(prompts, Tensor) and prompts.dim() == 1
    if isinstance(prompts, Tensor) and not single:
        checks.integer(op, "prompts", prompts)
        checks.shape(op, "prompts", prompts, (None, None), "[B, P], right-padded")
        batch, width = prompts.shape
        lengths = prompt_lengths
        if lengths is None:
            lengths = prompts.new_full((batch,), width, dtype=torch.int64)
        checks.integer(op, "prompt_lengths", lengths)
        checks.shape(op, "prompt_lengths", lengths, (batch,), "one per prompt")
        checks.same_device(op, "prompt_lengths", lengths, "prompts", prompts)
        tokens, lengths = prompts.long(), lengths.long()
    else:
        if prompt_lengths is not None:
            got = "a list or a single prompt"
            checks.bad_value(op, "prompts with prompt_lengths", "[B, P]", got)
        rows = [prompts] if single else prompts
        rows = [_one_prompt(op, f"prompts[{i}]", row) for i, row in enumerate(rows)]
        sizes = [row.shape[0] for row in rows]
        width = max(sizes, default=1)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor(sizes, dtype=torch.int64, device=tokens.device)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 1 or high > width:
            bad = int(((lengths < 1) | (lengths > width)).int().argmax())
            remedy = "begin with a token of your own, as that which ends documents" * (low < 1)
            wanted = f"in [1, {max(1, width)}]"
            checks.bad_value(op, f"length of prompt {bad}", wanted, int(lengths[bad]), remedy)
        tokens = tokens[:, :high]
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return Prompts(torch.where(at < lengths[:, None], tokens, 0), lengths.contiguous()), single


def read_stops(op: str, stop: int | Sequence[int] | Tensor | None, like: Tensor) -> Tensor | None:
    """Distinct tokens [n]."""
    if stop is None:
        return None
    if isinstance(stop, int):
        stop = [stop]
    if not isinstance(stop, Tensor):
        stop = torch.tensor(stop, dtype=torch.int64, device=like.device)
    checks.integer(op, "stop", stop)
    return stop.reshape(-1).long().to(like.device)


def read_rows(op: str, rows: Tensor | None, prompts: Prompts) -> Tensor:
    batch = prompts.tokens.shape[0]
    if rows is None:
        return torch.arange(batch, device=prompts.tokens.device)
    checks.integer(op, "rows", rows)
    checks.shape(op, "rows", rows.reshape(-1), (batch,), "one per prompt")
    checks.same_device(op, "rows", rows, "prompts", prompts.tokens)
    return rows.reshape(-1).long().contiguous()


def check_vocabulary(op: str, weights: DecoderWeights, prompts: Prompts) -> None:
    checks.same_device(op, "prompts", prompts.tokens, "the weights", weights.wide.embedding)
    checks.index_range(op, "prompts", prompts.tokens, weights.vocabulary, None)


def read_state(op: str, weights: DecoderWeights, state: Any, batch: int) -> Tensor | None:
    if state is None:
        return None
    checks.floating(op, "state", state)
    checks.shape(op, "state", state, (weights.layers, batch, weights.hidden), "layers, B, H")
    return state.to(weights.wide.embedding.dtype)


def check_distributions(op: str, tokens: Tensor) -> None:
    """A GPU is not waited for: there the token is -1 and the log-prob NaN."""
    if tokens.device.type != "cpu" or tokens.numel() == 0 or not bool((tokens == -1).any()):
        return
    row, position = (tokens == -1).nonzero()[0].tolist()
    checks.bad_value(
        op, f"the logits of row {row} at token {position}",
        "finite or -inf, with one finite value", "NaN, +inf or only -inf",
    )  # fmt: skip


class Request(NamedTuple):
    """The checked arguments of one call."""

    op: str
    prompts: Prompts
    rows: Tensor
    stops: Tensor | None
    max_new: int
    seed: int
    step: int
    options: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    state: Any  # of the decoder
    penalties: Penalties
    seen: Tensor | None  # of a state with penalties
    history: Tensor | None

    def counts(self, classes: int) -> Tensor | None:
        """[B, classes] of `Counted`, with what is read now; None without penalties."""
        if not self.penalties.any:
            return None
        prompts, lengths = self.prompts
        shape = (prompts.shape[0], classes)
        seen = self.seen
        if seen is None:
            seen = prompts.new_zeros(shape, dtype=torch.int32)
            inside = torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]
            penalties.mark_read(seen, torch.where(inside, prompts, PAD))
        else:
            checks.shape(self.op, "state.seen", seen, shape, "B, V")
            seen = seen.clone()
        if self.history is not None:
            penalties.mark_read(seen, self.history)
        return seen
