"""The public functions `generate` and `generation_logprobs`: arguments, and which way they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ..sampling.op import checked_options, checked_seed, sample
from ..token_logprobs.op import token_logprobs
from . import op as ops
from . import penalties, reference
from .arguments import (
    Request,
    check_distributions,
    check_vocabulary,
    read_prompts,
    read_rows,
    read_state,
    read_stops,
)
from .autograd import Kept
from .penalties import Counted
from .reference import PAD, Prompts
from .weights import DecoderWeights

# tokens [B] and the state before, None at the start -> logits [B, V] and the state after
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class Generated(NamedTuple):
    """What `generate` made; without B for a single prompt."""

    tokens: Tensor  # [B, max_new_tokens] int64, -100 after the end of a row
    lengths: Tensor  # [B] int64: tokens of each row, its stop token counted
    logprobs: Tensor | None  # [B, max_new_tokens] in nats, 0 after the end of a row
    state: Any  # after the last token that was read: [layers, B, H] of a GRUDecoder


def _decoder_of(op: str, model: Any) -> tuple[DecoderWeights | None, Step]:
    """(weights that a kernel can take, or None; the step of a Python loop)."""
    make = getattr(model, "decoder", None)
    step = model if make is None else make()
    weights = getattr(step, "weights", None)
    if isinstance(weights, DecoderWeights):
        if weights.classes == 0:
            checks.bad_value(
                op, "model", "a decoder with a head", "one without", "GRUDecoder(body, head)"
            )
        weights.check_fresh(op)
        return weights, step
    if not callable(step) or (make is None and isinstance(step, torch.nn.Module)):
        checks.bad_type(
            op,
            "model",
            "a fastlm.nn.GRUDecoder, a function step(tokens, state) -> (logits, state), or what "
            "has a method decoder() that returns one of them",
            type(model).__name__,
        )
    return None, step


def _with_kernel(request: Request, weights: DecoderWeights, save: bool) -> Generated:
    op, (tokens, lengths), rows, stops, max_new, seed, step, options, state, *_ = request
    check_vocabulary(op, weights, request.prompts)
    if weights.classes > weights.vocabulary:
        checks.bad_value(op, "the head's classes", f"<= {weights.vocabulary}", weights.classes)
    mask = None
    if stops is not None:
        checks.index_range(op, "stop", stops, weights.classes, None)
        mask = torch.zeros(weights.classes, dtype=torch.uint8, device=tokens.device)
        mask[stops] = 1
    h0 = read_state(op, weights, state, tokens.shape[0])
    arguments = weights.arguments(tokens.shape[0], tokens.shape[1] + max_new - 1)
    with torch.no_grad():
        seen = request.counts(weights.classes)
        made, logprobs, counts, h_n, *kept, counted = ops.generation(
            tokens, lengths, rows, h0, *arguments, mask, max_new, seed, step, *options, save, seen,
            *request.penalties,
        )  # fmt: skip
    check_distributions(op, made)
    if save:
        stored = Kept(logprobs, tokens, lengths, made, counts, *kept)
        logprobs = weights.with_gradient(stored, options[0])
    return Generated(made, counts, logprobs, h_n if seen is None else Counted(h_n, counted))


def _with_loop(request: Request, step: Step) -> Generated:
    temperature, top_k, top_p, min_p = request.options
    seen: Tensor | None = None

    def draw(logits: Tensor, chosen: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal seen
        if request.penalties.any and seen is None:
            seen = request.counts(logits.shape[-1])
        moved = logits
        if seen is not None:
            moved = penalties.apply(logits, seen[chosen], request.penalties)
        tokens, logprobs = sample(
            moved, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p,
            seed=request.seed, step=request.step + at, rows=request.rows[chosen],
        )  # fmt: skip
        if seen is not None:
            seen[chosen, tokens.clamp(min=0)] += 2
            found = token_logprobs(logits, tokens, temperature=temperature or 1.0, ignore_index=-1)
            assert isinstance(found, Tensor)
            logprobs = torch.where(tokens < 0, logprobs, found)
        return tokens, logprobs

    made = reference.loop(
        lambda tokens, state, done: step(tokens, state), draw, request.prompts, request.stops,
        request.max_new, request.state,
    )  # fmt: skip
    state = made.state if seen is None else Counted(made.state, seen)
    return Generated(made.tokens, made.lengths, made.logprobs.float(), state)


def _loop_logprobs(
    step: Step, prompts: Prompts, tokens: Tensor, lengths: Tensor, temperature: float
) -> Tensor:
    """Through the steps of the caller, with whatever gradient they have."""
    read, width = reference.sequence(prompts, tokens, lengths), prompts.tokens.shape[1]
    place, source = reference.scored(prompts, lengths, tokens.shape[1])
    state, outputs = None, []
    for t in range(width + tokens.shape[1] - 1):
        logits, state = step(read[:, t], state)
        outputs.append(logits)
    logits = torch.stack(outputs, 1).flatten(0, 1)[source]
    chosen = tokens.flatten()[place]
    logprobs = token_logprobs(logits, chosen, temperature=temperature or 1.0)
    assert isinstance(logprobs, Tensor)
    return logprobs.new_zeros(tokens.numel()).index_copy(0, place, logprobs).view(tokens.shape)


def generate(
    model: Any,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    step: int = 0,
    rows: Tensor | None = None,
    return_logprobs: bool = False,
    save_for_backward: bool = False,
    stop: int | Sequence[int] | Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    state: Any = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    history: Tensor | None = None,
) -> Generated:
    """Continue prompts, token by token, in one call: sampling, log-probs, early ends.

    Same as, for one prompt and a decoder of one's own, up to rounding:
        for token in prompt: logits, state = decoder(token, state)
        for i in range(max_new_tokens):
            token, logprob = fastlm.sample(logits, step=step + i, seed=seed, ...)
            logits, state = decoder(token, state)

    A token depends on (seed, row number, step) and its row alone: neither on the rows beside it nor
    on the number of threads. Log-probs are those of the whole softmax at `temperature`, as `sample`
    gives them; `generation_logprobs` gives the same ones, to the bit, for tokens that are known. So
    does the training forward, `nn.EmbeddingGRU` into `linear_token_logprobs`, of a float32 model
    under `use_backend("cpu")`; see docs/gru.md for when it does by default.

    Args:
        model: a `fastlm.nn.GRUDecoder(body, head)`, which runs as one compiled loop (float32, or
            half-precision weights widened; on the CPU); or a function step(tokens [B], state or
            None) -> (logits [B, V], state), called once a token; or anything with a method
            `decoder()` that returns one of them. Dropout is off in a GRUDecoder; a step is called
            as it is.
        prompts: [B, P] integers, with `prompt_lengths` [B] if they are right-padded; or a list of
            prompts of any lengths; or one prompt, [P] or a list of ints. One token each at least.
        max_new_tokens: at least 1.
        temperature, top_k, top_p, min_p: as in `sample`; 0 takes the most likely token.
        seed: of all rows. step: that of the first new token. rows: row numbers, [B]; 0, 1, 2, ...
        return_logprobs: give `logprobs` too.
        save_for_backward: give `logprobs` with a gradient. A GRUDecoder stores gates and states of
            every step, so that the backward needs no second forward; other steps are called again.
        stop: tokens that end a row. The row does no more work; the token is its last.
        state: what an earlier call returned. Prompts then begin with the last token it made. That
            of a step function goes on in rows that have ended before others.
        repetition_penalty: the logits of tokens that the row has read or made are divided by it
            where above 0 and multiplied where below, before temperature and filters; 1 is none.
        presence_penalty, frequency_penalty: taken from the logit of a token that the row has made;
            the second as often as it was made. After the repetition penalty; 0 is none.
        history: [B, n] tokens that were read before these prompts, -100 where there is none: for
            penalties with a `state` that did not come from here. Log-probs are without penalties.

    Returns:
        `Generated`; log-probs in float32, of a GRUDecoder with float64 weights in float64.

    Raises:
        ValueError: a shape or option differs from the above; on the CPU also logits that are no
            distribution, with the row. IndexError: a token is out of range (CPU).
        TypeError: a dtype or the model does. RuntimeError: a decoder whose weights have changed, or
            a step without gradient and `save_for_backward`.
    """
    op = "generate"
    if max_new_tokens < 1:
        checks.bad_value(op, "max_new_tokens", ">= 1", max_new_tokens)
    options = checked_options(op, temperature, top_k, top_p, min_p)
    if save_for_backward and state is not None:
        checks.bad_value(op, "state with save_for_backward", "None", "a state")
    strength = penalties.checked(op, repetition_penalty, presence_penalty, frequency_penalty)
    given, single = read_prompts(op, prompts, prompt_lengths)
    if history is not None:
        checks.integer(op, "history", history)
        checks.shape(op, "history", history, (given.tokens.shape[0], None), "[B, n]")
        checks.same_device(op, "history", history, "prompts", given.tokens)
        history = history.long()
    counted = isinstance(state, Counted)
    weights, decode = _decoder_of(op, model)
    request = Request(
        op, given, read_rows(op, rows, given), read_stops(op, stop, given.tokens), max_new_tokens,
        checked_seed(op, "seed", seed), checked_seed(op, "step", step), options,
        state.state if counted else state, strength, state.seen if counted else None, history,
    )  # fmt: skip
    if weights is not None:
        made = _with_kernel(request, weights, save_for_backward)
    else:
        with torch.no_grad():
            made = _with_loop(request, decode)
        if save_for_backward:
            again = _loop_logprobs(decode, given, made.tokens, made.lengths, options[0])
            made = made._replace(logprobs=again)
    if save_for_backward:
        assert made.logprobs is not None
        if not made.logprobs.requires_grad:
            raise RuntimeError(
                f"fastlm.{op}: save_for_backward needs gradients, but the log-probs have none; "
                "check torch.is_grad_enabled() and that the parameters require them"
            )
    elif not return_logprobs:
        made = made._replace(logprobs=None)
    if single:
        first = None if made.logprobs is None else made.logprobs[0]
        made = Generated(made.tokens[0], made.lengths[0], first, made.state)
    return made


def generation_logprobs(
    model: Any,
    prompts: Any,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """The log-probs of tokens that `generate` made, with gradient: later steps on one rollout.

    With a GRUDecoder the same kernel runs as in `generate`, so with equal weights the results are
    equal to the bit to the log-probs it returned: the ratio of an on-policy step is exactly 1.
    `embedding_gru` with `linear_token_logprobs` gives the same bits under `use_backend("cpu")`, in
    float32; with the library's products, whose sums depend on shapes, the same up to rounding.
    Stored for the backward: as with `save_for_backward`.

    Args:
        model, prompts, prompt_lengths, temperature: as in `generate`.
        tokens: [B, N] ([N] for one prompt), -100 after the end of a row.

    Returns:
        [B, N] in float32 (float64 for float64 weights), in nats; 0 where there is no token.

    Raises: as `generate`.
    """
    op = "generation_logprobs"
    temperature = checked_options(op, temperature, None, None, None)[0]
    given, single = read_prompts(op, prompts, prompt_lengths)
    checks.integer(op, "tokens", tokens)
    if single:
        checks.shape(op, "tokens", tokens, (None,), "one sequence")
        tokens = tokens[None]
    batch = given.tokens.shape[0]
    checks.shape(op, "tokens", tokens, (batch, None), "one row per prompt")
    checks.same_device(op, "tokens", tokens, "prompts", given.tokens)
    tokens = tokens.long().contiguous()
    lengths = (tokens != PAD).sum(1)
    at = torch.arange(tokens.shape[1], device=tokens.device)
    if tokens.device.type == "cpu" and bool(((tokens == PAD) & (at < lengths[:, None])).any()):
        checks.bad_value(op, "tokens", f"{PAD} at the end of a row only", "it before a token")
    weights, decode = _decoder_of(op, model)
    if weights is None:
        found = _loop_logprobs(decode, given, tokens, lengths, temperature)
        return found[0] if single else found
    check_vocabulary(op, weights, given)
    checks.index_range(op, "tokens", tokens, weights.classes, PAD)
    save = torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for p in weights.parameters
    )
    arguments = weights.arguments(batch, given.tokens.shape[1] + tokens.shape[1] - 1)
    with torch.no_grad():
        logprobs, *kept = ops.generation_logprobs(
            *given, tokens, lengths, *arguments, temperature, save
        )
    if save:
        stored = Kept(logprobs, *given, tokens, lengths, *kept)
        logprobs = weights.with_gradient(stored, temperature)
    return logprobs[0] if single else logprobs
