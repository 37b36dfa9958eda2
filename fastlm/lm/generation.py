"""Text out of a model, piece by piece, with a state of constant size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastlm

from . import checkpoint, tokenizer
from .errors import CheckpointError, UsageError
from .kinds import CLASSES, LanguageModel
from .tokenizer import Tokenizer

# text appears after this many tokens: far less than a second of work, and few calls from Python
PIECE = 16


def load(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer from a run, checkpoint or model folder; the model is in eval mode. What
    is damaged and was passed over is said on stderr.

    Raises:
        CheckpointError: nothing there is whole; the message names the file and the reason.
    """
    saved = checkpoint.find(Path(path))
    checkpoint.say_skipped(saved)
    return load_checkpoint(saved)


def load_checkpoint(saved: checkpoint.Checkpoint) -> tuple[LanguageModel, Tokenizer]:
    try:
        settings: dict[str, Any] = dict(saved.state["config"]["model"])
        model = CLASSES[settings.pop("kind")](**settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{saved.path / checkpoint.STATE}: no model in it ({error})"
        ) from None
    checkpoint.load_parameters(model, saved)
    found = tokenizer.load(saved.path / checkpoint.TOKENIZER)
    if found.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{saved.path / checkpoint.TOKENIZER}: {found.vocab_size} ids, the model has "
            f"{model.config.vocab_size}"
        )
    trained_with = saved.state["config"].get("data", {}).get("tokenizer", found.sha256)
    if found.sha256 != trained_with:
        raise CheckpointError(
            f"{saved.path / checkpoint.TOKENIZER}: not the tokenizer of the model's training"
        )
    return model.eval(), found


class _StopText:
    """Passes text on, except what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def put(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was completed)."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            return self._held[: min(hits)], True
        keep = 0
        for stop in self._stops:
            for size in range(1, min(len(stop), len(self._held) + 1)):
                if self._held.endswith(stop[:size]):
                    keep = max(keep, size)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready, False

    def finish(self) -> str:
        return self._held


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue `prompt`, yielding pieces of text as they are certain; joined they are the text.

    Ends after `max_new_tokens`, at the end of a document, or before the first stop string. The
    text depends on the arguments alone: token i is drawn with (seed, step i). An empty prompt
    starts a document.
    """
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt) if prompt else torch.tensor([tokenizer.end]).numpy()
    return _generate(
        model,
        tokenizer,
        torch.from_numpy(ids).to(device),
        max_new_tokens,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
        _StopText(stop),
    )


def _generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: torch.Tensor,
    max_new_tokens: int,
    sampling: dict[str, Any],
    stop: _StopText,
) -> Iterator[str]:
    was_training = model.training
    model.eval()
    stream = tokenizer.stream()
    try:
        with torch.inference_mode():
            state, last, decoder = model.read(prompt[None, :-1]), prompt[-1:], model.decoder()
        for index in range(0, max_new_tokens, PIECE):
            count = min(PIECE, max_new_tokens - index)
            # not around the yield: the caller's code must not run in inference mode
            with torch.inference_mode():
                made = fastlm.generate(
                    decoder, last, count, step=index, state=state, stop=tokenizer.end, **sampling
                )
            last, state = made.tokens[-1:], made.state
            tokens = made.tokens[: int(made.lengths)].tolist()
            ended = tokens[-1] == tokenizer.end
            for token in tokens[:-1] if ended else tokens:
                text, stopped = stop.put(stream.put(token))
                if text:
                    yield text
                if stopped:
                    return
            if ended:
                break
        text, stopped = stop.put(stream.finish())
        rest = text if stopped else text + stop.finish()
        if rest:
            yield rest
    finally:
        model.train(was_training)
