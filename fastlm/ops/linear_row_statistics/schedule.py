"""Whole rows in chunks, or tiles of rows and classes: the loop that one call runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_statistics.op import Wanted
from . import chunks, slices
from .chunks import Chunk, Compared, Layer, Needs, RowKernels, UpstreamOfRows


def forward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    wanted: Wanted,
    chunk: Chunk,
    out: tuple[Tensor, ...],
    upstream: UpstreamOfRows | None = None,
    needs: Needs = chunks.NO_NEEDS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the statistics into `out`, and return the gradients that `needs` names, for input,
    weight and bias, of the loss whose gradient with respect to the statistics is `upstream`, which
    is called for some rows at a time, once for each."""
    loop = slices.forward if chunk.tile_bytes else chunks.forward
    with torch.autocast(layer.input.device.type, enabled=False):
        return loop(kernels, layer, compared, wanted, chunk, out, upstream, needs)


def backward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: tuple[Tensor | None, ...],
    chunk: Chunk,
    needs: Needs,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that `needs` names, for the coefficients of each row; computes the logits again.
    That of the weight is added to `into`, if given."""
    loop = slices.backward if chunk.tile_bytes else chunks.backward
    with torch.autocast(layer.input.device.type, enabled=False):
        return loop(kernels, layer, compared, row_max, log_sum, factors, chunk, needs, into)
