"""Every choice of a training run in one flat record: what the command line sets, what a checkpoint
remembers, and what the demo shares with both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import hub, paths
from .cleaning import Cleaning
from .config import TrainConfig
from .errors import CheckpointError, UsageError
from .kinds import KINDS, LanguageModel
from .pairdata import PairConfig
from .pairs import PairStore
from .preparation import DataConfig, held_out_of
from .store import TokenStore

_TRAIN = {field.name for field in fields(TrainConfig)}

# where a Transformer starts from other settings than a GRU: what did best in 40 s on one core
# (benchmarks/LOG.md, 2026-11-27)
DEFAULTS: dict[str, dict[str, Any]] = {
    "gru": {},
    "transformer": {"hidden": 128, "layers": 2, "batch": 8, "seq": 128, "lr": 4e-3},
}
# settings that one kind has and the other has not
_OWN = {
    "gru": ("embedding",),
    "transformer": ("heads", "kv_heads", "ffn", "context", "z_loss", "recompute"),
}
MOST_LAYERS = 4096
TOKENIZERS = ("auto", "bpe", "bytes")


def foreign(recipe: Recipe) -> dict[str, str]:
    """{setting that this kind of model has not: the kind that has it}."""
    return {name: kind for kind, names in _OWN.items() if kind != recipe.model for name in names}


def _absolute(name: str, path: str) -> str:
    """A path for whoever resumes in another folder."""
    if not path:
        raise UsageError(f"--{name}: a name of a file or folder is empty")
    if path == paths.STDIN or hub.names(path):  # which is refused by who reads them
        return path
    try:
        found = str(Path(path).resolve())
        found.encode()  # config.toml and the checkpoint name it
    except UnicodeEncodeError:
        raise UsageError(f"--{name} {path}: a name that is not UTF-8; rename it") from None
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL
        raise UsageError(f"--{name} {path}: {error}") from None
    return found


@dataclass(frozen=True)
class Recipe:
    """`data` None: the six novels shipped with fastlm; paths are absolute. `context` None is
    `seq`. `pairs`: files of prompts and targets instead of text, read as `PairConfig` says. `init`:
    the folder of a saved model to start from."""

    data: tuple[str, ...] | None = None
    pairs: tuple[str, ...] | None = None
    format: str = PairConfig.format
    group: str | None = None
    longest: int = PairConfig.longest
    learn: str = PairConfig.learn
    init: str | None = None
    holdout: str | None = None
    tokenizer: str = "auto"
    vocab: int = 2048
    clean: bool = True
    model: str = "gru"
    hidden: int = 256
    embedding: int | None = None
    layers: int = 1
    heads: int = 4
    kv_heads: int | None = None
    ffn: int | None = None
    context: int | None = None
    dropout: float = 0.0
    tied: bool = False
    z_loss: float = 0.0
    recompute: bool = False
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
    label_smoothing: float = TrainConfig.label_smoothing
    accumulate: int = TrainConfig.accumulate
    precision: str = TrainConfig.precision
    schedule: str = TrainConfig.schedule
    decay: float = TrainConfig.decay

    def __post_init__(self) -> None:
        if self.model not in KINDS:
            raise UsageError(f"model must be one of {', '.join(KINDS)}, got {self.model!r}")
        if self.tokenizer not in TOKENIZERS:
            raise UsageError(
                f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}"
            )
        for name in ("hidden", "embedding", "layers", "heads", "kv_heads", "ffn"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError(f"{name} must be at least 1, got {size}")
        if self.layers > MOST_LAYERS:  # which are made one by one, hours before memory runs out
            raise UsageError(f"layers must be at most {MOST_LAYERS:,}, got {self.layers:,}")
        for name, kind in foreign(self).items():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is for --model {kind}, not for {self.model}")
        if self.pairs is not None and self.data is not None:
            raise UsageError("--data is for text and --pairs for prompts and targets: one of them")
        for name in ("format", "group", "longest", "learn") if self.pairs is None else ():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} is for --pairs, not for text")
        if self.pairs is None and self.context is not None and self.context < self.seq:
            raise UsageError(f"context must be at least seq ({self.seq}), got {self.context}")

    @classmethod
    def of(cls, saved: dict[str, Any], given: dict[str, Any]) -> Recipe:
        """What a checkpoint remembers, overruled by what is given now."""
        kind = given.get("model", saved.get("model", cls.model))
        values = {**DEFAULTS.get(kind, {}), **saved, **given}
        for name in ("data", "pairs"):
            if values.get(name) is not None:
                values[name] = tuple(_absolute(name, path) for path in values[name])
        if values.get("init") is not None:
            values["init"] = _absolute("init", values["init"])
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(
                f"settings in the checkpoint are not known here: {error}"
            ) from None

    def data_config(self) -> DataConfig:
        cleaning = Cleaning() if self.clean else Cleaning.off()
        holdout = held_out_of(self.holdout)
        return DataConfig(self.data, holdout, self.tokenizer, self.vocab, cleaning)

    def pair_config(self) -> PairConfig:
        """A pair is no longer than what a Transformer reads at once."""
        assert self.pairs is not None
        share = PairConfig.holdout if self.holdout is None else held_out_of(self.holdout)
        if not isinstance(share, float):
            raise UsageError(f"--holdout of pairs is a share such as 0.1, got {share!r}")
        longest = self.longest
        if self.model == "transformer":
            longest = min(longest, (self.context or self.seq) + 1)
        return PairConfig(
            self.pairs, self.format, self.group, share, self.tokenizer, self.vocab, longest,
            self.learn,
        )  # fmt: skip

    def train_config(self) -> TrainConfig:
        return TrainConfig(**{k: v for k, v in asdict(self).items() if k in _TRAIN})

    def model_arguments(self, vocab_size: int) -> dict[str, Any]:
        shared = {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "dropout": self.dropout,
            "tied": self.tied,
        }
        if self.model == "gru":
            return {**shared, "embedding_dim": self.embedding}
        return {
            **shared,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "ffn_size": self.ffn,
            "context": self.seq if self.context is None else self.context,
            "z_loss": self.z_loss,
            "recompute": self.recompute,
            "end": vocab_size - 1,  # of every tokenizer
        }

    def make_model(self, store: TokenStore | PairStore) -> LanguageModel:
        """A new model, drawn with `seed`, whose first guess is how often each token occurs."""
        torch.manual_seed(self.seed)
        model = KINDS[self.model][0](**self.model_arguments(store.vocab_size))
        model.start_from_counts(store.token_counts("train"))
        return model

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
