"""Decoding a GRU language model: the torch ops, and the gradient of what they made.

Contract. Row b reads its prompt and then its own tokens; token i has the Philox draw of (seed, row
number, first step + i) and ends the row if it is a stop. What a row gets depends neither on the
rows beside it nor on the number of threads: in the cpu backend every product is chains of fused
multiply-adds over k in order. W_hh h is that of the layers' own kernel, input projection and logits
are those of csrc/matmul, log-probs those of `row_statistics`, all to the bit: so the log-probs are
those of the training forward wherever that takes the compiled product, of float32 weights; matrices
in bfloat16 are widened in registers, so they give the log-probs of the widened model.

    generation           samples: tokens, log-probs, lengths, state
    generation_logprobs  the log-probs of given tokens, from the same kernel: equal to the bit to
                         those that `generation` reported for them
    generation_step      one token of every row: logits and state, to the bit those of `generation`

Saved, when a backward follows: states and gates of every layer [L, B, steps, H and 4H], and the
largest logit and log sum of exponentials of every made token. The backward computes the logits
again, chunk by chunk, as `linear_row_statistics` does, and needs no second forward through the GRU.

Backends: cpu (C++) takes float32, bfloat16 weights, and float16 ones widened once; reference takes
all.
Source: whole-loop decoding as in the persistent RNNs of Diamos et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks, extension
from ...dispatch import register
from ...library import define
from ..sampling import reference as sampling_reference
from . import penalties, reference
from .penalties import Penalties
from .reference import PAD, Prompts, Weights

_WEIGHTS = (
    "Tensor embedding, Tensor?[] cells, Tensor? head_weight, Tensor? head_bias, Tensor? packed, "
    "Tensor? table"
)
_PROMPTS = "Tensor prompts, Tensor prompt_lengths"
_SAVED = "Tensor row_max, Tensor log_sum, Tensor output, Tensor gates"


def _hidden(cells: Sequence[Tensor | None]) -> int:
    assert cells[1] is not None
    return cells[1].shape[1]


def _saved(
    prompts: Tensor, max_new: int, embedding: Tensor, cells: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, ...]:
    """Room for what a backward reads, zeros; without elements when none follows."""
    batch, hidden = prompts.shape[0], _hidden(cells)
    steps = prompts.shape[1] + max_new - 1 if save else 0
    of_token = [embedding.new_zeros((batch, max_new if save else 0)) for _ in range(2)]
    of_step = [
        embedding.new_zeros((len(cells) // 4, batch, steps, size)) for size in (hidden, 4 * hidden)
    ]
    return *of_token, *of_step


def _made(prompts: Tensor, max_new: int, embedding: Tensor, cells: Any) -> tuple[Tensor, ...]:
    batch = prompts.shape[0]
    return (
        prompts.new_full((batch, max_new), PAD),
        embedding.new_zeros((batch, max_new)),
        prompts.new_zeros(batch),
        embedding.new_zeros((len(cells) // 4, batch, _hidden(cells))),
    )


def _counts(prompts: Tensor, seen: Tensor | None) -> Tensor:
    """A copy to count in; without elements when nothing is counted."""
    return prompts.new_empty(0, dtype=torch.int32) if seen is None else seen.clone()


def _fake_generation(
    prompts: Tensor, prompt_lengths: Tensor, rows: Tensor, h0: Tensor | None, embedding: Tensor,
    cells: Any, head_weight: Any, head_bias: Any, packed: Any, table: Any, stops: Any, max_new: int,
    seed: int, step: int, temperature: float, top_k: int, top_p: float, min_p: float, save: bool,
    seen: Tensor | None = None, *penalties: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    made = _made(prompts, max_new, embedding, cells)
    return *made, *_saved(prompts, max_new, embedding, cells, save), _counts(prompts, seen)


def _fake_logprobs(
    prompts: Tensor, prompt_lengths: Tensor, tokens: Tensor, lengths: Tensor, embedding: Tensor,
    cells: Any, head_weight: Any, head_bias: Any, packed: Any, table: Any, temperature: float,
    save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    logprobs = embedding.new_zeros(tokens.shape)
    return logprobs, *_saved(prompts, tokens.shape[1], embedding, cells, save)


def _fake_step(
    tokens: Tensor, h: Tensor, embedding: Tensor, cells: Any, head_weight: Tensor | None,
    head_bias: Any, packed: Any, table: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    classes = 0 if head_weight is None else head_weight.shape[0]
    return h.new_empty((tokens.shape[0], classes)), h.new_empty(h.shape)


generation = define(
    "generation",
    "forward",
    f"({_PROMPTS}, Tensor rows, Tensor? h0, {_WEIGHTS}, Tensor? stops, SymInt max_new, "
    "SymInt seed, SymInt step, float temperature, int top_k, float top_p, float min_p, bool save, "
    "Tensor? seen=None, float repetition=1.0, float presence=0.0, float frequency=0.0) "
    f"-> (Tensor tokens, Tensor logprobs, Tensor lengths, Tensor h_n, {_SAVED}, Tensor counts)",
    _fake_generation,
)
generation_logprobs = define(
    "generation_logprobs",
    "forward",
    f"({_PROMPTS}, Tensor tokens, Tensor lengths, {_WEIGHTS}, float temperature, bool save) "
    f"-> (Tensor logprobs, {_SAVED})",
    _fake_logprobs,
)
generation_step = define(
    "generation_step",
    "forward",
    f"(Tensor tokens, Tensor h, {_WEIGHTS}) -> (Tensor logits, Tensor h_n)",
    _fake_step,
)


def _cpu_refuses(embedding: Tensor, **_: Any) -> str | None:
    if embedding.dtype != torch.float32:
        return f"weights are computed with in {checks.short(embedding.dtype)}, not float32"
    return None


def _addresses(cells: Any, head_weight: Tensor | None, head_bias: Tensor | None) -> Tensor:
    """What the kernel reads where the weights are not packed."""
    every = (*cells, head_weight, head_bias)
    return torch.tensor([0 if w is None else w.data_ptr() for w in every], device="cpu")


def _narrow(cells: Any) -> bool:
    """Whether the matrices are of bfloat16, which the kernel reads as they are."""
    return cells[1].dtype == torch.bfloat16


def _or_none(saved: Sequence[Tensor], save: bool) -> Sequence[Tensor | None]:
    return saved if save else (None,) * len(saved)


def _order(prompt_lengths: Tensor) -> Tensor:
    return prompt_lengths.argsort(stable=True)


def _cpu(
    prompts: Tensor, prompt_lengths: Tensor, rows: Tensor, h0: Tensor | None, embedding: Tensor,
    cells: Any, head_weight: Tensor | None, head_bias: Any, packed: Tensor | None,
    table: Tensor | None, stops: Tensor | None, max_new: int, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *how, save, seen, repetition, presence, frequency = options
    counts = _counts(prompts, seen)
    made = _made(prompts, max_new, embedding, cells)
    saved = _saved(prompts, max_new, embedding, cells, save)
    classes = 0 if head_weight is None else head_weight.shape[0]
    if prompts.shape[0] > 0:
        h0 = None if h0 is None else h0.contiguous()
        extension.raw("generation")(
            packed, _addresses(cells, head_weight, head_bias), embedding, table, classes, prompts,
            prompt_lengths, _order(prompt_lengths), h0, None, None, stops, rows, *how, *made,
            *_or_none(saved, save), _narrow(cells), None if seen is None else counts, repetition,
            presence, frequency,
        )  # fmt: skip
    return *made, *saved, counts


def _cpu_logprobs(
    prompts: Tensor, prompt_lengths: Tensor, tokens: Tensor, lengths: Tensor, embedding: Tensor,
    cells: Any, head_weight: Tensor, head_bias: Any, packed: Tensor | None, table: Tensor | None,
    temperature: float, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    max_new = tokens.shape[1]
    unused, logprobs, counted, h_n = _made(prompts, max_new, embedding, cells)
    saved = _saved(prompts, max_new, embedding, cells, save)
    if prompts.shape[0] > 0 and max_new > 0:
        how = (0, 0, temperature, 0, 1.0, 0.0)
        extension.raw("generation")(
            packed, _addresses(cells, head_weight, head_bias), embedding, table,
            head_weight.shape[0], prompts, prompt_lengths, _order(prompt_lengths), None, tokens,
            lengths, None, counted, *how, unused, logprobs, counted, h_n, *_or_none(saved, save),
            _narrow(cells),
        )  # fmt: skip
    return logprobs, *saved


def _cpu_step(
    tokens: Tensor, h: Tensor, embedding: Tensor, cells: Any, head_weight: Tensor | None,
    head_bias: Any, packed: Tensor | None, table: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits, h_n = _fake_step(tokens, h, embedding, cells, head_weight, None, None, None)
    if tokens.shape[0] > 0:
        arguments = (tokens.contiguous(), h.contiguous(), h_n)
        classes = logits.shape[1]
        wanted = logits if classes else None
        addresses = _addresses(cells, head_weight, head_bias)
        extension.raw("generation_step")(
            packed, addresses, embedding, table, *arguments, wanted, classes, _narrow(cells)
        )
    return logits, h_n


def _weights(embedding: Tensor, cells: Any, head_weight: Any, head_bias: Any) -> Weights:
    """All in the dtype of the computation, that of the embedding."""
    every = (*cells, head_weight, head_bias)
    *cells, head_weight, head_bias = (w if w is None else w.to(embedding.dtype) for w in every)
    return Weights(
        embedding,
        [tuple(cells[i : i + 4]) for i in range(0, len(cells), 4)],
        head_weight,
        head_bias,
    )


def _reference(
    prompts: Tensor, prompt_lengths: Tensor, rows: Tensor, h0: Tensor | None, embedding: Tensor,
    cells: Any, head_weight: Any, head_bias: Any, packed: Any, table: Any, stops: Tensor | None,
    max_new: int, seed: int, first: int, temperature: float, top_k: int, top_p: float,
    min_p: float, save: bool, seen: Tensor | None, *strength: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    counts = _counts(prompts, seen)
    weights = _weights(embedding, cells, head_weight, head_bias)
    given = Prompts(prompts, prompt_lengths)

    def step(tokens: Tensor, h: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        logits, following = reference.step(weights, tokens, h)
        return logits, torch.where(done[None, :, None], h, following)

    def sample(logits: Tensor, chosen: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        moved = logits
        if seen is not None:
            moved = penalties.apply(logits, counts[chosen], Penalties(*strength))
        drawn, _ = sampling_reference.forward(
            moved, rows[chosen], None, first + at, seed, 0, temperature, top_k, top_p, min_p
        )
        if seen is not None:
            counts[chosen, drawn.clamp(min=0)] += 2
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        return drawn, logprobs.gather(1, drawn.clamp(min=0)[:, None])[:, 0]

    if prompts.shape[0] == 0:
        return _fake_generation(
            prompts, prompt_lengths, rows, h0, embedding, cells, None, None, None, None, None,
            max_new, seed, first, temperature, top_k, top_p, min_p, save, seen,
        )  # fmt: skip
    ends = None if stops is None else stops.nonzero()[:, 0]
    state = _made(prompts, max_new, embedding, cells)[3] if h0 is None else h0.clone()
    made = reference.loop(step, sample, given, ends, max_new, state)
    made = made._replace(logprobs=made.logprobs.to(embedding.dtype))
    if not save:
        return *made, *_saved(prompts, max_new, embedding, cells, save), counts
    logprobs, *saved = reference.score(weights, given, made.tokens, made.lengths, temperature)
    return *made._replace(logprobs=logprobs), *saved, counts


def _reference_logprobs(
    prompts: Tensor, prompt_lengths: Tensor, tokens: Tensor, lengths: Tensor, embedding: Tensor,
    cells: Any, head_weight: Any, head_bias: Any, packed: Any, table: Any, temperature: float,
    save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if tokens.numel() == 0:
        return _fake_logprobs(
            prompts, prompt_lengths, tokens, lengths, embedding, cells, None, None, None, None,
            temperature, save,
        )  # fmt: skip
    weights = _weights(embedding, cells, head_weight, head_bias)
    given = Prompts(prompts, prompt_lengths)
    logprobs, *saved = reference.score(weights, given, tokens, lengths, temperature)
    if not save:
        return logprobs, *_saved(prompts, tokens.shape[1], embedding, cells, save)
    return logprobs, *saved


def _reference_step(
    tokens: Tensor, h: Tensor, embedding: Tensor, cells: Any, head_weight: Any, head_bias: Any,
    packed: Any, table: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if tokens.shape[0] == 0:
        return _fake_step(tokens, h, embedding, cells, head_weight, None, None, None)
    return reference.step(_weights(embedding, cells, head_weight, head_bias), tokens, h)


for _name, _kernel, _plain in (
    ("generation", _cpu, _reference),
    ("generation_logprobs", _cpu_logprobs, _reference_logprobs),
    ("generation_step", _cpu_step, _reference_step),
):
    register(
        _name,
        "cpu",
        _kernel,
        devices=("cpu",),
        unavailable=extension.unavailable,
        refuses=_cpu_refuses,
    )
    register(_name, "reference", _plain)
