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
from . import reference
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


def _one_prompt(op: str, name: str, prompt: Any) -> Tensor:
    if not isinstance(prompt, Tensor):
        prompt = torch.tensor(prompt, dtype=torch.int64) if len(prompt) else torch.empty(0).long()
    checks.integer(op, name, prompt)
    checks.shape(op, name, prompt, (None,), "one prompt")
    return prompt.long()


def _prompts(op: str, prompts: Any, prompt_lengths: Tensor | None) -> tuple[Prompts, bool]:
    """Right-padded with 0, and whether it is a single prompt."""
    if not isinstance(prompts, Tensor) and all(isinstance(p, int) for p in prompts):
        prompts = _one_prompt(op, "prompts", prompts)
    single = isinstance(prompts, Tensor) and prompts.dim() == 1
    if isinstance(prompts, Tensor) and not single:
        checks.integer(op, "prompts", prompts)
        checks.shape(op, "prompts", prompts, (None, None), "[B, P], right-padded")
        batch, width = prompts.shape
        lengths = prompt_lengths
        if lengths is None:
            lengths = prompts.new_full((batch,), width, dtype=torch.int64)
        checks.integer(op, "prompt_lengths", lengths)
        checks.shape(op, "prompt_lengths", lengths, (batch,), "one per prompt")
        checks.same_device(op, "prompt_lengths", lengths, "prompts", prompts)
        tokens, lengths = prompts.long(), lengths.long()
    else:
        if prompt_lengths is not None:
            got = "a list or a single prompt"
            checks.bad_value(op, "prompts with prompt_lengths", "[B, P]", got)
        rows = [prompts] if single else prompts
        rows = [_one_prompt(op, f"prompts[{i}]", row) for i, row in enumerate(rows)]
        lengths = torch.tensor([row.shape[0] for row in rows], dtype=torch.int64)
        width = max((row.shape[0] for row in rows), default=1)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = lengths.to(tokens.device)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 1 or high > width:
            bad = int(((lengths < 1) | (lengths > width)).int().argmax())
            remedy = "begin with a token of your own, as that which ends documents" * (low < 1)
            wanted = f"in [1, {max(1, width)}]"
            checks.bad_value(op, f"length of prompt {bad}", wanted, int(lengths[bad]), remedy)
        tokens = tokens[:, :high]
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return Prompts(torch.where(at < lengths[:, None], tokens, 0), lengths.contiguous()), single


def _stops(op: str, stop: int | Sequence[int] | Tensor | None, like: Tensor) -> Tensor | None:
    """Distinct tokens [n]."""
    if stop is None:
        return None
    if isinstance(stop, int):
        stop = [stop]
    if not isinstance(stop, Tensor):
        stop = torch.tensor(stop, dtype=torch.int64) if len(stop) else torch.empty(0).long()
    checks.integer(op, "stop", stop)
    return stop.reshape(-1).long().to(like.device)


def _rows(op: str, rows: Tensor | None, prompts: Prompts) -> Tensor:
    batch = prompts.tokens.shape[0]
    if rows is None:
        return torch.arange(batch, device=prompts.tokens.device)
    checks.integer(op, "rows", rows)
    checks.shape(op, "rows", rows.reshape(-1), (batch,), "one per prompt")
    checks.same_device(op, "rows", rows, "prompts", prompts.tokens)
    return rows.reshape(-1).long().contiguous()


def _check_vocabulary(op: str, weights: DecoderWeights, prompts: Prompts) -> None:
    checks.same_device(op, "prompts", prompts.tokens, "the weights", weights.wide.embedding)
    checks.index_range(op, "prompts", prompts.tokens, weights.vocabulary, None)


def _state(op: str, weights: DecoderWeights, state: Any, batch: int) -> Tensor | None:
    if state is None:
        return None
    checks.floating(op, "state", state)
    checks.shape(op, "state", state, (weights.layers, batch, weights.hidden), "layers, B, H")
    return state.to(weights.wide.embedding.dtype)


def _check_distributions(op: str, tokens: Tensor) -> None:
    """A GPU is not waited for: there the token is -1 and the log-prob NaN."""
    if tokens.device.type != "cpu" or tokens.numel() == 0 or not bool((tokens == -1).any()):
        return
    row, position = (tokens == -1).nonzero()[0].tolist()
    checks.bad_value(
        op, f"the logits of row {row} at token {position}",
        "finite or -inf, with one finite value", "NaN, +inf or only -inf",
    )  # fmt: skip


class _Request(NamedTuple):
    """The checked arguments of one call."""

    op: str
    prompts: Prompts
    rows: Tensor
    stops: Tensor | None
    max_new: int
    seed: int
    step: int
    options: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    state: Any


def _with_kernel(request: _Request, weights: DecoderWeights, save: bool) -> Generated:
    op, (tokens, lengths), rows, stops, max_new, seed, step, options, state = request
    _check_vocabulary(op, weights, request.prompts)
    if weights.classes > weights.vocabulary:
        checks.bad_value(op, "the head's classes", f"<= {weights.vocabulary}", weights.classes)
    mask = None
    if stops is not None:
        checks.index_range(op, "stop", stops, weights.classes, None)
        mask = torch.zeros(weights.classes, dtype=torch.uint8, device=tokens.device)
        mask[stops] = 1
    h0 = _state(op, weights, state, tokens.shape[0])
    arguments = weights.arguments(tokens.shape[0], tokens.shape[1] + max_new - 1)
    with torch.no_grad():
        made, logprobs, counts, h_n, *kept = ops.generation(
            tokens, lengths, rows, h0, *arguments, mask, max_new, seed, step, *options, save
        )
    _check_distributions(op, made)
    if save:
        stored = ops.Kept(logprobs, tokens, lengths, made, counts, *kept)
        logprobs = weights.with_gradient(stored, options[0])
    return Generated(made, counts, logprobs, h_n)


def _with_loop(request: _Request, step: Step) -> Generated:
    temperature, top_k, top_p, min_p = request.options

    def draw(logits: Tensor, chosen: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return sample(
            logits, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p,
            seed=request.seed, step=request.step + at, rows=request.rows[chosen],
        )  # fmt: skip

    made = reference.loop(
        lambda tokens, state, done: step(tokens, state), draw, request.prompts, request.stops,
        request.max_new, request.state,
    )  # fmt: skip
    return Generated(made.tokens, made.lengths, made.logprobs.float(), made.state)


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
        state: what an earlier call returned. Prompts then begin with the last token it made.

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
    given, single = _prompts(op, prompts, prompt_lengths)
    weights, decode = _decoder_of(op, model)
    request = _Request(
        op, given, _rows(op, rows, given), _stops(op, stop, given.tokens), max_new_tokens,
        checked_seed(op, "seed", seed), checked_seed(op, "step", step), options, state,
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
    given, single = _prompts(op, prompts, prompt_lengths)
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
    _check_vocabulary(op, weights, given)
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
        stored = ops.Kept(logprobs, *given, tokens, lengths, *kept)
        logprobs = weights.with_gradient(stored, temperature)
    return logprobs[0] if single else logprobs
