"""Keyword arguments of the overloads of `token_logprobs` and `linear_token_logprobs`.

`With...` lacks the flag of its name, which the overload itself demands to be True. For type
checkers alone; imported by none that runs.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from torch import Tensor

from ..cross_entropy.signatures import ScoreOptions


class _Options(ScoreOptions, total=False):
    ignore_index: int


class _LinearOptions(_Options, total=False):
    linear_bias: Tensor | None
    options: Any


class _Nothing(TypedDict, total=False):
    return_entropy: Literal[False]
    return_lse: Literal[False]
    return_argmax: Literal[False]
    return_sum_sq: Literal[False]


class _Entropy(TypedDict, total=False):
    return_entropy: bool


class _Lse(TypedDict, total=False):
    return_lse: bool


class _Argmax(TypedDict, total=False):
    return_argmax: bool


class _SumSq(TypedDict, total=False):
    return_sum_sq: bool


class Alone(_Options, _Nothing, total=False): ...


class WithEntropy(_Options, _Lse, _Argmax, _SumSq, total=False): ...


class WithLse(_Options, _Entropy, _Argmax, _SumSq, total=False): ...


class WithArgmax(_Options, _Entropy, _Lse, _SumSq, total=False): ...


class WithSumSq(_Options, _Entropy, _Lse, _Argmax, total=False): ...


class Either(WithEntropy, _Entropy, total=False): ...


class LinearAlone(_LinearOptions, _Nothing, total=False): ...


class LinearWithEntropy(_LinearOptions, _Lse, _Argmax, _SumSq, total=False): ...


class LinearWithLse(_LinearOptions, _Entropy, _Argmax, _SumSq, total=False): ...


class LinearWithArgmax(_LinearOptions, _Entropy, _Lse, _SumSq, total=False): ...


class LinearWithSumSq(_LinearOptions, _Entropy, _Lse, _Argmax, total=False): ...


class LinearEither(LinearWithEntropy, _Entropy, total=False): ...
