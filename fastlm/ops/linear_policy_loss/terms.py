"""The loss of a row of `linear_policy_loss`, and its derivatives by the row's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ..cross_entropy.loss import finite
from ..linear_row_statistics.chunks import Needs, Span
from ..policy_loss import op as policy
from ..policy_loss import reference as formulas
from ..row_statistics.op import Upstream, result_dtype

OP = "linear_policy_loss"
RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Terms(NamedTuple):
    """The loss of a row, checked: tensors are [N] in the result's dtype, and constants."""

    row_weight: Tensor
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance: Tensor | None
    loss_type: str
    clip_eps_low: float
    clip_eps_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    def rows(self, span: Span) -> Terms:
        return Terms(*(v[span] if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]

    def _call(self, logprobs: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        assert self.advantages is not None
        return self.loss_type, logprobs, old, self.advantages

    def loss(self, logprobs: Tensor) -> Tensor:
        """[n], before the weight of the row, and without the entropy."""
        clip_eps = (self.clip_eps_low, self.clip_eps_high)
        # keep is read by gspo alone, which does not come here
        loss = policy.policy_term(*self._call(logprobs), None, clip_eps, self.dual_clip)
        if self.importance is not None:
            loss = loss * self.importance
        if self.ref_logprobs is not None:
            kl = formulas.kl(logprobs, self.ref_logprobs, self.kl_estimator)
            loss = loss + self.kl_coef * kl
        return loss

    def losses(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """[n] each, before the weight of the row: the loss, its derivative by logprobs."""
        loss, clip_eps = self.loss(logprobs), (self.clip_eps_low, self.clip_eps_high)
        slope = policy.policy_slope(*self._call(logprobs), clip_eps, self.dual_clip)
        if self.importance is not None:
            slope = slope * self.importance
        if self.ref_logprobs is not None:
            both = (logprobs, self.ref_logprobs, self.kl_estimator)
            slope = slope + self.kl_coef * formulas.kl_slope(*both)
        return loss - self.entropy_coef * entropy if self.entropy_coef else loss, slope


class RowLosses:
    """Evaluates the rows of a chunk and keeps, for all rows, losses and derivatives."""

    def __init__(self, terms: Terms, input: Tensor, row_loss: RowLoss | None, needs: Needs) -> None:
        dtype, self.terms, self.row_loss = result_dtype(input), terms, row_loss
        rows = len(input)
        self.losses = input.new_zeros(rows, dtype=dtype)
        differentiated = rows if any(needs) else 0
        self.on_logprob = input.new_zeros(differentiated, dtype=dtype)
        uses_entropy = row_loss is not None or terms.entropy_coef != 0
        self.on_entropy = input.new_zeros(differentiated if uses_entropy else 0, dtype=dtype)

    def upstream(self, span: Span, found: tuple[Tensor, ...]) -> Upstream:
        return self.evaluate(span, found[0], found[2])

    def evaluate(self, span: Span, logprob: Tensor, entropy: Tensor) -> Upstream:
        weight = self.terms.row_weight[span]
        if self.row_loss is not None:
            loss, on_logprob, on_entropy = self._custom(self.row_loss, span, logprob, entropy)
        else:
            loss, on_logprob = self.terms.rows(span).losses(logprob, entropy)
            on_entropy = torch.full_like(logprob, -self.terms.entropy_coef)
        # a row of weight 0 has no loss, whatever its value
        used = weight != 0
        self.losses[span] = torch.where(used, loss * weight, 0.0)
        if not self.on_logprob.numel():
            return Upstream()
        self.on_logprob[span] = on_logprob = torch.where(used, on_logprob * weight, 0.0)
        if not self.on_entropy.numel():
            return Upstream(logprob=on_logprob)
        self.on_entropy[span] = on_entropy = torch.where(used, on_entropy * weight, 0.0)
        return Upstream(logprob=on_logprob, entropy=on_entropy)

    def _custom(
        self, row_loss: RowLoss, span: Span, *statistics: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its derivatives by log-prob and entropy."""
        needed = bool(self.on_logprob.numel())
        if isinstance(span, slice):
            span = torch.arange(span.start, span.stop, device=statistics[0].device)
        with torch.set_grad_enabled(needed):
            leaves = [v.detach().requires_grad_(needed) for v in statistics]
            loss = row_loss(leaves[0], leaves[1], span)
            checks.tensor(OP, "what row_loss returns", loss)
            checks.shape(OP, "what row_loss returns", loss, span.shape, "one per row")
            grads: Sequence[Tensor | None] = (None, None)
            if needed and loss.requires_grad:
                grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        on_logprob, on_entropy = (
            torch.zeros_like(v) if g is None else g for v, g in zip(statistics, grads, strict=True)
        )
        return loss.detach().to(statistics[0].dtype), on_logprob, on_entropy


class Options(NamedTuple):
    """Arguments that a call shares with `policy_loss`; the scalars have been checked."""

    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    mask: Tensor | None
    loss_type: str
    clip_eps_low: float
    clip_eps_high: float | None
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    is_ratio: Tensor | None
    is_mode: str
    is_cap: float | None
    loss_agg_mode: str | None
    max_length: int | None


_DEFAULTS = Options(
    None, None, None, "reinforce", 0.2, None, None, 0.0, "k3", 0.0, None, "truncate", None,
    "token-mean", None,
)  # fmt: skip


def checked_options(options: Options, row_loss: RowLoss | None) -> Options:
    high = options.clip_eps_low if options.clip_eps_high is None else options.clip_eps_high
    policy.check_options(
        options.loss_type,
        (options.clip_eps_low, high),
        options.dual_clip,
        options.kl_estimator,
        options.is_mode,
        options.is_cap,
        options.loss_agg_mode,
        options.max_length,
        OP,
    )
    for name in ("clip_eps_low", "kl_coef", "entropy_coef"):
        finite(OP, name, getattr(options, name))
    if options.kl_coef and options.ref_logprobs is None:
        checks.bad_value(OP, "ref_logprobs", "given with kl_coef", None)
    if row_loss is not None:
        if torch.compiler.is_compiling():
            checks.bad_value(OP, "row_loss", "None under torch.compile", "a callable")
        for name in set(Options._fields) - {"mask", "loss_agg_mode", "max_length"}:
            value = getattr(options, name)
            if value is not getattr(_DEFAULTS, name) and value != getattr(_DEFAULTS, name):
                checks.bad_value(OP, name, "left out with row_loss", type(value).__name__)
    return options._replace(clip_eps_high=high)


def terms_of(
    advantages: Tensor | None, keep: Tensor, options: Options, dtype: torch.dtype, custom: bool
) -> Terms:
    def rows(what: str, value: Tensor | None, per_sequence: bool = False) -> Tensor | None:
        if value is None:
            return None
        value = policy.per_token(what, value, keep, per_sequence, like="target", op=OP)
        return value.detach().to(dtype).reshape(-1)

    mode = options.loss_agg_mode
    if mode is None:
        mode = policy.AGGREGATION[options.loss_type]
    importance = rows("is_ratio", options.is_ratio, per_sequence=True)
    if importance is not None:
        importance = formulas.importance(importance, options.is_mode, options.is_cap)
    if advantages is None and not custom:
        checks.bad_type(OP, "advantages", "a tensor", "None")
    ref_logprobs = rows("ref_logprobs", options.ref_logprobs)
    return Terms(
        row_weight=formulas.token_weights(keep, mode, options.max_length, dtype).reshape(-1),
        advantages=rows("advantages", advantages, per_sequence=True),
        old_logprobs=rows("old_logprobs", options.old_logprobs),
        ref_logprobs=ref_logprobs if options.kl_coef else None,
        importance=importance,
        loss_type=options.loss_type,
        clip_eps_low=float(options.clip_eps_low),
        clip_eps_high=float(options.clip_eps_high or 0.0),
        dual_clip=None if options.dual_clip is None else float(options.dual_clip),
        kl_coef=float(options.kl_coef),
        kl_estimator=options.kl_estimator,
        entropy_coef=float(options.entropy_coef),
    )
