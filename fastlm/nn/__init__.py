"""Modules with the constructors and state_dict of their torch.nn namesakes."""

from .decoder import GRUDecoder
from .gru import GRU, EmbeddingGRU
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss, LinearTokenLogprobs

__all__ = [
    "GRU",
    "CrossEntropyLoss",
    "EmbeddingGRU",
    "GRUDecoder",
    "LinearCrossEntropyLoss",
    "LinearTokenLogprobs",
]
