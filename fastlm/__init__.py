"""fastlm: fused kernels for training language models in PyTorch."""

from .dispatch import backends, explain, use_backend
from .ops.cross_entropy.op import cross_entropy
from .ops.linear_cross_entropy.op import linear_cross_entropy
from .ops.linear_cross_entropy.options import LinearCrossEntropyOptions
from .ops.token_logprobs.op import (
    TokenLogprobs,
    entropy,
    linear_token_logprobs,
    token_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyOptions",
    "TokenLogprobs",
    "backends",
    "cross_entropy",
    "entropy",
    "explain",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "token_logprobs",
    "use_backend",
]
