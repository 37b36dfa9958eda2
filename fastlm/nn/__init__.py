"""Modules with the constructors and state_dict of their torch.nn namesakes."""

from .attention import MultiheadAttention
from .decoder import GRUDecoder
from .gru import GRU, EmbeddingGRU
from .gru_cell import GRUCell
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss, LinearTokenLogprobs

__all__ = [
    "GRU",
    "CrossEntropyLoss",
    "EmbeddingGRU",
    "GRUCell",
    "GRUDecoder",
    "LinearCrossEntropyLoss",
    "LinearTokenLogprobs",
    "MultiheadAttention",
]
