"""The kinds of model by name: what the command line, checkpoints and comparisons choose from."""

from __future__ import annotations

from typing import Any

from .model import GRULM, PlainGRULM
from .transformer import PlainTransformerLM, TransformerLM

LanguageModel = GRULM | PlainGRULM | TransformerLM | PlainTransformerLM

# on fastlm's ops, and the same in plain PyTorch
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "gru": (GRULM, PlainGRULM),
    "transformer": (TransformerLM, PlainTransformerLM),
}
CLASSES: dict[str, type[Any]] = {made.__name__: made for both in KINDS.values() for made in both}
