"""A training run from Python, with the names and defaults of `fastlm train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import checkpoint, files, settings, starting
from .config import TrainConfig
from .errors import UsageError
from .pairs import PairStore
from .progress import Reporter
from .store import TokenStore
from .tokenizer import Tokenizer
from .trainer import Result, Trainer

_OWN = {field.name for field in fields(TrainConfig)}
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def make_trainer(
    data: Paths | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    reporter: Reporter | None = None,
    save_every: float = 30.0,
    **options: Any,
) -> Trainer:
    """Prepare the text or pairs, make the model, continue what is in `out`.

        run = lm.make_trainer("books/", out="runs/a", hidden=256, budget="60s", lr=4e-3)
        run.on("eval", lambda score: print(score.bits_per_byte))
        result = run.fit()  # result.score, result.verdict; run.model, run.tokenizer

    Args:
        data: files or folders; None: `pairs=`, or else six novels by Jane Austen.
        out: run folder for checkpoints, metrics.jsonl and config.toml; None keeps nothing.
        resume: "auto" continues the newest whole checkpoint in `out`, with its settings where none
            are given; "never" refuses a folder that has one.
        allow_change: settings that may differ from the checkpoint's, such as "budget".
        options: fields of `Recipe`, as `fastlm train` has them: hidden=256, label_smoothing=0.1.

    Raises:
        UsageError: an option is unknown (the nearest one is named), has another type, or differs
            from the checkpoint.
    """
    if resume not in ("auto", "never"):
        raise UsageError(f"resume must be auto or never, got {resume!r}")
    given = settings.checked(options)
    if data is not None:
        paths = [data] if isinstance(data, str | os.PathLike) else data
        given["data"] = tuple(os.fspath(path) for path in paths)
    folder = None if out is None else Path(out)
    saved = checkpoint.newest(folder) if folder is not None else None
    if saved is not None and resume == "never":
        raise UsageError(f"{out}: has checkpoints; choose another folder")
    chosen = starting.choose(given, saved)
    recipe, prepared = chosen.recipe, chosen.prepare()
    model = recipe.make_model(prepared.tokens)
    if chosen.start is not None:
        chosen.start.load_into(model)
    run = Trainer(
        model,
        prepared.tokens,
        prepared.tokenizer,
        recipe.train_config(),
        out=folder,
        reporter=reporter,
        save_every=save_every,
        settings=recipe.to_json(),
    )
    if saved is not None:
        run.resume(saved, allow=tuple(allow_change))
    if folder is not None:
        files.write_text(folder / "config.toml", settings.dump(recipe))
    return run


def fit(
    model: Any,
    tokens: TokenStore | PairStore,
    tokenizer: Tokenizer,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
    save_every: float = 30.0,
    **options: Any,
) -> Result:
    """What `model.fit` does: `Trainer(model, tokens, tokenizer, TrainConfig(**options)).fit()`.

    Raises:
        UsageError: an option is no field of `TrainConfig` (the nearest one is named), or is of
            another type.
    """
    given = settings.checked(options)
    if foreign := sorted(given.keys() - _OWN):
        raise UsageError(f"{', '.join(foreign)}: decided by the model and the text already")
    if model.window is not None:
        given = {"seq": model.window, **given}
    run = Trainer(
        model,
        tokens,
        tokenizer,
        TrainConfig(**given),
        out=None if out is None else Path(out),
        reporter=reporter,
        save_every=save_every,
    )
    return run.fit()
