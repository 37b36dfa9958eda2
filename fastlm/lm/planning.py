"""`fastlm plan` and `fastlm train --dry-run`: what a run will need, from its settings."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import errors, machine, pairdata, plan, preparation, settings, starting, trainstate
from .checkpoint import Checkpoint
from .pairs import PairStore
from .progress import Reporter, clock
from .recipe import Recipe
from .trainer import Trainer

PrintJSON = Callable[[Any], None]
Prepared = preparation.Prepared | pairdata.PreparedPairs
MEASURED_STEPS = 5


def process_memory(recipe: Recipe, data: Prepared) -> int:
    """Bytes of this process with the code, threads and buffers of training in it, which come with
    the first step: that of a very small model."""
    small: dict[str, Any] = {"hidden": 32, "layers": 1, "kv_heads": None, "embedding": None}
    small |= {"ffn": None, "heads": Recipe.heads, "batch": recipe.accumulate}
    tiny = replace(recipe, **small)
    model = tiny.make_model(data.tokens)
    Trainer(model, data.tokens, data.tokenizer, tiny.train_config()).step()
    return machine.resident_memory()


def rows_of(recipe: Recipe, store: PairStore) -> tuple[int, plan.Rows]:
    """(tokens of all training pairs, what their rows are like)."""
    lengths = [int(stop - start) for start, _, stop in store.places[store.rows("train")]]
    lanes = store.batches(batch=recipe.batch, length=recipe.seq, seed=recipe.seed)
    mean = sum(lengths) / len(lengths)
    return sum(lengths), plan.Rows(mean, max(lengths), lanes.learned_share)


def _estimate(recipe: Recipe, data: Prepared, limit: int | None = None) -> plan.Plan:
    """The plan on this machine; with `limit`, of the model that is chosen for it."""
    rows, train_tokens = None, data.tokens.totals("train")["tokens"]
    if isinstance(data.tokens, PairStore):
        train_tokens, rows = rows_of(recipe, data.tokens)
    rate, process = machine.gemm_rate(precision=recipe.precision), process_memory(recipe, data)
    about: dict[str, Any] = {"rate": rate, "process": process, "rows": rows}
    vocab = data.tokens.vocab_size
    if limit is not None:
        return plan.choose(recipe, vocab, train_tokens, limit=limit, **about)
    return plan.estimate(recipe, vocab, train_tokens, **about)


def measure(recipe: Recipe, data: Prepared) -> dict[str, float]:
    """Tokens a second and peak of some real steps, thrown away."""
    machine.forget_peak()
    run = Trainer(
        recipe.make_model(data.tokens), data.tokens, data.tokenizer, recipe.train_config()
    )
    run.step()  # allocates what stays
    seconds = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        run.step()
        seconds.append(time.perf_counter() - start)
    speed = run.lanes.tokens_per_step / machine.spread(seconds)[1]
    return {"tokens_per_second": speed, "peak_memory": machine.peak_memory()}


def command_of(recipe: Recipe, given: dict[str, Any]) -> str:
    """The command that trains what was chosen: the sizes beside what was asked for."""
    words = ["fastlm", "train"]
    names = ["hidden", "layers", *(["heads"] if recipe.model == "transformer" else [])]
    for name in dict.fromkeys([*given, *names]):
        value, option = getattr(recipe, name), f"--{name.replace('_', '-')}"
        if name == "clean":
            words += [] if value else ["--no-clean"]
        elif isinstance(value, bool):
            words += [option] if value else []
        elif isinstance(value, tuple):
            words += [option, *value]
        elif value is not None:
            words += [option, str(value)]
    return shlex.join(words)


def plan_command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    given = settings.given(args)
    chosen = starting.choose(given, None)
    recipe = chosen.recipe
    limit = None if args.memory is None else plan.bytes_of(args.memory)
    fixed = [name for name in ("init", "hidden", "layers", "heads") if name in given]
    data = chosen.prepare()
    if chosen.start is not None:
        chosen.start.require_sizes(plan.blank(recipe, data.tokens.vocab_size))
    made = _estimate(recipe, data, None if fixed else limit)
    for line in made.lines():
        reporter.line(line)
    report = made.to_json()
    if limit is not None and not fixed:
        report["command"] = command_of(made.recipe, given)
        reporter.line(f"the largest that fits into {args.memory} and {recipe.budget}:")
        reporter.line(f"  {report['command']}")
    if args.measure:
        report["measured"] = found = measure(made.recipe, data)
        run = made.steps * made.tokens_per_step / found["tokens_per_second"]
        reporter.line(
            f"measured: {found['tokens_per_second']:,.0f} tokens/s, peak "
            f"{plan.size(found['peak_memory'])}; {made.steps:,} steps would take {clock(run)}"
        )
    if args.json:
        print_json(report)
    if limit is not None and made.memory.peak > limit:
        raise errors.TrainingError(
            f"this model needs {plan.size(made.memory.peak)} of {plan.size(limit)}; without "
            f"{', '.join('--' + name for name in fixed)} a size is chosen"
        )
    return errors.OK


def dry_run(
    args: argparse.Namespace, saved: Checkpoint | None, reporter: Reporter, print_json: PrintJSON
) -> int:
    """The settings as they would be used, and the plan; nothing is written but the token cache."""
    chosen = starting.choose(settings.given(args), saved)
    recipe, data = chosen.recipe, chosen.prepare()
    model = plan.blank(recipe, data.tokens.vocab_size)
    if chosen.start is not None:
        chosen.start.require_sizes(model)
    if saved is not None:
        now = trainstate.described(model, recipe.train_config(), data.tokenizer, data.tokens)
        trainstate.require_same(saved, now, tuple(filter(None, args.allow_change.split(","))))
    made = _estimate(recipe, data)
    reporter.line(settings.dump(recipe))
    for line in made.lines():
        reporter.line(line)
    if args.json:
        print_json(made.to_json())
    return errors.OK
