"""How the loop over chunks is run; also understands torch's class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ... import checks
from ..row_statistics.op import result_dtype


@dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """Options of `linear_cross_entropy` and `linear_token_logprobs`.

    Attributes:
        max_memory_bytes: size of the largest chunk of logits, never less than one row. None: on a
            CPU 1/8 of the rows, at least 64 rows or 10 MiB, at most 512 rows; on a GPU 256 MiB.
        acc_dtype: dtype of logits and of all sums, float32 (float64 for float64 inputs).
        deterministic: every path is; None, True and False are the same.
        batch_invariant, filter_eps, grad_accum_into: only the defaults; anything else raises.
    """

    max_memory_bytes: int | None = None
    acc_dtype: torch.dtype = torch.float32
    deterministic: bool | None = None
    batch_invariant: bool = False
    filter_eps: float | None = None
    grad_accum_into: Any = None

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str, remedy: str) -> NoReturn:
            checks.bad_value(
                "LinearCrossEntropyOptions", name, expected, repr(getattr(self, name)), remedy
            )

        size = self.max_memory_bytes
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            refuse("max_memory_bytes", "a positive int or None", "")
        if self.acc_dtype not in (torch.float32, torch.float64):
            refuse("acc_dtype", "float32 or float64", "sums of half precision lose the gradient")
        if self.batch_invariant:
            refuse("batch_invariant", "False", "library products depend on the rows of a chunk")
        if self.filter_eps is not None:
            refuse("filter_eps", "None", "gradients are exact")
        if self.grad_accum_into is not None:
            refuse("grad_accum_into", "None", "add the gradient that the call returns")


def _torch_bytes(op: str, options: Any, rows: Any, features: int, classes: int, item: int) -> Any:
    """Bytes of the chunk that `torch.nn.LinearCrossEntropyOptions` describes; 0: our choice."""
    if options.batch_chunk_size is not None:
        return options.batch_chunk_size * classes * item
    method = options.chunking_method
    if method is None:  # one chunk
        return max(1, rows * classes * item)
    if method == "auto":
        return 0
    # "aspect_ratio:k": the logits of a chunk take 1/k of the memory of the input
    _, _, factor = method.partition(":")
    return max(1, rows * features * item // int(factor or 1))


def chunk_bytes(op: str, options: Any, input: Tensor, linear_weight: Tensor) -> int:
    """The op argument `max_bytes` for the options of one call; 0 is the default size."""
    if options is None:
        return 0
    dtype = result_dtype(input)
    theirs = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    ours = isinstance(options, LinearCrossEntropyOptions)
    if not ours and (theirs is None or not isinstance(options, theirs)):
        checks.bad_type(op, "options", "LinearCrossEntropyOptions", type(options).__name__)
    # more precise than asked for is right; less would not be
    if options.acc_dtype == torch.float64 and dtype != torch.float64:
        got = f"float64 with {checks.short(input.dtype)} inputs"
        checks.bad_value(op, "options.acc_dtype", "float32", got, "pass float64 inputs")
    if ours:
        return options.max_memory_bytes or 0
    rows = input.numel() // max(1, input.shape[-1])
    classes, features = linear_weight.shape
    return _torch_bytes(op, options, rows, features, classes, dtype.itemsize)
