"""`token_plan`: which rows of an embedding a batch uses, and where. Made by a data loader."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import checks, extension
from . import cpu_kernels


class TokenPlan(NamedTuple):
    """Distinct tokens of a batch, made once by `token_plan` and given to `embedding_gru`.

    unique [U]: distinct tokens, ascending. inverse [N]: rank of each token among them. order [N]:
    positions sorted by token, stable; those of unique[i] stand at offsets[i]:offsets[i + 1].

    A DataLoader with pin_memory=True pins it; `.to(device, non_blocking=True)` as of a tensor.
    """

    unique: Tensor
    inverse: Tensor
    offsets: Tensor
    order: Tensor

    def pin_memory(self, device: Any = None) -> TokenPlan:
        return TokenPlan(*(x.pin_memory(device) for x in self))

    def to(self, device: Any, non_blocking: bool = False) -> TokenPlan:
        return TokenPlan(*(x.to(device, non_blocking=non_blocking) for x in self))

    def counts(self) -> Tensor:
        """[U]: how often each distinct token occurs."""
        return self.offsets[1:] - self.offsets[:-1]


def token_plan(ids: Tensor | np.ndarray, num_embeddings: int) -> TokenPlan:
    """Which rows of an embedding a batch uses, and where.

    Same as, for tensors:
        unique, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        TokenPlan(unique, inverse.flatten(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
                  ids.flatten().argsort(stable=True))

    On a numpy array it neither holds the GIL nor starts a thread: it may run in a forked or spawned
    worker of a DataLoader, for example in `collate_fn`.

    Args:
        ids: [...], tensor or numpy array of any integer dtype, in [0, num_embeddings).
        num_embeddings: rows of the embedding.

    Returns:
        `TokenPlan` for `ids` flattened: int64 tensors on the device of `ids`, of an array the CPU.

    Raises:
        TypeError: ids are not integers. IndexError: an id is out of range (CPU), with its value
        and position. ValueError: num_embeddings is negative.
    """
    if num_embeddings < 0:
        checks.bad_value("token_plan", "num_embeddings", "at least 0", num_embeddings)
    if isinstance(ids, np.ndarray):
        if extension.tokens is not None:
            return _from_module(ids, num_embeddings)
        ids = _as_tensor(ids)
    checks.integer("token_plan", "ids", ids)
    here = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if here and extension.tokens is not None:
        return _from_module(ids.numpy(), num_embeddings)
    checks.index_range("token_plan", "ids", ids, num_embeddings, None)
    flat = ids.reshape(-1).long()
    if here and extension.unavailable is None:
        return TokenPlan(*cpu_kernels.whole_plan(flat.contiguous(), num_embeddings))
    return _plain(flat)


def _from_module(ids: np.ndarray, num_embeddings: int) -> TokenPlan:
    fields = extension.tokens.plan(ids, num_embeddings)
    return TokenPlan(*(torch.from_numpy(x) for x in fields))


def _as_tensor(ids: np.ndarray) -> Tensor:
    """int64; an id too large for it becomes negative, which is out of range all the same."""
    if ids.dtype.kind not in "iu":
        checks.bad_type("token_plan", "ids", "an integer array", ids.dtype)
    return torch.from_numpy(ids.astype(np.int64))


def _plain(flat: Tensor) -> TokenPlan:
    unique, inverse, counts = torch.unique(
        flat, sorted=True, return_inverse=True, return_counts=True
    )
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return TokenPlan(unique, inverse, offsets, inverse.argsort(stable=True))
