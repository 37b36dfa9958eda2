"""Divergence between the softmaxes of two linear layers, without ever holding their logits.

    z = (student @ student_weight.T + student_bias) / temperature     [N, V], a chunk of rows at a
    t = (teacher @ teacher_weight.T + teacher_bias) / temperature     time, at least float32

Saved: the inputs and, where the weight of each row is known beforehand, the gradients of student,
weight and bias, computed along with the value (6 N H V operations for the student, 2 for the
teacher, which gets no gradient). Otherwise ("none") the backward computes the logits again.

Memory beyond inputs and gradients: on a CPU one chunk of each one's logits, of an eighth of the
rows, at least 96 (products of fewer are slow) or 5 MiB, at most 512; the reference holds four of
half as many rows. For half-precision inputs what `linear_row_statistics` needs for them.

Backends: in all of them the library computes the products, in chunks of rows. triton and cpu take
float32, bfloat16 and float16 (the logits are float32) and compare the rows in a kernel, which
leaves the gradient where the student's logits were; reference compares them in plain PyTorch, any
float dtype. NaN and infinite logits give what `log_softmax` gives. Calls of few logits are
PyTorch's own: see `small.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library, triton_backend
from ..linear_row_statistics import op as linear
from ..linear_row_statistics.chunks import FASTEST, LIBRARY, Layer, Matmul, Needs, Products, Span
from ..row_statistics import op as rows_op
from ..row_statistics.op import result_dtype
from ..row_statistics.small import note
from . import loop, reference, small

_OP = "linear_kl_div"
KINDS = ("forward", "reverse", "jsd")  # as the enum of csrc/divergence


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return loop.fake(Layer(*args[:3]), args[12:15])


library.define(
    _OP,
    "forward",
    "(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? keep, Tensor? row_weight, "
    "str divergence, float beta, float scale, SymInt max_bytes, "
    f"{linear.NEEDS_ARGUMENTS}) -> (Tensor divergence, {linear.GRADIENTS})",
    _fake,
)


class _Rows(NamedTuple):
    """An implementation of `divergence` of rows, and the buffers it needs beside both logits."""

    compare: Callable[..., tuple[Tensor, Tensor]]
    scratch: int = 0
    matmul: Matmul = LIBRARY


class _Teacher:
    """Compares chunks of the student's logits with the teacher's."""

    def __init__(self, kernel: _Rows, layer: Layer, options: tuple[Any, ...], chunk: int) -> None:
        self.products = Products(layer, loop.chunk_of(layer, chunk), kernel.matmul)
        self.scratch = self.products.new(kernel.scratch, chunk, layer.weight.shape[0])
        self.kernel, self.options = kernel, options

    def __call__(self, logits: Tensor, span: Span, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        theirs, scratch = self.products.logits(span), self.scratch[:, : len(logits)]
        return self.kernel.compare(logits, theirs, factor, *self.options, *scratch)


def _run(kernel: _Rows, *args: Any) -> tuple[Tensor, ...]:
    student, teacher, keep, row_weight = Layer(*args[:3]), Layer(*args[3:6]), args[6], args[7]
    teacher = teacher._replace(input=loop.without_masked(teacher.input, keep))
    rows = functools.partial(_Teacher, kernel, teacher, args[8:11])
    prepared = loop.Prepared(rows, 2 + kernel.scratch, kernel.matmul)
    return loop.run(student, keep, row_weight, Needs(*args[12:15]), args[11], prepared)


def _compiled(
    logits: Tensor,
    theirs: Tensor,
    factor: Tensor | None,
    divergence: str,
    beta: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    value = logits.new_empty(len(logits))
    kind = KINDS.index(divergence)
    extension.raw("divergence")(logits, theirs, factor, kind, beta, scale, value)
    return value, logits


def _triton(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from . import triton_kernels

    value = logits.new_empty(len(logits))
    triton_kernels.divergence(value, logits, *args)
    return value, logits


def _cpu_refuses(student: Tensor, **_: Any) -> str | None:
    if student.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, not float64"
    return None


def _triton_refuses(student: Tensor, student_weight: Tensor, **_: Any) -> str | None:
    too_large = rows_op.triton_refuses_size(student.shape[0], student_weight.shape[0])
    return _cpu_refuses(student) or too_large


dispatch.register(
    _OP,
    "triton",
    functools.partial(_run, _Rows(_triton)),
    devices=triton_backend.devices,
    unavailable=triton_backend.unavailable,
    refuses=_triton_refuses,
    proven=False,
)
dispatch.register(
    _OP,
    "cpu",
    functools.partial(_run, _Rows(_compiled, matmul=FASTEST)),
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_cpu_refuses,
)
dispatch.register(_OP, "reference", functools.partial(_run, _Rows(reference.divergence, 2)))


def _checked_teacher(
    student: Layer, teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None
) -> Layer:
    names = ("teacher", "teacher_weight", "teacher_bias")
    layer = linear.checked_layer(_OP, teacher, teacher_weight, teacher_bias, names)
    rows, classes = student.input.shape[:-1], student.weight.shape[0]
    checks.same_device(_OP, "teacher", teacher, "student", student.input)
    checks.shape(_OP, "teacher", teacher, [*rows, None], "rows as student")
    checks.shape(_OP, "teacher_weight", teacher_weight, [classes, None], "V as student_weight")
    if (result_dtype(layer.input) == torch.float64) != (student.input.dtype == torch.float64):
        expected = "float64" if student.input.dtype == torch.float64 else "at most float32"
        got = checks.short(layer.input.dtype)
        checks.bad_type(_OP, "teacher", f"{expected} (as student)", got)
    bias = None if layer.bias is None else layer.bias.detach()
    return Layer(layer.input.detach(), layer.weight.detach(), bias)


def linear_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    options: Any = None,
) -> Tensor:
    """Distillation: divergence of a student's next-token distribution from a teacher's, without
    ever holding the logits of either.

    Same as, for "forward" and where mask is kept:
        log_q = (linear(student, student_weight, student_bias) / temperature).log_softmax(-1)
        log_p = (linear(teacher, teacher_weight, teacher_bias) / temperature).log_softmax(-1)
        kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

    with linear and kl_div of torch.nn.functional, in float32. With p the teacher and q the student:

        forward   KL(p || q), covers the teacher's modes
        reverse   KL(q || p), seeks one of them
        jsd       beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q;
                  as in TRL beta 0 is the forward and 1 the reverse divergence

    Args:
        student: [..., H], hidden states, any float dtype; gradient.
        student_weight: [V, H], dtype of `student`; gradient.
        teacher: [..., G], hidden states of the same tokens. No gradient, nor for its layer.
        teacher_weight: [V, G], dtype of `teacher`, which may differ from the student's (float64
            goes with float64 only).
        student_bias, teacher_bias: [V]; -inf takes a class out.
        beta: in [0, 1], of "jsd".
        temperature: positive; divides the logits of both. The loss is not multiplied by its square.
        mask: [...]; 0 or False takes the token out, whatever stands there.
        token_weight: [...], factor of each token; does not change what "mean" divides by.
        reduction: "mean" over the tokens kept (0 if there are none), "sum", "none" for [...].
        options: `LinearCrossEntropyOptions`; `max_memory_bytes` is that of the chunks of
            logits together, at least one row each. Not `grad_accum_into`.

    Returns:
        [] or [...], float32, float64 for float64 inputs, in nats; 0 where masked.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.

    Source: Hinton et al. 2015 (arXiv:1503.02531); generalised JSD, Agarwal et al. 2023
    (arXiv:2306.13649).
    """
    if student_bias is teacher_bias is mask is token_weight is options is None:
        pairs = (student, student_weight), (teacher, teacher_weight)
        if small.takes(*pairs, divergence, beta, temperature, reduction):
            note(_OP)
            return small.divergence(*pairs, divergence, beta, temperature, reduction)
    chosen = loop.checked_divergence(_OP, divergence, beta, temperature, KINDS)
    names = ("student", "student_weight", "student_bias")
    layer = linear.checked_layer(_OP, student, student_weight, student_bias, names)
    other = _checked_teacher(layer, teacher, teacher_weight, teacher_bias)
    weighting = loop.checked_weighting(_OP, student, mask, token_weight, reduction)
    shape = layer.input.shape[:-1]
    layer = layer._replace(input=layer.input.reshape(-1, layer.input.shape[-1]))
    other = other._replace(input=other.input.reshape(-1, other.input.shape[-1]))
    max_bytes = loop.checked_budget(_OP, options, layer)
    return loop.loss(_OP, layer, other, weighting, (*chosen, max_bytes), shape)
