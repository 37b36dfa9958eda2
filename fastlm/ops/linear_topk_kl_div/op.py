"""Divergence of a linear layer's softmax from the K most probable tokens of a teacher.

The teacher is a list: K log-probabilities and token ids per row, stored or sent by an inference
server. All other tokens are one bucket, with the mass that the K leave over, on both sides, so that
the result is a divergence of distributions: not negative, zero only when the K + 1 numbers agree.

Saved, memory, schedules: as `linear_kl_div`, whose loop and autograd these are, without the
teacher's products and its chunk of logits.

Backends: cpu takes float32, bfloat16 and float16, the products by the faster of the library's and
ours, and the statistics of the rows and their gradient by the kernels of `row_statistics`;
reference takes any float dtype, the products by the library and the rows in plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library
from ..linear_kl_div import loop
from ..linear_kl_div import reference as divergences
from ..linear_row_statistics import op as linear
from ..linear_row_statistics.chunks import FASTEST, LIBRARY, Layer, Matmul, Needs, Span
from ..row_statistics import op as rows_op
from ..row_statistics.op import result_dtype
from . import reference

_OP = "linear_topk_kl_div"
_NO_MORE: tuple[Any, ...] = (False, False, False, False, "")  # statistics of a row beside its sum


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return loop.fake(Layer(*args[:3]), args[11:14])


def _check_indices(named: dict[str, Any]) -> None:
    classes = named["student_weight"].shape[0]
    checks.index_range(_OP, "teacher_indices", named["teacher_indices"], classes, None)


library.define(
    _OP,
    "forward",
    "(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher_logprobs, "
    "Tensor teacher_indices, Tensor? keep, Tensor? row_weight, "
    "str divergence, float beta, float scale, SymInt max_bytes, "
    f"{linear.NEEDS_ARGUMENTS}) -> (Tensor divergence, {linear.GRADIENTS})",
    _fake,
    check=_check_indices,
)


class _Teacher:
    """Compares chunks of the student's logits with the teacher's lists."""

    def __init__(
        self,
        logprobs: Tensor,
        indices: Tensor,
        classes: int,
        divergence: str,
        beta: float,
        scale: float,
        chunk: int,
    ) -> None:
        self.logprobs, self.indices = logprobs, indices
        self.chunk, self.classes = chunk, classes
        self.scratch: Tensor | None = None
        self.divergence, self.beta, self.scale = divergence, beta, scale

    def compare(
        self, buckets: Tensor, logprobs: Tensor, classes: int, with_gradient: bool
    ) -> Tensor:
        """[n] of the student's buckets [n, K + 1], in which the gradient stands afterwards."""
        log_p = reference.teacher_buckets(logprobs, classes)
        scratch = torch.empty_like(buckets), torch.empty_like(buckets)
        return divergences.divergence_(
            self.divergence, self.beta, buckets, log_p, scratch, with_gradient
        )

    def __call__(self, logits: Tensor, span: Span, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.scratch is None:
            self.scratch = logits.new_empty(self.chunk, self.classes)
        log_q = divergences.log_softmax(logits, self.scale, self.scratch[: len(logits)])
        index, logprobs = self.indices[span], self.logprobs[span]
        real = logprobs != -torch.inf
        buckets, tail = reference.student_buckets_(log_q, index, real, logits)
        value = self.compare(buckets, logprobs, logits.shape[-1], factor is not None)
        if factor is not None:
            du = buckets.mul_(factor[:, None] * self.scale)
            reference.spread_(log_q, tail, index, real, du)
        return value, log_q


class _CompiledTeacher(_Teacher):
    """The same on a CPU, where indices have been checked; the gradient is left in the logits."""

    def __call__(self, logits: Tensor, span: Span, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        index, logprobs = self.indices[span], self.logprobs[span]
        real = logprobs != -torch.inf
        scores: tuple[Any, ...] = (None, None, -100, self.scale, 0.0, *_NO_MORE)
        row_max, log_sum = rows_op.cpu_forward(logits, *scores)[6:8]
        chosen = logits.gather(-1, index)
        chosen = (chosen.mul_(self.scale) - row_max[:, None]).sub_(log_sum[:, None])
        removed = torch.zeros_like(chosen).masked_fill_(real, -torch.inf)
        # added, not written: padding may have the index of a class that is chosen
        logits.scatter_add_(-1, index, removed)
        top, log_rest = rows_op.cpu_forward(logits, *scores)[6:8]
        tail = (top - row_max) + (log_rest - log_sum)
        buckets = torch.cat((chosen.masked_fill_(~real, -torch.inf), tail[:, None]), -1)
        value = self.compare(buckets, logprobs, logits.shape[-1], factor is not None)
        if factor is not None:
            du = buckets.mul_(factor[:, None])
            # a row of which nothing is left: measured from 0, its probabilities are 0
            nothing = top == -torch.inf
            rest = top.masked_fill_(nothing, 0.0), log_rest.masked_fill_(nothing, 0.0)
            on_p = (du[:, -1].contiguous(), None, None, None, None)
            rows_op.cpu_backward_into(logits, logits, None, None, *rest, on_p, *scores[2:5])
            of_chosen = du[:, :-1].mul(self.scale).masked_fill_(~real, 0.0)
            logits.scatter_add_(-1, index, of_chosen)
        return value, logits


def _run(teacher: type[_Teacher], matmul: Matmul, *args: Any) -> tuple[Tensor, ...]:
    student, keep, row_weight = Layer(*args[:3]), args[5], args[6]
    logprobs, indices = (loop.without_masked(value, keep) for value in args[3:5])
    classes = student.weight.shape[0]
    rows = functools.partial(teacher, logprobs, indices, classes, *args[7:10])
    prepared = loop.Prepared(rows, 2, matmul)
    return loop.run(student, keep, row_weight, Needs(*args[11:14]), args[10], prepared)


def _cpu_refuses(student: Tensor, **_: Any) -> str | None:
    if student.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, not float64"
    return None


dispatch.register(
    _OP,
    "cpu",
    functools.partial(_run, _CompiledTeacher, FASTEST),
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_cpu_refuses,
)
dispatch.register(_OP, "reference", functools.partial(_run, _Teacher, LIBRARY))


def _checked_teacher(
    student: Layer, logprobs: Tensor, indices: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both [N, K], in the result's dtype and int64; padding and masked rows have index 0."""
    rows = student.input.shape[:-1]
    checks.floating(_OP, "teacher_logprobs", logprobs)
    checks.shape(_OP, "teacher_logprobs", logprobs, [*rows, None], "rows as student")
    if logprobs.shape[-1] == 0:
        checks.bad_value(_OP, "teacher_logprobs", "of at least one token", list(logprobs.shape))
    checks.integer(_OP, "teacher_indices", indices)
    checks.shape(_OP, "teacher_indices", indices, logprobs.shape, "as teacher_logprobs")
    for what, value in (("teacher_logprobs", logprobs), ("teacher_indices", indices)):
        checks.same_device(_OP, what, value, "student", student.input)
    logprobs = logprobs.detach().to(result_dtype(student.input)).reshape(-1, logprobs.shape[-1])
    padding = logprobs == -torch.inf
    if keep is not None:
        padding = padding | ~keep[:, None]
    indices = indices.long().reshape(logprobs.shape).masked_fill(padding, 0)
    return logprobs, indices


def linear_topk_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_indices: Tensor,
    *,
    student_bias: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    options: Any = None,
) -> Tensor:
    """Distillation from a teacher's K most probable tokens, without ever holding the student's
    logits; all other tokens are one bucket on both sides.

    Same as, for "forward", where mask is kept and nothing is padding:
        q = (linear(student, student_weight, student_bias) / temperature).softmax(-1)
        q = q.gather(-1, teacher_indices)
        q = torch.cat((q, 1 - q.sum(-1, keepdim=True)), -1)
        p = teacher_logprobs.exp()
        p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1)
        kl_div(q.log(), p, reduction="none").sum(-1).mean()

    with linear and kl_div of torch.nn.functional, in float32, and the student's bucket summed from
    its tokens rather than as a difference, which keeps a small one.

    Args:
        student: [..., H], hidden states, any float dtype; gradient.
        student_weight: [V, H], dtype of `student`; gradient.
        teacher_logprobs: [..., K], log-probabilities in nats, any float dtype; those of the
            teacher's temperature, which is applied to the student alone here. -inf is padding: the
            token stays in the bucket of the others. Where the K exceed 1 by rounding they are
            scaled to 1. No gradient.
        teacher_indices: [..., K], any integer dtype, in [0, V), distinct in a row (padding aside).
        student_bias: [V], dtype of `student`; gradient.
        divergence: "forward" or "jsd" with `beta` in [0, 1), as in `linear_kl_div`. "reverse" is
            infinite where the teacher's bucket is empty, which rounding alone can cause.
        Others: see `linear_kl_div`.

    Returns:
        [] or [...], float32, float64 for a float64 student, in nats; 0 where masked. Infinite where
        the student gives no probability to what the teacher expects.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.
        IndexError: an index is out of range (CPU; elsewhere the row is NaN).

    Source: buckets bound `linear_kl_div` from below by the log sum inequality (Cover & Thomas 2006,
    theorem 2.7.1); generalised JSD, Agarwal et al. 2023 (arXiv:2306.13649).
    """
    chosen = loop.checked_divergence(_OP, divergence, beta, temperature, ("forward", "jsd"))
    names = ("student", "student_weight", "student_bias")
    layer = linear.checked_layer(_OP, student, student_weight, student_bias, names)
    weighting = loop.checked_weighting(_OP, student, mask, token_weight, reduction)
    teacher = _checked_teacher(layer, teacher_logprobs, teacher_indices, weighting.keep)
    shape = layer.input.shape[:-1]
    layer = layer._replace(input=layer.input.reshape(-1, layer.input.shape[-1]))
    max_bytes = loop.checked_budget(_OP, options, layer)
    return loop.loss(_OP, layer, teacher, weighting, (*chosen, max_bytes), shape)
