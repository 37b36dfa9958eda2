"""Modules with the constructors and state_dict of their torch.nn namesakes."""

from .gru import GRU, EmbeddingGRU, GRUDecoder

__all__ = ["GRU", "EmbeddingGRU", "GRUDecoder"]
