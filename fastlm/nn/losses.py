"""Loss modules: constructors, attributes and state_dict of their torch.nn namesakes.

What fastlm adds is keyword-only. `LinearCrossEntropyLoss` and `LinearTokenLogprobs` share one
state_dict, so a head trained with the first can be scored with the second.

With `group` (see `fastlm.cross_entropy`) a module holds this process's part of the vocabulary: its
weights, and `num_classes`, are the part's. Ranks that share a seed start with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module

from ..ops.cross_entropy.op import cross_entropy
from ..ops.linear_cross_entropy.op import linear_cross_entropy
from ..ops.token_logprobs.op import TokenLogprobs, linear_token_logprobs

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


class _Part(NamedTuple):
    """Of the vocabulary; without a group all of it."""

    group: Any
    vocab_start_index: int | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Part:
        # a copy of the module is of the same part, and a process group cannot be copied
        return self


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` through `fastlm.cross_entropy`, which see for what is added."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss_weight: float = 0.0,
        logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        group: Any = None,
        vocab_start_index: int | None = None,
        return_aux: Sequence[str] = (),
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.added: dict[str, Any] = {
            "z_loss_weight": z_loss_weight,
            "logit_softcapping": logit_softcapping,
            "logit_scale": logit_scale,
            "temperature": temperature,
            "return_aux": tuple(return_aux),
        }
        self.part = _Part(group, vocab_start_index)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None
    ) -> Loss:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            group=self.part.group,
            vocab_start_index=self.part.vocab_start_index,
            **self.added,
        )


class LinearCrossEntropyLoss(Module):
    """A linear layer and the cross-entropy of its output, without ever holding the logits.

    As `torch.nn.LinearCrossEntropyLoss` (torch 2.13); the layer is `self.linear`. See
    `fastlm.linear_cross_entropy` for what is added and for `options`. With `out_features` the
    logits are held.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss_weight: float = 0.0,
        logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        shift: int = 0,
        group: Any = None,
        vocab_start_index: int | None = None,
        return_aux: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.register_buffer("weight", weight)
        total = math.prod(self.out_features, start=num_classes)
        self.linear = Linear(in_features, total, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.added: dict[str, Any] = {
            "z_loss_weight": z_loss_weight,
            "logit_softcapping": logit_softcapping,
            "logit_scale": logit_scale,
            "temperature": temperature,
            "shift": shift,
            "return_aux": tuple(return_aux),
        }
        self.part = _Part(group, vocab_start_index)

    def forward(self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None) -> Loss:
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight = weight.reshape(*shape, self.linear.in_features)
            bias = None if bias is None else bias.reshape(shape)
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            group=self.part.group,
            vocab_start_index=self.part.vocab_start_index,
            **self.added,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


class LinearTokenLogprobs(Module):
    """A linear layer and the log-probability of target tokens under its output.

    Constructor and state_dict of `LinearCrossEntropyLoss`; see `fastlm.linear_token_logprobs`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
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
    ) -> None:
        super().__init__()
        self.linear = Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.settings: dict[str, Any] = {
            "ignore_index": ignore_index,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "logit_softcapping": logit_softcapping,
            "return_entropy": return_entropy,
            "return_lse": return_lse,
            "return_argmax": return_argmax,
            "return_sum_sq": return_sum_sq,
            "options": options,
        }
        self.part = _Part(group, vocab_start_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | TokenLogprobs:
        return linear_token_logprobs(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            group=self.part.group,
            vocab_start_index=self.part.vocab_start_index,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if value)
