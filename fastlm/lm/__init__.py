"""A small language-model system on fastlm's public functions: data, training, generation.

Names are imported when they are first used, so that the command line starts quickly.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BPETokenizer": "tokenizer",
    "ByteTokenizer": "tokenizer",
    "Cleaning": "data",
    "DPO": "dpo",
    "DPOConfig": "objectives",
    "DataConfig": "preparation",
    "GRULM": "model",
    "InputError": "errors",
    "CheckpointError": "errors",
    "Continuation": "generation",
    "LMError": "errors",
    "PairConfig": "pairdata",
    "PairStore": "pairs",
    "PlainGRULM": "model",
    "PolicyConfig": "policy",
    "PolicyGradient": "policy",
    "PlainTransformerLM": "transformer",
    "Score": "evaluation",
    "TokenStore": "store",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "TransformerLM": "transformer",
    "completions": "abstractive",
    "evaluate": "evaluation",
    "generate": "generation",
    "generate_batch": "generation",
    "load": "generation",
    "make_trainer": "training",
    "prepare": "preparation",
    "prepare_pairs": "pairdata",
    "rouge_beside_lead": "abstractive",
    "summaries": "abstractive",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
