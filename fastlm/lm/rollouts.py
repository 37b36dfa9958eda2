"""Continuations of contexts from the corpus: what a model writes, and what the author wrote."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlm

from .errors import InputError
from .kinds import LanguageModel
from .pairs import IGNORED
from .preferences import Preference
from .store import TokenStore
from .tokenizer import Tokenizer

ROWS = 64  # continued at once


@dataclass(frozen=True)
class Context:
    """Tokens of a document, and those that follow there."""

    prompt: Tensor  # [P]
    following: Tensor  # [N]


def contexts(
    store: TokenStore, split: str, count: int, prompt: int, following: int, seed: int
) -> list[Context]:
    """Places in the documents of a split, each document by its length, drawn by `seed`.

    Raises:
        InputError: no document is long enough.
    """
    need = prompt + following
    spans = [(start, stop - 1 - need) for start, stop in store.spans(split)]  # without its end
    spans = [(start, last) for start, last in spans if last >= start]
    if not spans:
        raise InputError(f"no document of the {split} part has {need} tokens")
    draw = random.Random(f"contexts/{seed}")
    weights = [last - start + 1 for start, last in spans]
    found = []
    for start, last in draw.choices(spans, weights, k=count):
        at = draw.randint(start, last)
        ids = torch.from_numpy(store.ids[at : at + need].astype("int64"))
        found.append(Context(ids[:prompt], ids[prompt:]))
    return found


@dataclass(frozen=True)
class Rollout:
    """tokens, logprobs, mask [B, N]; lengths [B], the end of a document counted."""

    prompts: Tensor
    tokens: Tensor
    logprobs: Tensor
    mask: Tensor
    lengths: Tensor

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [tokenizer.decode(row[:length]) for row, length in rows]


def rollout(
    model: LanguageModel,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    end: int | None,
    seed: int,
    step: int = 0,
    temperature: float = 1.0,
    gradient: bool = False,
) -> Rollout:
    """Continue prompts [B, P]; with `gradient` the log-probs have one, without a second forward
    through a GRU."""
    was_training = model.training
    model.eval()
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "step": step, "stop": end}
    direct = gradient and model.carries_state
    made = fastlm.generate(
        model, prompts, max_new_tokens, return_logprobs=True, save_for_backward=direct, **options
    )
    logprobs = made.logprobs
    assert logprobs is not None
    mask = made.tokens != IGNORED
    if gradient and not direct:
        logprobs = logprobs_of(model, prompts, made.tokens, temperature)
    model.train(was_training)
    return Rollout(prompts, made.tokens, logprobs, mask, made.lengths)


def logprobs_of(
    model: LanguageModel, prompts: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """[B, N] in nats with gradient: of tokens that `rollout` made, 0 where there is none. Dropout
    is off, as it was there."""
    was_training = model.training
    model.eval()
    try:
        if model.carries_state:
            return fastlm.generation_logprobs(model, prompts, tokens, temperature=temperature)
        width = prompts.shape[1]
        read = torch.cat([prompts, tokens.clamp(min=0)], 1)[:, :-1]
        hidden, _ = model.hidden(read)
        found: Any = fastlm.linear_token_logprobs(
            hidden[:, width - 1 :],
            model.head.weight,
            tokens,
            linear_bias=model.head.bias,
            temperature=temperature,
            ignore_index=IGNORED,
        )
        return found
    finally:
        model.train(was_training)


@torch.no_grad()
def human_over_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    store: TokenStore,
    *,
    split: str,
    count: int,
    prompt: int = 24,
    length: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Preference]:
    """The author's text preferred to the model's, after the same context.

    Real human text, but nobody compared the two: the provenance says human-over-model.
    """
    places = contexts(store, split, count, prompt, length, seed)
    found = []
    for start in range(0, len(places), ROWS):
        part = places[start : start + ROWS]
        prompts = torch.stack([place.prompt for place in part])
        made = rollout(
            model,
            prompts,
            length,
            end=None,
            seed=seed,
            step=start * length,
            temperature=temperature,
        )
        for place, written in zip(part, made.texts(tokenizer), strict=True):
            human = tokenizer.decode(place.following.tolist())
            before = tokenizer.decode(place.prompt.tolist())
            found.append(Preference(before, human, written, "human-over-model"))
    return found


@torch.no_grad()
def two_each(
    model: LanguageModel,
    tokenizer: Tokenizer,
    store: TokenStore,
    *,
    split: str,
    count: int,
    prompt: int = 24,
    length: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[tuple[str, str, str]]:
    """(context, one text of the model, another one), for somebody to say which is better."""
    places = contexts(store, split, count, prompt, length, seed)
    found = []
    for start in range(0, len(places), ROWS // 2):
        prompts = [place.prompt for place in places[start : start + ROWS // 2]]
        made = rollout(
            model,
            repeat_each(prompts, 2),
            length,
            end=tokenizer.end,
            seed=seed,
            step=start * length,
            temperature=temperature,
        ).texts(tokenizer)
        pairs = zip(prompts, made[::2], made[1::2], strict=True)
        found += [(tokenizer.decode(p.tolist()), a, b) for p, a, b in pairs if a != b]
    return found


def repeat_each(prompts: Sequence[Tensor], times: int) -> Tensor:
    """[len * times, P]: each prompt that often, one after the other."""
    return torch.stack(list(prompts)).repeat_interleave(times, 0)
