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
        max_memory_bytes: memory beyond inputs, gradients and their float32 sums, within 5%. Below
            some 64 rows of logits (768 on a GPU) the classes are taken in slices too, and the
            logits are computed twice; never less than a tile of 64 x 64. None: chunks of, on a CPU,
            1/9 of the rows, at least 64 rows or 10 MiB, at most 512 rows; on a GPU a 64th of its
            memory, at least 256 MiB.
        batch_chunk_size: rows of a chunk, as in torch; not with max_memory_bytes.
        acc_dtype: dtype of logits and of all sums, float32 (float64 for float64 inputs).
        deterministic: every path is; None, True and False are the same.
        grad_accum_into: tensor of the weight's shape, float32 (float64 for float64 inputs). The
            backward adds the weight's gradient to it and gives the weight none: no tensor of the
            weight's size is made beside it. The logits are then computed twice. Eager mode only.
        batch_invariant, filter_eps: only the defaults; anything else raises.
    """

    max_memory_bytes: int | None = None
    batch_chunk_size: int | None = None
    acc_dtype: torch.dtype = torch.float32
    deterministic: bool | None = None
    batch_invariant: bool = False
    filter_eps: float | None = None
    grad_accum_into: Tensor | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str, remedy: str) -> NoReturn:
            checks.bad_value(
                "LinearCrossEntropyOptions", name, expected, repr(getattr(self, name)), remedy
            )

        for name in ("max_memory_bytes", "batch_chunk_size"):
            size = getattr(self, name)
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                refuse(name, "a positive int or None", "")
        if self.max_memory_bytes is not None and self.batch_chunk_size is not None:
            refuse("batch_chunk_size", "None with max_memory_bytes", "")
        if self.acc_dtype not in (torch.float32, torch.float64):
            refuse("acc_dtype", "float32 or float64", "sums of half precision lose the gradient")
        if self.batch_invariant:
            refuse("batch_invariant", "False", "library products depend on the rows of a chunk")
        if self.filter_eps is not None:
            refuse("filter_eps", "None", "gradients are exact")
        into = self.grad_accum_into
        if into is None:
            return
        op = "LinearCrossEntropyOptions"
        checks.tensor(op, "grad_accum_into", into)
        if into.dtype not in (torch.float32, torch.float64):
            got = checks.short(into.dtype)
            checks.bad_type(op, "grad_accum_into", "float32 or float64", got)
        if into.requires_grad:
            got = "a tensor with requires_grad"
            checks.bad_value(op, "grad_accum_into", "a constant", got, "detach it")
        if 0 in into.stride() and into.numel() > 1:
            checks.bad_value(op, "grad_accum_into", "memory of its own", f"strides {into.stride()}")


def _torch_bytes(options: Any, rows: Any, features: int, classes: int) -> Any:
    """What `torch.nn.LinearCrossEntropyOptions` describes, as `chunk_bytes`."""
    if options.batch_chunk_size is not None:
        return -options.batch_chunk_size
    method = options.chunking_method
    if method is None:  # one chunk
        return -max(1, rows)
    if method == "auto":
        return 0
    # "aspect_ratio:k": the logits of a chunk take 1/k of the memory of the input
    _, _, factor = method.partition(":")
    return -max(1, rows * features // (int(factor or 1) * classes))


def chunk_bytes(op: str, options: Any, input: Tensor, linear_weight: Tensor) -> int:
    """The op argument `max_bytes` for the options of one call: a budget; 0 is the default size,
    and a negative number minus the rows of a chunk."""
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
        return options.max_memory_bytes or -(options.batch_chunk_size or 0)
    rows = input.numel() // max(1, input.shape[-1])
    classes, features = linear_weight.shape
    return _torch_bytes(options, rows, features, classes)


def accumulator(op: str, options: Any, input: Tensor, linear_weight: Tensor) -> Tensor | None:
    """`grad_accum_into` of the options of one call."""
    into = getattr(options, "grad_accum_into", None)
    if into is None:
        return None
    what = "options.grad_accum_into"
    if torch.compiler.is_compiling():
        checks.bad_value(op, what, "None under torch.compile", "a tensor")
    checks.shape(op, what, into, list(linear_weight.shape), "as linear_weight")
    checks.same_device(op, what, into, "linear_weight", linear_weight)
    if into.dtype != result_dtype(input):
        want = checks.short(result_dtype(input))
        checks.bad_type(op, what, f"{want} (sums of {checks.short(input.dtype)})", into.dtype)
    return into
