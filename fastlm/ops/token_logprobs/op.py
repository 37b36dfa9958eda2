"""Log-probability of chosen tokens and the entropy of the distribution they came from.

Composed of `row_statistics` and `linear_row_statistics`, which see for kernels, backends and what
is saved. Every float result is differentiable, alone or together: in the backward they share one
pass over the logits. Log-probs alone come from the kernel without the torch op around it
(`row_statistics/logprobs.py`); float64 and few float16 logits are PyTorch's own (`small.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ... import checks, dispatch
from ..cross_entropy.loss import plain_scores, scores
from ..linear_cross_entropy.options import accumulator, chunk_bytes
from ..linear_row_statistics import op as linear
from ..linear_row_statistics import parallel as linear_parallel
from ..linear_row_statistics.chunks import Compared
from ..row_statistics import logprobs as kernel
from ..row_statistics import parallel, small
from ..row_statistics.op import Statistics, Wanted, row_statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures as typed


class TokenLogprobs(NamedTuple):
    """Per token [...]; None: not asked for. Where the target is ignored 0, and argmax -1."""

    logprobs: Tensor  # log p[target], nats
    entropy: Tensor | None = None  # -sum p log p, nats
    lse: Tensor | None = None  # log sum exp of the scaled logits
    argmax: Tensor | None = None  # int64, the most probable token, the first of equals
    sum_sq: Tensor | None = None  # sum p^2


def _check_target(op: str, target: Tensor, shape: list[int], logits: Tensor) -> None:
    checks.integer(op, "target", target)
    checks.shape(op, "target", target, shape, "one per row of logits")
    checks.same_device(op, "target", target, "the logits", logits)


def _directly(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    logit_softcapping: float | None,
) -> Tensor | None:
    """The log-probs alone, without the torch op; None: not such a call, or its arguments are not as
    they should be."""
    op = "token_logprobs"
    if type(ignore_index) is not int or not small.divides(temperature):
        return None
    if not plain_scores(1.0, logit_scale, logit_softcapping) or not dispatch.direct(logits, target):
        return None
    if dispatch.undisturbed() and kernel.takes(logits, target):
        return kernel.logprobs(op, logits, target, ignore_index, 1.0 / temperature)
    if ignore_index >= 0 or logits.dtype not in (torch.float64, torch.float16):
        return None
    if target.dtype not in checks.INTEGERS or target.shape != logits.shape[:-1]:
        return None
    classes = logits.shape[-1] if logits.dim() > 0 else 0
    if classes == 0 or not small.few(logits, classes, logits.numel(), small.trained(logits)):
        return None
    small.note(op)
    return small.token_logprobs(logits, target, ignore_index, 1.0 / temperature)


def _gathered(
    found: Statistics, shape: list[int], entropy: bool, lse: bool, argmax: bool, sum_sq: bool
) -> Tensor | TokenLogprobs:
    logprobs = found.logprob.view(shape)
    if not (entropy or lse or argmax or sum_sq):
        return logprobs
    return TokenLogprobs(
        logprobs,
        found.entropy.view(shape) if entropy else None,
        found.lse.view(shape) if lse else None,
        found.argmax.view(shape) if argmax else None,
        found.sum_sq.view(shape) if sum_sq else None,
    )


@overload
def token_logprobs(logits: Tensor, target: Tensor, **rest: Unpack[typed.Alone]) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[True],
    **rest: Unpack[typed.WithEntropy],
) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor, target: Tensor, *, return_lse: Literal[True], **rest: Unpack[typed.WithLse]
) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    return_argmax: Literal[True],
    **rest: Unpack[typed.WithArgmax],
) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor, target: Tensor, *, return_sum_sq: Literal[True], **rest: Unpack[typed.WithSumSq]
) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor, target: Tensor, **rest: Unpack[typed.Either]
) -> Tensor | TokenLogprobs: ...
def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_argmax: bool = False,
    return_sum_sq: bool = False,
    group: Any = None,
    vocab_start_index: int | None = None,
) -> Tensor | TokenLogprobs:
    """Log-probability of each target token, without storing the softmax.

    Same as, where target is kept:
        (logits.float() / temperature).log_softmax(-1).gather(-1, target[..., None])[..., 0]

    Args:
        logits: [..., V], any float dtype.
        target: [...], any integer dtype, in [0, V) or `ignore_index`.
        ignore_index: target value of a row that is not read: its results are 0 (argmax -1).
        temperature, logit_scale: logits * logit_scale / temperature, applied second.
        logit_softcapping: cap in logits = cap * tanh(logits / cap), applied first.
        return_entropy, return_lse, return_argmax, return_sum_sq: see `TokenLogprobs`.
        group: process group (of torch.distributed) whose members hold the vocabulary in parts:
            V is then the size of this process's part, and targets are global. Every member calls
            with the same rows and gets the same result; the gradient is of its own part. One
            all-gather of a few numbers per row. A DTensor with Shard(-1) is the same.
        vocab_start_index: this part's first class; None: rank * V, for parts of equal size.

    Returns:
        [...], float32 (float64 for float64 logits), in nats; a `TokenLogprobs` when any `return_*`
        is set. Every float result is differentiable.

    Raises:
        ValueError: a shape or value differs from the above. TypeError: a dtype does.
        IndexError: a target is out of range (CPU; elsewhere the row is NaN).
        RuntimeError: `group` in a PyTorch without torch.distributed.
    """
    op = "token_logprobs"
    alone = not (return_entropy or return_lse or return_argmax or return_sum_sq)
    if alone and group is None and vocab_start_index is None:
        scoring = (temperature, logit_scale, logit_softcapping)
        few = _directly(logits, target, ignore_index, *scoring)
        if few is not None:
            return few
    logits, group, vocab_start_index, target = parallel.unwrapped(
        op, "logits", logits, -1, group, vocab_start_index, target
    )
    checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        checks.bad_value(op, "logits", "[..., V] of at least one class", list(logits.shape))
    scale, softcap = scores(op, temperature, logit_scale, logit_softcapping)
    shape = list(logits.shape[:-1])
    _check_target(op, target, shape, logits)
    rows = logits.reshape(-1, logits.shape[-1])
    settings: dict[str, Any] = {
        "wanted": Wanted(entropy=return_entropy, sum_sq=return_sum_sq, argmax=return_argmax),
        "ignore_index": ignore_index,
        "scale": scale,
        "softcap": softcap,
    }
    shard = parallel.shard_of(op, group, vocab_start_index, logits.shape[-1])
    if shard is None:
        found = row_statistics(rows, target.long(), None, caller=op, **settings)
    else:
        found, _, _ = parallel.row_statistics(
            rows, target.long(), None, None, shard=shard, **settings
        )
    return _gathered(found, shape, return_entropy, return_lse, return_argmax, return_sum_sq)


@overload
def linear_token_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, **rest: Unpack[typed.LinearAlone]
) -> Tensor: ...
@overload
def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[True],
    **rest: Unpack[typed.LinearWithEntropy],
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    **rest: Unpack[typed.LinearWithLse],
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_argmax: Literal[True],
    **rest: Unpack[typed.LinearWithArgmax],
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_sum_sq: Literal[True],
    **rest: Unpack[typed.LinearWithSumSq],
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, **rest: Unpack[typed.LinearEither]
) -> Tensor | TokenLogprobs: ...
def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_argmax: bool = False,
    return_sum_sq: bool = False,
    group: Any = None,
    vocab_start_index: int | None = None,
    options: Any = None,
) -> Tensor | TokenLogprobs:
    """`token_logprobs` of a linear layer's output, without ever holding its logits.

    Same as:
        token_logprobs(torch.nn.functional.linear(input, linear_weight, linear_bias), target, ...)

    with the products of half-precision inputs accumulated in float32. The backward computes the
    logits again, chunk by chunk, so any function of the results can follow. In float32 under
    `use_backend("cpu")`, without a memory budget, a token's log-prob depends on its row alone, to
    the bit, and is the one that `generate` reports for it.

    Args:
        input: [..., H], any float dtype.
        linear_weight: [V, H], dtype of `input`.
        target: [...], any integer dtype, in [0, V) or `ignore_index`.
        linear_bias: [V], dtype of `input`.
        group, vocab_start_index: as in `token_logprobs`; V is the part in `linear_weight` and
            `linear_bias`, `input` is whole, and so is its gradient, by one all-reduce. A DTensor
            `linear_weight` with Shard(0) is the same.
        options: `LinearCrossEntropyOptions` or torch's own class of that name: size of a chunk.
        Others: see `token_logprobs`.

    Returns, Raises: as `token_logprobs`.
    """
    op = "linear_token_logprobs"
    alone = not (return_entropy or return_lse or return_argmax or return_sum_sq)
    given = (input, linear_weight, linear_bias, target)
    if alone and group is vocab_start_index is options is None and small.divides(temperature):
        plain = plain_scores(1.0, logit_scale, logit_softcapping)
        if plain and type(ignore_index) is int and ignore_index < 0:
            few = small.linear_token_logprobs(op, given, ignore_index, 1.0 / temperature)
            if few is not None:
                return few
    linear_weight, group, vocab_start_index, input, target, linear_bias = parallel.unwrapped(
        op, "linear_weight", linear_weight, 0, group, vocab_start_index, input, target, linear_bias
    )
    layer = linear.checked_layer(op, input, linear_weight, linear_bias)
    scale, softcap = scores(op, temperature, logit_scale, logit_softcapping)
    shape = list(input.shape[:-1])
    _check_target(op, target, shape, input)
    rows = layer._replace(input=layer.input.reshape(-1, input.shape[-1]))
    compared = Compared(target.long(), None, ignore_index, scale, softcap)
    wanted = Wanted(entropy=return_entropy, sum_sq=return_sum_sq, argmax=return_argmax)
    max_bytes = chunk_bytes(op, options, rows.input, linear_weight)
    into = accumulator(op, options, rows.input, linear_weight)
    shard = parallel.shard_of(op, group, vocab_start_index, linear_weight.shape[0])
    if shard is None:
        found = linear.linear_row_statistics(
            rows, compared, wanted=wanted, max_bytes=max_bytes, caller=op, into=into
        )
    else:
        found, _, _ = linear_parallel.linear_row_statistics(
            rows, compared, None, shard=shard, wanted=wanted, max_bytes=max_bytes, into=into
        )
    return _gathered(found, shape, return_entropy, return_lse, return_argmax, return_sum_sq)


def entropy(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    group: Any = None,
    vocab_start_index: int | None = None,
) -> Tensor:
    """Entropy of each row's softmax, without storing the softmax.

    Same as:
        torch.distributions.Categorical(logits=logits.float() / temperature).entropy()

    Args:
        logits: [..., V], any float dtype; -inf is a class of probability 0.
        temperature: positive; divides the logits.
        group, vocab_start_index: as in `token_logprobs`.

    Returns:
        [...], float32 (float64 for float64 logits), in nats, differentiable.

    Raises:
        ValueError: a shape or value differs from the above. TypeError: a dtype does.
        RuntimeError: `group` in a PyTorch without torch.distributed.
    """
    op = "entropy"
    alone = group is None and vocab_start_index is None
    if alone and small.divides(temperature) and dispatch.direct(logits):
        count, trained = logits.numel(), small.trained(logits)
        if logits.dim() > 0 and small.few(logits, logits.shape[-1], count, trained, entropy=True):
            small.note(op)
            return small.entropy(logits, 1.0 / temperature)
    logits, group, vocab_start_index = parallel.unwrapped(
        op, "logits", logits, -1, group, vocab_start_index
    )
    checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        checks.bad_value(op, "logits", "[..., V] of at least one class", list(logits.shape))
    scale, _ = scores(op, temperature, 1.0, None)
    rows = logits.reshape(-1, logits.shape[-1])
    wanted = Wanted(entropy=True)
    shard = parallel.shard_of(op, group, vocab_start_index, logits.shape[-1])
    if shard is None:
        found = row_statistics(rows, None, None, wanted=wanted, scale=scale, caller=op)
    else:
        compared = (rows, None, None, None)
        found, _, _ = parallel.row_statistics(*compared, shard=shard, wanted=wanted, scale=scale)
    return found.entropy.view(logits.shape[:-1])
