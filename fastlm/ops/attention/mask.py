"""Masks as one half-open interval of keys per query row: 8 bytes a row, no [Sq, Sk] tensor.

Causal, windows, documents, prefixes and any intersection of them are of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import checks

_ALIGN = ("bottom_right", "top_left")


@dataclass(frozen=True)
class Coordinates:
    """Where each query row stands; int64 [Sq]. Packed rows count keys over the whole packing."""

    first: Tensor  # first key of the row's sequence
    stop: Tensor  # one past its last key
    place: Tensor  # row number within the sequence
    diagonal: Tensor  # the key that the row is aligned with: the last row with the last key
    sequence: Tensor  # number of the sequence; 0 in dense batches
    keys: int
    packed: bool


def coordinates(
    rows: int,
    keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Coordinates:
    index = torch.arange(rows, device=device)
    zero = torch.zeros_like(index)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return Coordinates(zero, zero + keys, index, index + (keys - rows), zero, keys, False)
    starts_q, starts_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    sequence = torch.searchsorted(starts_q, index, right=True) - 1
    # rows behind the last sequence: an empty range of keys
    behind = sequence >= starts_q.shape[0] - 1
    sequence = sequence.clamp(max=max(0, starts_q.shape[0] - 2))
    first, stop = starts_k[sequence], starts_k[sequence + 1]
    place = index - starts_q[sequence]
    length = starts_q[sequence + 1] - starts_q[sequence]
    diagonal = first + place + (stop - first) - length
    stop_or_none = torch.where(behind, first, stop)
    return Coordinates(first, stop_or_none, place, diagonal, sequence, keys, True)


def row_bounds(
    at: Coordinates, left: int, right: int, lo: Tensor | None, hi: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B|1, H|1, Sq]: the keys [low, high) of each row; (keys, 0) where there is none."""
    low, high = at.first, at.stop
    if left >= 0:
        low = torch.maximum(low, at.diagonal - left)
    if right >= 0:
        high = torch.minimum(high, at.diagonal + right + 1)
    low, high = low[None, None], high[None, None]
    if lo is not None and hi is not None:
        low, high = torch.maximum(low, lo), torch.minimum(high, hi)
    empty = high <= low
    return torch.where(empty, at.keys, low), torch.where(empty, 0, high)


@dataclass(frozen=True)
class Limits:
    """A mask applied to given sizes: a band around the diagonal, and intervals [B|1, H|1, Sq]."""

    left: int = -1
    right: int = -1
    lo: Tensor | None = None
    hi: Tensor | None = None

    def band(self, left: int, right: int) -> Limits:
        return Limits(_tighter(self.left, left), _tighter(self.right, right), self.lo, self.hi)

    def interval(self, lo: Tensor, hi: Tensor) -> Limits:
        lo, hi = lo.to(torch.int32), hi.to(torch.int32)
        if self.lo is not None and self.hi is not None:
            lo, hi = torch.maximum(lo, self.lo), torch.minimum(hi, self.hi)
        return Limits(self.left, self.right, lo, hi)


def _tighter(a: int, b: int) -> int:
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def side(what: str, value: int | None) -> int:
    """-1 for "no limit"."""
    if value is None or value == -1:
        return -1
    if value < 0:
        checks.bad_value("attention", what, ">= 0, or -1 or None for no limit", value)
    return value


def _three_dims(what: str, value: Tensor) -> Tensor:
    """[Sq], [B, Sq] or [B, H, Sq] as [B|1, H|1, Sq]."""
    checks.integer("AttnMask", what, value)
    if value.dim() == 1:
        return value[None, None]
    if value.dim() == 2:
        return value[:, None]
    if value.dim() == 3:
        return value
    checks.bad_value("AttnMask", what, "[Sq], [B, Sq] or [B, H, Sq]", list(value.shape))


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of the run of equal ids around each position, along the last dimension."""
    size = ids.shape[-1]
    index = torch.arange(size, device=ids.device).expand(ids.shape)
    change = torch.ones_like(ids, dtype=torch.bool)
    change[..., 1:] = ids[..., 1:] != ids[..., :-1]
    start = torch.where(change, index, 0).cummax(-1).values
    # the next change to the right, or the end
    following = torch.full_like(index, size)
    following[..., :-1] = torch.where(change[..., 1:], index[..., 1:], size)
    return start, following.flip(-1).cummin(-1).values.flip(-1)


@dataclass(frozen=True)
class _Band:
    left: int
    right: int

    def apply(self, at: Coordinates, limits: Limits) -> Limits:
        return limits.band(self.left, self.right)


@dataclass(frozen=True)
class _TopLeft:
    def apply(self, at: Coordinates, limits: Limits) -> Limits:
        hi = at.first + at.place + 1
        return limits.interval(torch.zeros_like(hi)[None, None], hi[None, None])


@dataclass(frozen=True)
class _Prefix:
    length: int | Tensor

    def apply(self, at: Coordinates, limits: Limits) -> Limits:
        length = self.length
        if isinstance(length, Tensor):
            # one per sequence: of the packing, or of the batch
            length = length.reshape(-1)
            one = length.shape[0] == 1
            length = length[at.sequence] if at.packed and not one else length[:, None]
        hi = torch.maximum((at.diagonal + 1)[None], at.first + length)[:, None]
        return limits.interval(torch.zeros_like(hi), hi)


@dataclass(frozen=True)
class _Intervals:
    lo: Tensor
    hi: Tensor

    def apply(self, at: Coordinates, limits: Limits) -> Limits:
        rows = at.place.shape[0]
        for what, value in (("lo", self.lo), ("hi", self.hi)):
            if value.shape[-1] != rows:
                checks.bad_value("AttnMask", f"{what}.shape[-1]", f"{rows} (as q)", value.shape[-1])
        return limits.interval(self.lo, self.hi)


@dataclass(frozen=True)
class _Documents:
    ids: Tensor | None
    cu_seqlens: Tensor | None

    def apply(self, at: Coordinates, limits: Limits) -> Limits:
        rows = at.place.shape[0]
        if rows != at.keys:
            got = f"{rows} queries and {at.keys} keys"
            checks.bad_value("AttnMask", "documents", "used on as many queries as keys", got)
        ids, starts = self.ids, self.cu_seqlens
        if ids is not None and ids.dim() == 1 and ids.shape[0] != rows:
            ids, starts = None, ids
        if starts is not None:
            starts = starts.to(torch.int32)
            row = torch.arange(rows, dtype=torch.int32, device=starts.device)
            found = torch.searchsorted(starts, row, right=True, out_int32=True)
            # a row in no document stands between two equal edges
            edges = torch.cat((starts[:1], starts, starts[-1:]))
            first, stop = edges.index_select(0, found), edges.index_select(0, found + 1)
            return limits.interval(first[None, None], stop[None, None])
        assert ids is not None
        if ids.shape[-1] != rows:
            checks.bad_value("AttnMask", "ids.shape[-1]", f"{rows} (as q)", ids.shape[-1])
        start, end = _runs(ids)
        return limits.interval(_three_dims("ids", start), _three_dims("ids", end))


_Term = _Band | _TopLeft | _Prefix | _Intervals | _Documents


class AttnMask:
    """Which keys each query attends to: one interval per row. `a & b` keeps what both keep.

    Positions are those of a sequence whose last query stands on its last key ("bottom right"), as
    when the queries continue a cache. In packed batches each sequence has its own positions.
    """

    __slots__ = ("_terms",)

    def __init__(self, terms: tuple[_Term, ...]) -> None:
        self._terms = terms

    def __and__(self, other: AttnMask) -> AttnMask:
        if not isinstance(other, AttnMask):
            return NotImplemented
        return AttnMask(self._terms + other._terms)

    def __repr__(self) -> str:
        return "AttnMask(" + " & ".join(type(t).__name__[1:].lower() for t in self._terms) + ")"

    @staticmethod
    def causal(align: str = "bottom_right") -> AttnMask:
        """No key after the query; "top_left" aligns the first query with the first key."""
        checks.one_of("AttnMask", "align", align, _ALIGN)
        return AttnMask((_Band(-1, 0) if align == "bottom_right" else _TopLeft(),))

    @staticmethod
    def window(left: int | None, right: int | None) -> AttnMask:
        """At most `left` keys before and `right` keys after the query; -1 or None: no limit."""
        return AttnMask((_Band(side("left", left), side("right", right)),))

    @staticmethod
    def documents(ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> AttnMask:
        """Only keys of the query's own document.

        Args:
            ids: [S] or [B, S], any integers; a run of equal ids is one document. A 1-D tensor of
                another length than S is read as `cu_seqlens`.
            cu_seqlens: [documents + 1], where each document starts, and the end of the last.
        """
        if (ids is None) == (cu_seqlens is None):
            got = "neither" if ids is None else "both"
            checks.bad_value("AttnMask", "one of ids and cu_seqlens", "given", got)
        for what, value in (("ids", ids), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                checks.integer("AttnMask", what, value)
        if cu_seqlens is not None:
            checks.shape("AttnMask", "cu_seqlens", cu_seqlens, (None,))
        return AttnMask((_Documents(ids, cu_seqlens),))

    @staticmethod
    def prefix(n: int | Tensor) -> AttnMask:
        """Causal, but the first `n` keys are open to every query; an int, or one per sequence."""
        if isinstance(n, Tensor):
            checks.integer("AttnMask", "n", n)
            if n.dim() > 1:
                checks.bad_value("AttnMask", "n", "an int or [B]", list(n.shape))
        return AttnMask((_Prefix(n),))

    @staticmethod
    def intervals(lo: Tensor, hi: Tensor) -> AttnMask:
        """Keys lo <= j < hi; integers [Sq], [B, Sq] or [B, H, Sq], cut to the keys there are."""
        return AttnMask((_Intervals(_three_dims("lo", lo), _three_dims("hi", hi)),))

    @staticmethod
    def from_dense(mask: Tensor) -> AttnMask:
        """From booleans [Sq, Sk], [B, Sq, Sk] or [B, H, Sq, Sk], True where a key is attended to.

        Raises:
            ValueError: the keys of a row are not one interval; such a mask goes into `bias`.
        """
        checks.tensor("AttnMask", "mask", mask)
        if mask.dtype != torch.bool:
            checks.bad_type("AttnMask", "mask", "bool", checks.short(mask.dtype))
        if not 2 <= mask.dim() <= 4:
            checks.bad_value("AttnMask", "mask", "2-D, 3-D or 4-D", list(mask.shape))
        count = mask.sum(-1)
        lo = mask.to(torch.int8).argmax(-1) if mask.shape[-1] else count
        key = torch.arange(mask.shape[-1], device=mask.device)
        same = mask == ((key >= lo[..., None]) & (key < (lo + count)[..., None]))
        if not bool(same.all()):
            row = (~same).any(-1).nonzero()[0].tolist()
            expected = "one interval of keys per row"
            remedy = "pass it as bias with -inf instead"
            checks.bad_value("AttnMask", "mask", expected, f"more in row {row}", remedy)
        return AttnMask.intervals(lo, lo + count)

    def limits(self, at: Coordinates, window: Limits) -> Limits:
        """The mask within `window`, for rows at these coordinates."""
        for term in self._terms:
            window = term.apply(at, window)
        return window

    def to_dense(self, rows: int, keys: int) -> Tensor:
        """Booleans [rows, keys], or [B|1, H|1, rows, keys] where the mask differs over them."""
        device = next(
            (v.device for t in self._terms for v in vars(t).values() if isinstance(v, Tensor)),
            torch.device("cpu"),
        )
        at = coordinates(rows, keys, None, None, device)
        found = self.limits(at, Limits())
        low, high = row_bounds(at, found.left, found.right, found.lo, found.hi)
        key = torch.arange(keys, device=device)
        dense = (key >= low[..., None]) & (key < high[..., None])
        return dense[0, 0] if dense.shape[:2] == (1, 1) else dense
