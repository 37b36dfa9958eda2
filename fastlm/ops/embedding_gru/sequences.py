"""Where sequences stand among the tokens of a call: packed documents, padded batches, resets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks


class Where(NamedTuple):
    """Token t of sequence s is number first[s] + t * stride, or first[s] + offsets[t]."""

    first: Tensor  # int64 [sequences]
    lengths: Tensor  # int64 [sequences]
    offsets: Tensor | None  # int64 [steps]
    stride: int

    def to(self, device: torch.device) -> Where:
        """A copy from the host waits for nothing; the other way would."""
        first, lengths, offsets, stride = self
        moved = offsets if offsets is None else offsets.to(device, non_blocking=True)
        return Where(first.to(device, non_blocking=True), lengths.to(device, non_blocking=True),
                     moved, stride)  # fmt: skip

    def last(self, tokens: int) -> Tensor:
        """[sequences]: the last token of each; `tokens`, one past all, for an empty sequence."""
        steps = self.lengths - 1
        if self.offsets is None:
            moved = steps * self.stride
        else:
            moved = self.offsets[steps.clamp(min=0)]
        return torch.where(steps >= 0, self.first + moved, tokens)


def documents(cu_seqlens: Tensor) -> Where:
    """Documents one after the other; offsets [0, ..., total], empty documents allowed."""
    ends = cu_seqlens.long()
    return Where(ends[:-1], ends[1:] - ends[:-1], None, 1)


def padded(op: str, lengths: Tensor, shape: torch.Size, batch_first: bool) -> Where:
    """The first tokens of each row of [B, T] ([T, B] without `batch_first`)."""
    checks.integer(op, "lengths", lengths)
    batch, steps = (shape[0], shape[1]) if batch_first else (shape[1], shape[0])
    checks.shape(op, "lengths", lengths, (batch,), "one for each sequence")
    if checks.readable(lengths):
        for row, value in enumerate(lengths.tolist()):
            if not 0 <= value <= steps:
                checks.bad_value(op, f"lengths[{row}]", f"in [0, {steps}], the steps", value)
    rows = torch.arange(batch, device=lengths.device)
    return Where(rows * (steps if batch_first else 1), lengths.long(), None,
                 1 if batch_first else batch)  # fmt: skip


def packed(batch_sizes: Tensor, count: int) -> Where:
    """A PackedSequence: step after step, the longest sequence first."""
    ascending = batch_sizes.flip(0).contiguous()
    rows = torch.arange(count, device=batch_sizes.device)
    lengths = batch_sizes.shape[0] - torch.searchsorted(ascending, rows, right=True)
    return Where(rows, lengths, batch_sizes.cumsum(0) - batch_sizes, 0)


def check_offsets(op: str, cu_seqlens: Tensor, total: int) -> None:
    checks.tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        remedy = "call .int() once per batch"
        checks.bad_type(op, "cu_seqlens", "int32", checks.short(cu_seqlens.dtype), remedy)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        checks.bad_value(op, "cu_seqlens", "[documents + 1]", list(cu_seqlens.shape))
    if checks.readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        falls = any(a > b for a, b in zip(ends[:-1], ends[1:], strict=True))
        if ends[0] != 0 or ends[-1] != total or falls:
            expected = f"ascending from 0 to {total}, the number of tokens"
            checks.bad_value(op, "cu_seqlens", expected, ends)


class Layout(NamedTuple):
    """How the tokens of one call are read."""

    batch: int  # sequences, or documents
    where: Where | None  # None: a dense batch
    begin: Tensor | None  # tokens that start from a zero state
    offsets: Tensor | None  # documents in one long row, whose states are read afterwards
    lengths: Tensor | None = None  # padded rows on a GPU, computed whole and masked afterwards


def layout(
    op: str, shape: torch.Size, batch_first: bool, cu_seqlens: Tensor | None,
    lengths: Tensor | None, h0: Tensor | None, begin: Tensor | None,
) -> Layout:  # fmt: skip
    if lengths is not None:
        where, batch = padded(op, lengths, shape, batch_first), shape[0 if batch_first else 1]
        if lengths.device.type == "cpu":
            return Layout(batch, where, begin, None)
        return Layout(batch, None, begin, None, where.lengths)
    if cu_seqlens is None:
        return Layout(shape[0 if batch_first else 1], None, begin, None)
    check_offsets(op, cu_seqlens, shape[1])
    count = cu_seqlens.shape[0] - 1
    if cu_seqlens.device.type == "cpu":
        return Layout(count, documents(cu_seqlens), begin, None)
    if h0 is not None:
        remedy = "give cu_seqlens on the CPU"
        checks.bad_value(op, "the initial state", "None for cu_seqlens on a GPU", "one", remedy)
    row = one_row(cu_seqlens, shape[1])
    return Layout(count, None, row if begin is None else begin | row, cu_seqlens)


def starts(
    op: str, shape: torch.Size, batch_first: bool, reset: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """uint8 mask of tokens that start from a zero state, in the layout of the input."""
    if segment_ids is not None:
        checks.shape(op, "segment_ids", segment_ids, tuple(shape))
        dim = 1 if batch_first else 0
        length = shape[dim]
        changes = torch.zeros(shape, dtype=torch.bool, device=segment_ids.device)
        if length > 1:
            now, before = (segment_ids.narrow(dim, start, length - 1) for start in (1, 0))
            changes.narrow(dim, 1, length - 1).copy_(now != before)
        if reset is not None:
            checks.shape(op, "reset", reset, tuple(shape))
            changes = changes | reset.bool()
        reset = changes
    if reset is None:
        return None
    checks.shape(op, "reset", reset, tuple(shape))
    return reset.ne(0).to(torch.uint8)


def reverse_starts(begin: Tensor | None, batch_first: bool, where: Where | None) -> Tensor | None:
    """Where the other direction starts afresh: at the token before each start."""
    if begin is None:
        return None
    dim = 1 if batch_first else 0
    shifted = torch.zeros_like(begin)
    length = begin.shape[dim]
    if length > 1:
        shifted.narrow(dim, 0, length - 1).copy_(begin.narrow(dim, 1, length - 1))
    if where is not None:
        # a start after the last token of a sequence says nothing about that sequence
        flat = torch.cat((shifted.reshape(-1), shifted.new_zeros(1)))
        flat[where.last(begin.numel())] = 0
        shifted = flat[:-1].view(begin.shape)
    return shifted


class Padded(NamedTuple):
    """Sequences of the first `lengths` steps of each row, for kernels that take whole rows. No
    length is read on the host."""

    lengths: Tensor
    batch_first: bool

    def _steps(self, x: Tensor) -> Tensor:
        """Step of each token, shaped to broadcast against `x` with its dimensions."""
        dim = 1 if self.batch_first else 0
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        return torch.arange(x.shape[dim], device=x.device).view(shape)

    def _lengths(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[0 if self.batch_first else 1] = -1
        return self.lengths.view(shape)

    def turned(self, x: Tensor) -> Tensor:
        """Every sequence from its last token to its first; twice gives `x` again."""
        step, length = self._steps(x), self._lengths(x)
        other = torch.where(step < length, length - 1 - step, step)
        return x.gather(1 if self.batch_first else 0, other.expand(x.shape))

    def turned_starts(self, begin: Tensor | None) -> Tensor | None:
        """Where turned sequences start afresh, which is at the token before each start."""
        moved = reverse_starts(begin, self.batch_first, None)
        if moved is None:
            return None
        turned = self.turned(moved)
        # the first step of a turned row was marked by a start behind the last token
        return torch.where(self._steps(turned) == 0, turned.new_zeros(()), turned)

    def masked(self, output: Tensor) -> Tensor:
        none = torch.zeros((), dtype=output.dtype, device=output.device)
        return torch.where(self._steps(output) < self._lengths(output), output, none)

    def last(self, output: Tensor, h0: Tensor | None) -> Tensor:
        """[B, H]: the state after the last step of each; the initial one where there is none."""
        begin = 0.0 if h0 is None else h0
        if output.numel() == 0:
            return output.new_zeros(self.lengths.shape[0], output.shape[2]) + begin
        rows = output if self.batch_first else output.transpose(0, 1)
        at = (self.lengths - 1).clamp(min=0)
        state = rows[torch.arange(rows.shape[0], device=rows.device), at]
        return torch.where(self.lengths[:, None] > 0, state, begin)


def one_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """[1, total] starts of documents, for where their lengths cannot be read: on a GPU."""
    mask = torch.zeros(total + 1, dtype=torch.uint8, device=cu_seqlens.device)
    mask[cu_seqlens.long()] = 1
    return mask[:total].unsqueeze(0)


def final_states(output: Tensor, cu_seqlens: Tensor, reverse: bool = False) -> Tensor:
    """[documents, H]: the state after the last token processed, zeros for an empty document."""
    begin, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if output.shape[0] == 0:
        return output.new_zeros(ends.shape[0], output.shape[1])
    last = begin.clamp(max=output.shape[0] - 1) if reverse else (ends - 1).clamp(min=0)
    return torch.where((ends > begin)[:, None], output[last], 0.0)
