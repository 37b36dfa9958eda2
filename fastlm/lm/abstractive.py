"""Summaries in a model's own words: it was fine-tuned on pairs, and continues `text TL;DR:`.

Beside them always stands the first sentence of the text, which a summary has to beat; the
difference is of the same texts, with the interval of its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fastlm

from . import metrics
from .errors import InputError, UsageError
from .kinds import LanguageModel
from .pairs import FORMATS, Pair, prompt_ids
from .summarize import lead
from .tokenizer import Tokenizer

ROWS = 64  # written at once
LONGEST = 512  # tokens that are read, where the model sets no limit


@torch.no_grad()
def completions(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Pair],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    longest: int = LONGEST,
) -> list[str]:
    """What a model writes after each prompt until `end`; temperature 0 takes the likeliest token.

    A text depends on its prompt, its place among them and the arguments alone. Prompts are cut as
    in training: to `longest` tokens, less in the context of a Transformer.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    room = longest if model.window is None else min(longest, model.window - max_new_tokens)
    if room < 1:
        raise UsageError(
            f"{max_new_tokens} new tokens do not fit into the model's context of {model.window}"
        )
    device, was_training = next(model.parameters()).device, model.training
    ids = [torch.from_numpy(prompt_ids(tokenizer, p.prompt, p.tail, room)) for p in prompts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    found = [""] * len(ids)
    model.eval()
    try:
        decoder = model.decoder()
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            made = fastlm.generate(
                decoder,
                [ids[row].to(device) for row in rows],
                max_new_tokens,
                temperature=temperature,
                seed=seed,
                rows=torch.tensor(rows, device=device),
                stop=tokenizer.end,
            )
            for row, tokens, length in zip(
                rows, made.tokens.tolist(), made.lengths.tolist(), strict=True
            ):
                found[row] = " ".join(tokenizer.decode(tokens[:length]).split())
    finally:
        model.train(was_training)
    return found


def summaries(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], **options: Any
) -> list[str]:
    """A summary of each text; the options are those of `completions`."""
    known = FORMATS["summary"]
    prompts = [Pair(known.render(text), "", "", known.tail) for text in texts]
    return completions(model, tokenizer, prompts, **options)


@dataclass(frozen=True)
class Comparison:
    """ROUGE of summaries and of the first sentences, and the mean of their differences."""

    pairs: int
    rouge: dict[str, float]
    rouge_lead_1: dict[str, float]
    difference: dict[str, metrics.Interval]

    def lines(self, name: str) -> list[str]:
        width = max(len(name), len("difference"))
        lines = [f"{'':{width}}  ROUGE-1  ROUGE-2  ROUGE-L   on {self.pairs:,} pairs"]
        for title, values in ((name, self.rouge), ("lead-1", self.rouge_lead_1)):
            lines.append(f"{title:{width}}  " + "  ".join(f"{v:7.3f}" for v in values.values()))
        told = ", ".join(
            f"{d.value:+.3f} (95% {d.low:+.3f} to {d.high:+.3f})" for d in self.difference.values()
        )
        return [*lines, f"{'difference':{width}}  {told}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rouge_beside_lead(
    made: Sequence[str], texts: Sequence[str], references: Sequence[str]
) -> Comparison:
    """Summaries against what people wrote, beside the first sentence of each text."""
    if not texts:
        raise InputError("no text to summarise")
    ours = metrics.rouge_scores(made, references)
    first = metrics.rouge_scores([lead(text) for text in texts], references)
    apart = {
        name: metrics.mean_interval([a - b for a, b in zip(ours[name], first[name], strict=True)])
        for name in ours
    }
    return Comparison(len(texts), metrics.means(ours), metrics.means(first), apart)


def text_of(pair: Pair) -> str:
    """The text of a pair of the format "summary"."""
    return pair.prompt[: -pair.tail]
