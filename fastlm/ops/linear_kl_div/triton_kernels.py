"""Divergence of two rows of logits and its gradient in Triton.

One program per row: a pass for the two maxima, one for the sums relative to them, one that writes
the gradient over the student's logits; for JSD one more, because its gradient needs the divergence
and that needs the sums. Beside the products (thousands of operations per logit) these passes are
little, and without rescaling no infinite logit needs care. Of every sum a program keeps a partial
sum per lane; lanes are added once, so the order depends on nothing but the row's length.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..row_statistics.triton_kernels import on_device, shape_of_a_program

# elements of a program's block at most, and of a thread
MOST, PER_THREAD = 1024, 4


@triton.jit
def _shifted(row, column, classes, scale, top):
    """scale * (logits - top); -inf, a class without probability, outside the row."""
    x = tl.load(row + column, mask=column < classes, other=float("-inf"))
    return (x - top) * scale


@triton.jit
def _top(row, lanes, classes, BLOCK: tl.constexpr):
    """The largest logit; NaN is passed over here and makes the sums NaN."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, classes, BLOCK):
        column = begin + lanes
        best = tl.maximum(best, tl.load(row + column, mask=column < classes, other=float("-inf")))
    return tl.max(best, 0)


@triton.jit
def _times(probability, x):
    """0 log 0 = 0, also where the log is infinite."""
    return tl.where(probability == 0, 0.0, probability * x)


@triton.jit
def _log1p(x):
    # log(y) with the rounding of y = 1 + x made good; a class of the mixture's other side alone has
    # x = -1 where its weight rounds to 1
    y = tl.maximum(1.0 + x, 1.2e-38)
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def _against_mixture(p, q, beta, rest):
    """p log(p / m) and q log(q / m), m = beta p + rest q."""
    # a denormal (less than 1.2e-38) counts as 0: the quotients below would overflow
    p = tl.where(p < 1.2e-38, 0.0, p)
    q = tl.where(q < 1.2e-38, 0.0, q)
    difference = q - p
    of_p = _times(p, -_log1p(rest * difference / tl.where(p == 0, 1.0, p)))
    of_q = _times(q, -_log1p(-beta * difference / tl.where(q == 0, 1.0, q)))
    return of_p, of_q


@triton.jit
def divergence_kernel(
    value,  # float32 [rows]
    logits,  # float32 [rows, classes] of the student; with a factor, the gradient afterwards
    teacher,  # float32 [rows, classes]
    factor,  # float32 [rows] or None: no gradient
    classes,
    beta,
    rest,  # 1 - beta
    scale,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * classes
    teacher += row * classes
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    z_top = _top(logits, lanes, classes, BLOCK)
    t_top = _top(teacher, lanes, classes, BLOCK)

    of_z, of_t, moment = zero, zero, zero
    for begin in range(0, classes, BLOCK):
        z = _shifted(logits, begin + lanes, classes, scale, z_top)
        t = _shifted(teacher, begin + lanes, classes, scale, t_top)
        q, p = tl.exp(z), tl.exp(t)
        of_z += q
        of_t += p
        if KIND == "forward":
            moment += _times(p, t - z)
        if KIND == "reverse":
            moment += _times(q, z - t)
    z_sum, t_sum = tl.sum(of_z, 0), tl.sum(of_t, 0)
    z_log, t_log = tl.log(z_sum), tl.log(t_sum)
    if KIND == "forward":
        # the log of the quotient, because the difference of two logs would lose digits
        found = tl.sum(moment, 0) / t_sum + tl.log(z_sum / t_sum)
    elif KIND == "reverse":
        found = tl.sum(moment, 0) / z_sum + tl.log(t_sum / z_sum)
    else:
        from_p, from_q = zero, zero
        for begin in range(0, classes, BLOCK):
            q = tl.exp(_shifted(logits, begin + lanes, classes, scale, z_top) - z_log)
            p = tl.exp(_shifted(teacher, begin + lanes, classes, scale, t_top) - t_log)
            of_p, of_q = _against_mixture(p, q, beta, rest)
            from_p += of_p
            from_q += of_q
        kl_of_q = tl.sum(from_q, 0)
        found = beta * tl.sum(from_p, 0) + rest * kl_of_q
    tl.store(value + row, found)

    if factor is not None:
        by = tl.load(factor + row) * scale
        if KIND == "reverse":
            origin = found - tl.log(t_sum / z_sum)
        for begin in range(0, classes, BLOCK):
            column = begin + lanes
            z = _shifted(logits, column, classes, scale, z_top)
            t = _shifted(teacher, column, classes, scale, t_top)
            q = tl.exp(z - z_log)
            if KIND == "forward":
                dz = q - tl.exp(t - t_log)
            elif KIND == "reverse":
                # q (log q - log p - KL); infinite where KL is, as in the reference
                dz = q * (tl.where(q == 0, 0.0, z - t) - origin)
            else:
                _, of_q = _against_mixture(tl.exp(t - t_log), q, beta, rest)
                dz = rest * (of_q - q * kl_of_q)
            tl.store(logits + column, dz * by, mask=column < classes)


def divergence(
    value: Tensor,
    logits: Tensor,
    teacher: Tensor,
    factor: Tensor | None,
    divergence: str,
    beta: float,
    scale: float,
) -> None:
    """Write value [N] and, with a factor [N], the gradient over the logits; all contiguous."""
    rows, classes = logits.shape
    if rows == 0:
        return
    # two rows and their logs at once: with 8 elements a thread JSD exceeds what a thread has
    block, _ = shape_of_a_program(min(classes, MOST))
    with on_device(logits):
        divergence_kernel[(rows,)](
            value,
            logits,
            teacher,
            factor,
            classes,
            beta,
            1.0 - beta,
            scale,
            KIND=divergence,
            BLOCK=block,
            num_warps=max(1, block // (32 * PER_THREAD)),
        )
