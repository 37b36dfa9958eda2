"""Text out of a model, piece by piece, with a state of constant size.

A GRU reads and writes any number of tokens. A Transformer sees at most its context: when that is
full, the older half of it is forgotten (`decoding`), so memory stays constant here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, tokenizer, writing
from .decoding import window_start
from .errors import CheckpointError, UsageError
from .kinds import CLASSES, LanguageModel
from .tokenizer import Tokenizer


def load(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer from a run, checkpoint or model folder; the model is in eval mode. What
    is damaged and was passed over is said on stderr.

    Raises:
        CheckpointError: nothing there is whole; the message names the file and the reason.
    """
    saved = checkpoint.find(Path(path))
    checkpoint.say_skipped(saved)
    return load_checkpoint(saved)


def no_model(saved: checkpoint.Checkpoint, error: Exception) -> CheckpointError:
    """What a state without a language model is."""
    config = saved.state.get("config")
    found = config.get("model") if isinstance(config, dict) else None
    what = str(error)
    if isinstance(found, dict) and found.get("class") == "RewardModel":
        what = "a reward model: fastlm eval and rl --reward take it"
    return CheckpointError(f"{saved.path / checkpoint.STATE}: no model in it ({what})")


def load_checkpoint(saved: checkpoint.Checkpoint) -> tuple[LanguageModel, Tokenizer]:
    try:
        settings: dict[str, Any] = dict(saved.state["config"]["model"])
        model = CLASSES[settings.pop("kind")](**settings)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise no_model(saved, error) from None
    checkpoint.load_parameters(model, saved)
    found = tokenizer.load(saved.path / checkpoint.TOKENIZER)
    if found.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{saved.path / checkpoint.TOKENIZER}: {found.vocab_size} ids, the model has "
            f"{model.config.vocab_size}"
        )
    with saved.understood():
        trained_with = saved.state["config"].get("data", {}).get("tokenizer", found.sha256)
    if found.sha256 != trained_with:
        raise CheckpointError(
            f"{saved.path / checkpoint.TOKENIZER}: not the tokenizer of the model's training"
        )
    return model.eval(), found


@dataclass(frozen=True)
class Continuation:
    """`stopped`: "end" of the document, "stop" string, or "length"."""

    prompt: str
    sample: int
    text: str
    tokens: int
    stopped: str


def _ids(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> Tensor:
    """An empty prompt starts a document."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt) if prompt else torch.tensor([tokenizer.end]).numpy()
    return torch.from_numpy(ids).to(device)


def forgotten(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> tuple[int, int]:
    """(tokens of a prompt, how many of them, the first ones, do not fit into the context)."""
    count = len(tokenizer.encode(prompt))
    context = getattr(model.config, "context", None)
    return count, 0 if context is None else window_start(count, context)


def pieces(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[writing.Piece]:
    """Text as it becomes certain, of `samples` continuations of each prompt.

    Options as in `generate`. The texts do not depend on which prompts stand beside them, and
    sample 0 is what `generate` gives: with a GRU to the bit, with a Transformer up to the rounding
    of products whose bits depend on their number of rows.
    """
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    ids = [_ids(model, tokenizer, prompt) for prompt in prompts]
    return writing.write(model, tokenizer, ids, samples, max_new_tokens, stop, sampling)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue `prompt`, yielding pieces of text as they are certain; joined they are the text.

    Ends after `max_new_tokens`, at the end of a document, or before the first stop string, of
    which nothing is yielded however many tokens it spans. The text depends on the arguments alone:
    token i is drawn with (seed, step i). An empty prompt starts a document. Penalties and filters
    are those of `fastlm.generate`: over the tokens of the prompt and of the text.
    """
    made = pieces(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    return (piece.text for piece in made if piece.text)


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    **options: Any,
) -> list[Continuation]:
    """`samples` continuations of each prompt, in their order; options as in `generate`."""
    texts = [""] * (len(prompts) * samples)
    ends: list[Any] = [None] * len(texts)
    for piece in pieces(model, tokenizer, prompts, samples=samples, **options):
        texts[piece.row] += piece.text
        ends[piece.row] = piece
    return [
        Continuation(prompts[row // samples], row % samples, text, end.tokens, end.stopped)
        for row, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
