"""Every choice of a training run in one flat record: what the command line sets, what a checkpoint
remembers, and what the demo shares with both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .cleaning import Cleaning
from .config import TrainConfig
from .errors import CheckpointError
from .model import GRULM
from .preparation import DataConfig
from .store import TokenStore

_TRAIN = {field.name for field in fields(TrainConfig)}


@dataclass(frozen=True)
class Recipe:
    """`data` None: the six novels shipped with fastlm; paths are absolute."""

    data: tuple[str, ...] | None = None
    holdout: str | None = None
    tokenizer: str = "auto"
    vocab: int = 2048
    clean: bool = True
    hidden: int = 256
    embedding: int | None = None
    layers: int = 1
    dropout: float = 0.0
    tied: bool = False
    budget: str = TrainConfig.budget
    lr: float = TrainConfig.lr
    batch: int = TrainConfig.batch
    seq: int = TrainConfig.seq
    warmup: float = TrainConfig.warmup
    floor: float = TrainConfig.floor
    weight_decay: float = TrainConfig.weight_decay
    clip: float = TrainConfig.clip
    seed: int = TrainConfig.seed
    evals: int = TrainConfig.evals
    eval_tokens: int = TrainConfig.eval_tokens
    patience: int | None = None

    @classmethod
    def of(cls, saved: dict[str, Any], given: dict[str, Any]) -> Recipe:
        """What a checkpoint remembers, overruled by what is given now."""
        values = {**saved, **given}
        if values.get("data") is not None:
            values["data"] = tuple(str(Path(path).resolve()) for path in values["data"])
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(
                f"settings in the checkpoint are not known here: {error}"
            ) from None

    def data_config(self) -> DataConfig:
        holdout: str | float | None = self.holdout
        try:
            holdout = None if self.holdout is None else float(self.holdout)
        except ValueError:
            pass  # the name of a document
        cleaning = Cleaning() if self.clean else Cleaning.off()
        return DataConfig(self.data, holdout, self.tokenizer, self.vocab, cleaning)

    def train_config(self) -> TrainConfig:
        return TrainConfig(**{k: v for k, v in asdict(self).items() if k in _TRAIN})

    def model_arguments(self, vocab_size: int) -> dict[str, Any]:
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "embedding_dim": self.embedding,
            "num_layers": self.layers,
            "dropout": self.dropout,
            "tied": self.tied,
        }

    def model(self, store: TokenStore) -> GRULM:
        """A new model, drawn with `seed`, whose first guess is how often each token occurs."""
        torch.manual_seed(self.seed)
        model = GRULM(**self.model_arguments(store.vocab_size))
        model.start_from_counts(store.token_counts("train"))
        return model

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
