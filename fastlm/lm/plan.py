"""What a training run will need, before it starts: parameters, memory, operations, time.

Memory is counted in tensors: weights, gradients, the two moments of AdamW, and what a batch leaves
for its backward. The last follows from what the ops save; its coefficients were measured, and for
steps that are not tiny the sum is within a tenth of what tensors really take. What the allocator
holds beyond that differs from run to run; with the usual share for it the peak of the process is
within a quarter (benchmarks/LOG.md, 2026-11-27). Time is operations over the machine's rate of
products, times the share of it that training reaches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .budget import Budget
from .errors import UsageError
from .kinds import KINDS
from .progress import clock
from .recipe import Recipe

FLOAT = 4
# of the activations, what the allocator holds beside them: 11% to 42% with glibc
ALLOCATOR = 0.25
LOSS_CHUNK = 10 << 20  # bytes of logits that the fused loss holds at a time, at most

# share of the rate of products, each precision of its own, that a training step reaches by width:
# AMD EPYC family 26, 2 threads, 2026-11 (benchmarks/LOG.md)
REACHED: dict[str, dict[str, dict[int, float]]] = {
    "gru": {
        "float32": {64: 0.36, 128: 0.51, 256: 0.55, 512: 0.65, 1024: 0.78},
        "bf16": {64: 0.23, 128: 0.35, 256: 0.36, 512: 0.48, 1024: 0.68},
    },
    "transformer": {
        "float32": {64: 0.23, 128: 0.36, 256: 0.48, 512: 0.60},
        "bf16": {64: 0.13, 128: 0.25, 256: 0.40, 512: 0.51},
    },
}
IN_PARTS = 0.7  # of the speed of the whole batch
# a model is as large as the budget can give it this many tokens for each parameter: the best of
# five widths at equal seconds, budgets of 10 and 40 s (benchmarks/LOG.md, 2026-11-27)
TOKENS_PER_PARAMETER = 4.0
# a text read more often teaches little: Muennighoff et al. 2023 (arXiv:2305.16264)
MOST_EPOCHS = 8.0
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def bytes_of(text: str) -> int:
    """`8GiB`, `500MB` or `512M`: powers of 1024 all."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise UsageError(f"memory must be like 8GiB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations`: the most that a step holds for its backward, with what is at work then;
    `process`: what stands in memory without the model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def tensors(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def allocator(self) -> int:
        return int(ALLOCATOR * self.activations)

    @property
    def peak(self) -> int:
        return self.tensors + self.allocator + self.process


@dataclass(frozen=True)
class Rows:
    """Pairs, whose rows are as long as they are: tokens of one on average and of the longest, and
    the share of them that is learned."""

    mean: float
    longest: int
    learned: float


@dataclass(frozen=True)
class Plan:
    """`seconds` and `steps` of the whole run; `epochs`: how often the text is read."""

    recipe: Recipe
    vocab_size: int
    parameters: int
    memory: Memory
    flops_per_step: float
    tokens_per_step: float
    tokens_per_second: float
    steps: int
    seconds: float
    epochs: float
    rows: Rows | None = None

    def lines(self) -> Iterator[str]:
        recipe, memory = self.recipe, self.memory
        yield (
            f"model: {recipe.model}, {recipe.layers} x {recipe.hidden}, {self.vocab_size:,} ids, "
            f"{self.parameters:,} parameters"
        )
        parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        row = f"{recipe.batch} x {recipe.seq} tokens"
        if self.rows is not None:
            row = (
                f"{recipe.batch} pairs of {self.rows.mean:.0f} tokens (at most {self.rows.longest})"
            )
        yield (f"step: {row}{parts}, {recipe.precision}, {self.flops_per_step / 1e9:,.2f} GFLOP")
        yield (
            f"memory: {size(memory.peak)} at the peak: weights {size(memory.weights)}, gradients "
            f"{size(memory.gradients)}, optimizer {size(memory.optimizer)}, activations "
            f"{size(memory.activations)}, allocator {size(memory.allocator)}, process "
            f"{size(memory.process)}"
        )
        yield (
            f"time: {self.steps:,} steps, {clock(self.seconds)} at about "
            f"{self.tokens_per_second:,.0f} tokens/s; {self.epochs:.2f} epochs"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.recipe.to_json(),
            "parameters": self.parameters,
            "memory": {
                **vars(self.memory),
                "allocator": self.memory.allocator,
                "peak": self.memory.peak,
            },
            "flops_per_step": self.flops_per_step,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "steps": self.steps,
            "seconds": self.seconds,
            "epochs": self.epochs,
        }


def blank(recipe: Recipe, vocab_size: int) -> Any:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return KINDS[recipe.model][0](**recipe.model_arguments(vocab_size))


def _saved(recipe: Recipe, config: Any) -> tuple[float, float, float]:
    """Floats for each token: what a layer leaves for the backward, what the whole forward leaves,
    and what the backward of a layer takes on top."""
    width, layers, dropped = recipe.hidden, recipe.layers, recipe.dropout > 0
    if recipe.model == "gru":
        # four gates, the output, and of what lies between two layers its mask and result
        layer = 5.4 * width + (3.1 * width if dropped and layers > 1 else 0.0)
        return layer, layer * layers, 4.7 * width
    heads = config.head_size * (config.num_heads + 2 * config.kv_heads)
    layer = 4.0 * config.ffn + 1.4 * heads + (9.0 if dropped else 8.0) * width
    if recipe.precision == "bf16":
        layer *= 0.7
    kept = layers * width + layer if recipe.recompute else layers * layer
    return layer, kept + 2.0 * width, 2.0 * width


def memory(recipe: Recipe, model: Any, vocab_size: int, process: int) -> Memory:
    """Of a model as `blank` makes it."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens = recipe.batch // recipe.accumulate * recipe.seq
    layer, forward, backward = _saved(recipe, model.config)
    chunk = min(LOSS_CHUNK / FLOAT / tokens, vocab_size)
    head = model.head.weight.numel() + vocab_size
    table = 0 if recipe.tied else model.head.weight.numel()
    # gradients that stand beside the most of activations: those of earlier parts of the batch and
    # one more of the head, or those of the head and of the first layer on the way back
    if recipe.accumulate > 1:
        beside = parameters + head
    elif recipe.model == "gru" and recipe.layers == 1:
        beside = parameters
    else:
        beside = head + max(0, parameters - head - table) // recipe.layers
    step = max(
        tokens * (forward + max(backward, chunk)) + beside,
        tokens * layer + parameters,
    )
    gradients = FLOAT * parameters
    return Memory(
        weights=FLOAT * parameters,
        gradients=gradients,
        optimizer=2 * FLOAT * parameters,
        activations=max(0, int(FLOAT * step) - gradients),
        process=process,
    )


def speed(recipe: Recipe, flops_per_token: float, rate: float) -> float:
    """Tokens a second to expect; between the measured widths along the logarithm of the width."""
    table = REACHED[recipe.model][recipe.precision]
    share = float(np.interp(math.log2(recipe.hidden), np.log2(list(table)), list(table.values())))
    return rate * share * (IN_PARTS if recipe.accumulate > 1 else 1.0) / flops_per_token


def estimate(
    recipe: Recipe,
    vocab_size: int,
    train_tokens: int,
    *,
    rate: float,
    process: int = 0,
    rows: Rows | None = None,
) -> Plan:
    """The plan of `recipe` on a text, or on pairs, of `train_tokens` tokens.

    Args:
        rate: products of the machine in `recipe.precision`, FLOP/s (`machine.gemm_rate`).
        process: bytes that the process has before there is a model.
    """
    model = blank(recipe, vocab_size)
    tokens: float = recipe.batch * recipe.seq
    flops = float(model.config.flops_per_token())
    steps_per_epoch, longest = train_tokens // int(tokens), recipe
    if rows is not None:
        tokens, longest = recipe.batch * rows.mean, replace(recipe, context=None, seq=rows.longest)
        steps_per_epoch = math.ceil(train_tokens / tokens - 1e-6)  # the last has what is left
        flops -= 6.0 * recipe.hidden * vocab_size * (1.0 - rows.learned)
    pace = speed(recipe, flops, rate)
    budget = Budget.parse(recipe.budget).resolve(max(1, steps_per_epoch))
    steps = budget.amount if budget.unit == "steps" else budget.amount * pace / tokens
    return Plan(
        recipe=recipe,
        vocab_size=vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        memory=memory(longest, model, vocab_size, process),
        flops_per_step=flops * tokens,
        tokens_per_step=tokens,
        tokens_per_second=pace,
        steps=max(1, math.floor(steps)),
        seconds=steps * tokens / pace if budget.unit == "steps" else budget.amount,
        epochs=steps / steps_per_epoch if rows else steps * tokens / max(1, train_tokens),
        rows=rows,
    )


def sizes(kind: str) -> Iterator[dict[str, int]]:
    """Widths with their depths, small to large: a second layer of a GRU from 512 on, a layer of a
    Transformer for every 64 of its width, and heads of 64 from two on."""
    for width in (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096):
        if kind == "gru":
            yield {"hidden": width, "layers": 1 if width < 512 else 2}
        else:
            heads = max(2, width // 64)
            yield {"hidden": width, "layers": max(2, width // 64), "heads": heads}


def choose(
    recipe: Recipe,
    vocab_size: int,
    train_tokens: int,
    *,
    limit: int,
    rate: float,
    process: int = 0,
    rows: Rows | None = None,
) -> Plan:
    """The largest of `sizes` that fits into `limit` bytes, and for which the budget has enough
    tokens: as many for each parameter, from a text that is not read too often.

    Raises:
        UsageError: the smallest one does not fit.
    """
    best: Plan | None = None
    for chosen in sizes(recipe.model):
        candidate = replace(recipe, **{**recipe.to_json(), **chosen})
        plan = estimate(candidate, vocab_size, train_tokens, rate=rate, process=process, rows=rows)
        if plan.memory.peak > limit:
            if best is None:
                raise UsageError(
                    f"{size(limit)} is too little: the smallest model needs "
                    f"{size(plan.memory.peak)}; a smaller --batch or --seq, or --accumulate"
                )
            break
        seen = min(plan.epochs, MOST_EPOCHS) * train_tokens
        if best is not None and seen < TOKENS_PER_PARAMETER * plan.parameters:
            break
        best = plan
    assert best is not None
    return best
