"""fastlm: fused kernels for training language models in PyTorch."""

from . import nn
from .dispatch import backends, explain, use_backend
from .ops.embedding_gru.public import TokenPlan, embedding_gru, gru, token_plan

__version__ = "0.1.0"

__all__ = [
    "TokenPlan",
    "backends",
    "embedding_gru",
    "explain",
    "gru",
    "nn",
    "token_plan",
    "use_backend",
]
