"""Modules with the constructors and state_dict of their torch.nn namesakes."""

from .gru import GRU, EmbeddingGRU, GRUDecoder
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss, LinearTokenLogprobs

__all__ = [
    "GRU",
    "CrossEntropyLoss",
    "EmbeddingGRU",
    "GRUDecoder",
    "LinearCrossEntropyLoss",
    "LinearTokenLogprobs",
]
