"""What it costs to go on: verify a checkpoint, load it, restore model, optimizer and cursor.

    python benchmarks/resume_cost.py [--rounds 5]

The import of torch and the making of the model are not part of it: a new run pays them too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fastlm.lm import checkpoint, config, data, preparation, trainer
from fastlm.lm.model import GRULM, parameter_count
from fastlm.lm.transformer import TransformerLM

MODELS: dict[str, Any] = {
    "GRU, as by default": lambda: GRULM(2048, 256),
    "Transformer, 12 layers": lambda: TransformerLM(
        16384, hidden_size=512, num_layers=12, num_heads=8, context=16, end=256
    ),
}


def forget(path: Path) -> None:
    """Its pages leave the cache of the system."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resume(run: trainer.Trainer, out: Path) -> tuple[float, float]:
    """Seconds to find and verify, and to load and restore."""
    started = time.perf_counter()
    saved = checkpoint.newest(out)
    verified = time.perf_counter()
    assert saved is not None
    run.resume(saved)
    return verified - started, time.perf_counter() - verified


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "text.txt")
        text.write_text(data.load().documents[0].text[:50000])
        choice = preparation.DataConfig((str(text),), tokenizer="bytes")
        prepared = preparation.prepare(choice, Path(name, "cache"))
        settings = config.TrainConfig(budget="2steps", batch=1, seq=16)
        for title, make in MODELS.items():
            out = Path(name, title)

            def new(make: Any = make, out: Path = out) -> trainer.Trainer:
                return trainer.Trainer(
                    make(), prepared.tokens, prepared.tokenizer, settings, out=out
                )

            first = new()
            first.step()
            started = time.perf_counter()
            path = first.save()
            saving = time.perf_counter() - started
            size = sum(file.stat().st_size for file in path.iterdir())
            print(
                f"{title}: {parameter_count(first.model) / 1e6:.1f} M parameters, "
                f"{size / 1e6:.0f} MB, saved in {saving:.2f} s"
            )
            run = new()
            for state in ("warm", "cold"):
                took = []
                for _ in range(rounds):
                    if state == "cold":
                        forget(path)
                    took.append(resume(run, out))
                total = [sum(parts) for parts in took]
                verify, load = (statistics.median(part) for part in zip(*took, strict=True))
                print(
                    f"  {state} cache: {statistics.median(total):.3f} s ({min(total):.3f} to "
                    f"{max(total):.3f}), of which verifying {verify:.3f}, restoring {load:.3f}"
                )


if __name__ == "__main__":
    main()
