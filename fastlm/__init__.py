"""fastlm: fused kernels for training language models in PyTorch."""

from .dispatch import backends, explain, use_backend
from .ops.sampling.op import sample

__version__ = "0.1.0"

__all__ = [
    "backends",
    "explain",
    "sample",
    "use_backend",
]
