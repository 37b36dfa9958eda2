"""GRU against Transformer: bits per byte of the held-out novel after equal seconds of training.

    python benchmarks/equal_seconds.py --budget 120s            # both, one after the other
    python benchmarks/equal_seconds.py --budget 120s --only gru # in pieces; results are merged

Each kind has the size, batch and learning rate that did best in shorter runs here. The seconds are
those of training steps alone. Results go to benchmarks/results/equal_seconds.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastlm.bench import measure
from fastlm.lm import files, preparation
from fastlm.lm.model import parameter_count
from fastlm.lm.progress import Reporter
from fastlm.lm.recipe import Recipe
from fastlm.lm.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "equal_seconds.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "gru": {"hidden": 256, "lr": 8e-3},
    "transformer": {"hidden": 128, "layers": 2, "batch": 8, "seq": 128, "lr": 4e-3},
}


def train(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """One run without an evaluation before its end."""
    recipe = Recipe.of({}, {"evals": 1, **SETTINGS[kind], **given, "model": kind})
    data = preparation.prepare(recipe.data_config())
    model = recipe.make_model(data.tokens)
    run = Trainer(
        model, data.tokens, data.tokenizer, recipe.train_config(), reporter=Reporter(interval=20.0)
    )
    result = run.fit()
    assert result.score is not None
    return {
        "held_out": result.score.to_json(),
        "train_nats": result.train_nats,
        "parameters": parameter_count(model),
        "steps": result.steps,
        "seconds": result.seconds,
        "tokens_per_second": result.steps * recipe.batch * recipe.seq / result.seconds,
        "recipe": {k: v for k, v in asdict(recipe).items() if v is not None},
        "threads": torch.get_num_threads(),
        "machine": measure.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="120s")
    parser.add_argument("--only", choices=tuple(SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--dry", action="store_true", help="print, keep no result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {name: json.loads(value) for name, value in (x.split("=", 1) for x in options.set)}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in (options.only,) if options.only else SETTINGS:
        row = train(kind, {"budget": options.budget, **given})
        print(
            f"{kind}: {row['held_out']['bits_per_byte']:.4f} bits/byte, {row['steps']} steps, "
            f"{row['tokens_per_second']:,.0f} tokens/s, {row['parameters']:,} parameters {given}",
            flush=True,
        )
        known.setdefault(options.budget, {})[kind] = row
        if not options.dry:
            files.write_json(RESULTS, known)


if __name__ == "__main__":
    main()
