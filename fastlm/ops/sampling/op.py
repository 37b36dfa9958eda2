"""One token per row of logits: temperature, top-k, top-p, min-p, and the token's log-prob.

Contract: one Philox-4x32-10 draw per row with key = seed and counter = (row number, step); its
first 53 bits are u in [0, 1). The token is the first, in vocabulary order, whose cumulative weight
exceeds u times the weight of all kept tokens. So a sample is a function of (seed, row number, step)
and of that row's logits: batch, order of rows and threads do not matter. Filters compare logits,
never token numbers: tokens with equal logits are kept or dropped together.

Backends: cpu (C++, float32 and bfloat16; float16 comes there as float32, unless a backend is asked
for), reference (any float dtype, computed in float64). Where u falls within rounding of the border
between two tokens they may choose differently.
No gradient; the log-prob for a policy gradient comes from `token_logprobs`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library
from ...philox import signed
from . import reference

Sampled = tuple[Tensor, Tensor]


def _fake(
    logits: Tensor,
    rows: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    seed: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sampled:
    count = logits.shape[0]
    return (
        logits.new_empty(count, dtype=torch.int64),
        logits.new_empty(count, dtype=torch.float32),
    )


_OP = library.define(
    "sample",
    "forward",
    "(Tensor logits, Tensor? rows, Tensor? seeds, Tensor? steps, SymInt seed, SymInt step, "
    "float temperature, int top_k, float top_p, float min_p) -> (Tensor, Tensor)",
    _fake,
)


def _reject(row: int, logits: Tensor) -> None:
    values = logits[row]
    got = (
        "NaN"
        if bool(values.isnan().any())
        else "only -inf"
        if bool((values == -math.inf).all())
        else "+inf"
    )
    checks.bad_value(
        "sample", f"row {row} of logits", "finite or -inf, with one finite value", f"{got} in it"
    )


def _cpu(
    logits: Tensor,
    rows: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    seed: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sampled:
    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    options = (seed, step, temperature, top_k, top_p, min_p)
    bad = extension.raw("sample")(logits, rows, seeds, steps, *options, tokens, logprobs)
    if bad >= 0:
        _reject(bad, logits)
    return tokens, logprobs


def _cpu_refuses(logits: Tensor, **_: object) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        return f"logits are {checks.short(logits.dtype)}, not float32 or bfloat16"
    return None


def _reference(
    logits: Tensor,
    rows: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    seed: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sampled:
    tokens, logprobs = reference.forward(
        logits, rows, seeds, steps, seed, step, temperature, top_k, top_p, min_p
    )
    # on a GPU this look would wait for the device
    if tokens.device.type == "cpu" and tokens.numel() and int(tokens.min()) < 0:
        _reject(int((tokens < 0).int().argmax()), logits)
    return tokens, logprobs


dispatch.register(
    "sample",
    "cpu",
    _cpu,
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_cpu_refuses,
)
dispatch.register("sample", "reference", _reference)


def _per_row(what: str, value: Tensor, logits: Tensor) -> Tensor:
    """[N] int64, from what broadcasts to the rows."""
    checks.tensor("sample", what, value)
    if value.dtype != torch.int64:
        checks.bad_type("sample", what, "int64", checks.short(value.dtype), "call .long()")
    checks.same_device("sample", what, value, "logits", logits)
    try:
        spread = value.broadcast_to(logits.shape[:-1])
    except RuntimeError:
        rows = list(logits.shape[:-1])
        checks.bad_value("sample", f"{what}.shape", f"{rows} or broadcast to it", list(value.shape))
    return spread.reshape(-1).contiguous()


def _counter(what: str, value: int | Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
    if isinstance(value, Tensor):
        return 0, _per_row(what, value, logits)
    return checked_seed("sample", what, value), None


def _direct(logits: Tensor, rows: Tensor | None, seed: Any, step: Any) -> bool:
    """What the compiled kernel takes without the torch op around it, which takes as long as the
    draw of a few rows."""
    plain = type(logits) is Tensor and logits.is_cpu and logits.dim() == 2
    if not plain or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if rows is not None or type(seed) is not int or type(step) is not int:
        return False
    return extension.unavailable is None and dispatch.undisturbed() and dispatch.direct(logits)


def checked_options(
    op: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[float, int, float, float]:
    """The torch op's temperature, top_k, top_p and min_p."""
    if not 0 <= temperature < math.inf:
        checks.bad_value(op, "temperature", "finite and >= 0", temperature)
    if top_k is not None and top_k < 1:
        checks.bad_value(op, "top_k", ">= 1", top_k, "None keeps all tokens")
    for what, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 <= value <= 1:
            checks.bad_value(op, what, "in [0, 1]", value)
    return (
        float(temperature),
        top_k or 0,
        1.0 if top_p is None else float(top_p),
        float(min_p or 0.0),
    )


def checked_seed(op: str, what: str, value: int) -> int:
    """As the int64 with the same bits."""
    if not -(2**63) <= value < 2**64:
        checks.bad_value(op, what, "in [-2**63, 2**64)", value)
    return signed(value)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    rows: Tensor | None = None,
) -> Sampled:
    """One token per row, drawn from the softmax of logits / temperature, and its log-prob.

    The filters apply in the order top_k, top_p, min_p, each to what the one before left. The
    log-prob is that of the whole softmax, before any filter: what `token_logprobs(logits, tokens,
    temperature=temperature)` returns, and what importance ratios of policy gradients need.

    A sample depends on (seed, row number, step) and on its row of logits alone, so a sequence gets
    the same tokens in any batch. Use a new `step` for every position; equal (seed, row, step)
    draw the same number.

    Args:
        logits: [..., V], float64, float32, float16 or bfloat16; -inf forbids a token.
        temperature: 0 takes the most likely token, the lowest of equals, with its log-prob at
            temperature 1.
        top_k: keep the tokens whose logit is at least the k-th largest.
        top_p: keep the fewest most likely tokens that have `top_p` of the mass, at least one;
            all tokens as likely as the last of them are kept too.
        min_p: keep the tokens at least `min_p` times as likely as the most likely one.
        seed, step: an int, or int64 that broadcasts to [...].
        rows: row numbers, int64 that broadcasts to [...]; 0, 1, 2, ... by default.

    Returns:
        (tokens, logprobs): [...] int64 and [...] float32 in nats. Neither carries a gradient.

    Raises:
        ValueError: an option out of range; on the CPU also a row that has a NaN, +inf, or nothing
            but -inf, named. On a GPU such a row gives token -1 and log-prob NaN.
        TypeError: a dtype differs from the above.

    Source: inverse CDF; Philox, Salmon et al. 2011; top-p, Holtzman et al. 2020 (arXiv:1904.09751);
    min-p, Nguyen et al. 2024 (arXiv:2407.01082).
    """
    checks.floating("sample", "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        checks.bad_value("sample", "logits", "[..., V] with V >= 1", list(logits.shape))
    options = checked_options("sample", temperature, top_k, top_p, min_p)
    if _direct(logits, rows, seed, step):
        # float16 is exact in float32
        taken = logits.float() if logits.dtype == torch.float16 else logits
        drawn = _counter("seed", seed, logits)[0], _counter("step", step, logits)[0]
        arguments: tuple[Any, ...] = (None, None, None, *drawn, *options)
        return _cpu(taken.detach(), *arguments)
    shape = logits.shape[:-1]
    row_ids = None if rows is None else _per_row("rows", rows, logits)
    one_seed, seeds = _counter("seed", seed, logits)
    one_step, steps = _counter("step", step, logits)
    tokens, logprobs = _OP(
        logits.detach().reshape(math.prod(shape), logits.shape[-1]),
        row_ids,
        seeds,
        steps,
        one_seed,
        one_step,
        *options,
    )
    return tokens.view(shape), logprobs.view(shape)
