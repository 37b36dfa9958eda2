"""Row statistics and their gradient in Triton.

Forward: one program per row reads it once, by blocks. Of every sum a program keeps one partial sum
per lane, measured from the largest score so far and rescaled when that grows; lanes are added once,
at the end, so the order of a sum depends on nothing but the row's length. The largest score is
found as the largest logit (the smallest for a negative scale), because scores may have ties that
logits have not. Backward: one program per row and block, one read and one write.

Logits are widened to float32 as they are loaded; addresses are int64. tanh is written with exp, so
that the kernels also run in Triton's interpreter, which has no libdevice.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements of a program's block, and of a thread: with 16, the forward that computes everything
# takes 217 registers a thread on sm_90 and one block fills a multiprocessor; with 8 it takes 104
BLOCK, LEAST_BLOCK, PER_THREAD = 2048, 128, 8


@triton.jit
def tanh(u):
    # the series where 1 - exp(-2u) would cancel, at 0.3 its next term is 5e-8 of the sum
    t = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - t) / (1.0 + t)
    s = u * u
    small = 62.0 / 2835.0
    small = small * s - 17.0 / 315.0
    small = small * s + 2.0 / 15.0
    small = small * s - 1.0 / 3.0
    small = u + u * s * small
    return tl.where(tl.abs(u) < 0.3, small, tl.where(u < 0, -large, large))


@triton.jit
def _squash(x, softcap, CAPPED: tl.constexpr):
    """tanh(x / softcap), or x without a cap."""
    if CAPPED:
        x = tanh(x / softcap)
    return x


@triton.jit
def _score(squashed, scale, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        squashed = squashed * softcap
    return squashed * scale


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    logits,  # [rows, classes]
    target,  # int64 [rows] or None
    class_weight,  # float32 [classes] (weight_stride 0), [rows, classes] or None
    row_max,  # float32 [rows], as all below but argmax; None: not wanted
    log_sum,
    lse,
    logprob,
    entropy,
    sum_sq,
    weighted_sum,
    weight_mass,
    argmax,  # int64 [rows]
    classes,
    row_stride,
    column_stride,
    weight_stride,
    ignore_index,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    kept = True
    stop = classes
    if target is not None:
        index = tl.load(target + row)
        kept = index != ignore_index
        stop = tl.where(kept, classes, 0)  # an ignored row is not read

    zero = tl.zeros((BLOCK,), tl.float32)
    total, moment, squares, weighted, mass = zero, zero, zero, zero, zero
    best, best_column = zero - float("inf"), lanes
    # the largest key (the logit, with the sign of the scale) so far, and its score
    top_key = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    origin = tl.full((), 0.0, tl.float32)
    for begin in range(0, stop, BLOCK):
        column = begin + lanes
        inside = column < classes
        x = tl.load(logits + column * column_stride, mask=inside, other=0.0).to(tl.float32)
        key = tl.where(inside, -x if NEGATIVE else x, float("-inf"))
        top_key = tl.maximum(top_key, tl.max(key, 0))
        top_x = -top_key if NEGATIVE else top_key
        new_top = _score(_squash(top_x, softcap, CAPPED), scale, softcap, CAPPED)
        # a row of -inf alone is measured from 0: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        z = _score(_squash(x, softcap, CAPPED), scale, softcap, CAPPED)
        shifted = tl.where(inside, z - base, float("-inf"))
        e = tl.exp(shifted)
        rescale = tl.exp(top - base)  # 0 in the first block
        if entropy is not None:
            # sum of e * shifted; a sum that is rescaled to 0 must not meet an infinite step
            moved = tl.where(rescale == 0, 0.0, rescale * (moment + (top - base) * total))
            moment = moved + tl.where(e == 0, 0.0, e * shifted)
        total = total * rescale + e
        if sum_sq is not None:
            squares = squares * (rescale * rescale) + e * e
        if weighted_sum is not None:
            # from the first block's largest score: sums of z lose digits when |z| is large
            origin = tl.where(begin == 0, base, origin)
            distance = z - origin
            if class_weight is not None:
                weight = tl.load(
                    class_weight + row * weight_stride + column, mask=inside, other=0.0
                )
                distance *= weight
                mass += weight
            weighted += tl.where(inside, distance, 0.0)
        if argmax is not None:
            # in a lane columns grow, so the first of equals stays; NaN is the largest, as in torch
            better = (key > best) | ((key != key) & (best == best))
            best = tl.where(better, key, best)
            best_column = tl.where(better, column, best_column)
        top = new_top

    # one lane holds the 1 of the largest score: apart from it the rest keeps its digits, and with
    # them log_sum where p is close to 1
    most = tl.max(total, 0)
    one_lane = lanes == tl.min(tl.where(total == most, lanes, BLOCK), 0)
    others = tl.sum(tl.where(one_lane, total - 1.0, total), 0)
    sum_e = 1.0 + others
    lost = others - (sum_e - 1.0)
    log_total = tl.log(sum_e) + tl.where(sum_e > 0, lost / sum_e, 0.0)
    tl.store(row_max + row, tl.where(kept, top, 0.0))
    tl.store(log_sum + row, tl.where(kept, log_total, 0.0))
    tl.store(lse + row, tl.where(kept, top + log_total, 0.0))
    if target is not None:
        valid = kept & (index >= 0) & (index < classes)
        at = tl.where(valid, index, 0)
        x = tl.load(logits + at * column_stride, mask=valid, other=0.0).to(tl.float32)
        z = _score(_squash(x, softcap, CAPPED), scale, softcap, CAPPED)
        found = tl.where(valid, (z - top) - log_total, float("nan"))
        tl.store(logprob + row, tl.where(kept, found, 0.0))
    if entropy is not None:
        tl.store(entropy + row, tl.where(kept, log_total - tl.sum(moment, 0) / sum_e, 0.0))
    if sum_sq is not None:
        tl.store(sum_sq + row, tl.where(kept, tl.sum(squares, 0) / (sum_e * sum_e), 0.0))
    if weighted_sum is not None:
        all_weight = tl.sum(mass, 0)
        if class_weight is None:
            all_weight += classes
        found = tl.sum(weighted, 0) - ((top - origin) + log_total) * all_weight
        tl.store(weighted_sum + row, tl.where(kept, found, 0.0))
        tl.store(weight_mass + row, tl.where(kept, all_weight, 0.0))
    if argmax is not None:
        is_nan = best != best
        any_nan = tl.max(is_nan.to(tl.int32), 0) != 0
        largest = tl.max(tl.where(is_nan, float("-inf"), best), 0)
        first = tl.where(any_nan, is_nan, best == largest)
        found = tl.min(tl.where(first, best_column, 0x7FFFFFFF), 0)
        tl.store(argmax + row, tl.where(kept, found, -1).to(tl.int64))


@triton.jit(do_not_specialize=["ignore_index"])
def backward_kernel(
    dlogits,  # [rows, classes]; may be the logits
    logits,
    target,  # int64 [rows] or None
    class_weight,  # as in the forward
    row_max,  # float32 [rows], as all below; None: 0
    log_sum,
    on_p,
    on_p_log_p,
    on_p_squared,
    on_weight,
    on_target,
    classes,
    blocks,  # of a row
    row_stride,
    weight_stride,
    ignore_index,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # rows and blocks share the first axis of the grid: the others end at 65535
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    read = inside
    if target is not None:
        index = tl.load(target + row)
        kept = index != ignore_index
        read = inside & kept  # an ignored row is not read
    x = tl.load(logits + row * row_stride + column, mask=read, other=0.0).to(tl.float32)
    squashed = _squash(x, softcap, CAPPED)
    z = _score(squashed, scale, softcap, CAPPED)
    log_p = (z - tl.load(row_max + row)) - tl.load(log_sum + row)
    p = tl.exp(log_p)
    dz = tl.zeros((BLOCK,), tl.float32)
    if on_p is not None:
        dz += p * tl.load(on_p + row)
    if on_p_log_p is not None:
        dz += tl.where(p == 0, 0.0, p * log_p) * tl.load(on_p_log_p + row)  # 0 log 0 = 0
    if on_p_squared is not None:
        dz += p * p * tl.load(on_p_squared + row)
    if on_weight is not None:
        factor = tl.load(on_weight + row)
        if class_weight is not None:
            weight = class_weight + row * weight_stride + column
            factor = tl.load(weight, mask=read, other=0.0) * factor
        dz += factor
    if target is not None:
        if on_target is not None:
            valid = (index >= 0) & (index < classes)
            upstream = tl.where(valid, tl.load(on_target + row), float("nan"))
            dz += tl.where((column == index) | (valid == 0), upstream, 0.0)
    slope = scale
    if CAPPED:
        slope = scale * (1.0 - squashed * squashed)
    dz *= slope
    if target is not None:
        dz = tl.where(kept, dz, 0.0)
    out = dlogits + row * classes + column
    tl.store(out, dz.to(dlogits.dtype.element_ty), mask=inside)


def shape_of_a_program(classes: int) -> tuple[int, int]:
    """Elements of a block and number of warps, for rows of this length."""
    block = max(LEAST_BLOCK, min(BLOCK, triton.next_power_of_2(classes)))
    return block, max(1, block // (32 * PER_THREAD))


def on_device(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()


def _weight(class_weight: Tensor | None) -> tuple[Tensor | None, int]:
    """Class weights with contiguous rows, and the distance of two rows."""
    if class_weight is None:
        return None, 0
    if class_weight.stride(-1) != 1:
        class_weight = class_weight.contiguous()
    return class_weight, class_weight.stride(0) if class_weight.dim() == 2 else 0


def forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    out: tuple[Tensor | None, ...],
) -> None:
    """Write row_max, log_sum, lse, logprob, entropy, sum_sq, weighted_sum, weight_mass and argmax,
    in that order; those that are None are not computed."""
    rows, classes = logits.shape
    if rows == 0:
        return
    # a broadcast view is read as it is: a copy could be larger than memory
    if logits.stride(1) != 1 and 0 not in logits.stride():
        logits = logits.contiguous()
    block, warps = shape_of_a_program(classes)
    weight, weight_stride = _weight(class_weight)
    with on_device(logits):
        forward_kernel[(rows,)](
            logits,
            None if target is None else target.contiguous(),
            weight,
            *out,
            classes,
            *logits.stride(),
            weight_stride,
            ignore_index,
            scale,
            softcap,
            CAPPED=softcap != 0,
            NEGATIVE=scale < 0,
            BLOCK=block,
            num_warps=warps,
            # everything asked for takes 104; the assembler spills to have more blocks at once
            **({"maxnreg": 128} if softcap != 0 else {}),
        )


def backward_into(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    coefficients: tuple[Tensor | None, ...],
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """Write dlogits, contiguous; it may be `logits`."""
    rows, classes = logits.shape
    if rows == 0:
        return
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block, warps = shape_of_a_program(classes)
    blocks = triton.cdiv(classes, block)
    weight, weight_stride = _weight(class_weight)
    with on_device(logits):
        backward_kernel[(rows * blocks,)](
            dlogits,
            logits,
            None if target is None else target.contiguous(),
            weight,
            row_max,
            log_sum,
            *coefficients,
            classes,
            blocks,
            logits.stride(0),
            weight_stride,
            ignore_index,
            scale,
            softcap,
            CAPPED=softcap != 0,
            BLOCK=block,
            num_warps=warps,
        )
