"""`fastlm bench model`: the plain GRU language model against fastlm, one training step at a time.

Embedding(V, H) -> GRU(H, H) -> Linear(H, V) -> cross-entropy on flattened logits -> Adam, default
settings, float32. Each variant trains in a process of its own on the same tokens from the same
parameters; the parent lets them step in turn, so they share whatever else the machine does, and
times a matrix product between them. Peak memory is that of each process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import measure
from .tokens import token_source
from .worker import PHASES

# name: (fastlm, Adam(fused=True)); the middle one shows what the optimizer alone gives
VARIANTS = {
    "plain": (False, None),
    "plain, fused Adam": (False, True),
    "fastlm, fused Adam": (True, True),
}
LOSS_TOLERANCE = 1e-5  # relative; identical mathematics, another order of sums


class Worker:
    """A training process; `ask` sends it one command and waits for the answer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from fastlm.bench.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,  # the same fastlm as here
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers
        )
        self.empty = self.ask(spec)["empty"]

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"fastlm.bench: a training process ended with code {self.process.wait()}"
            )
        return json.loads(answer)

    def peak_bytes(self) -> int | None:
        """Peak memory of the process beyond that of a tiny model."""
        peak = self.ask({"do": "memory"})["bytes"]
        return None if peak is None else peak - self.empty

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def flops(batch: int, seq: int, vocab: int, hidden: int, unique: float) -> float:
    """Multiplications and additions in the matrix products that identical mathematics must do.

    Forward, gradient of the input, gradient of the weight: three products of the same size each
    for the head, for the recurrence, and for the input projection of each distinct token.
    """
    rows = batch * seq
    return 3 * 2.0 * hidden * (rows * vocab + rows * 3 * hidden + unique * 3 * hidden)


def _relative(ours: Sequence[float], plain: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))


def _parameter_difference(ours: Path, plain: Path) -> float:
    """Largest difference of any parameter, relative to the largest value of its tensor."""
    pairs = zip(torch.load(ours), torch.load(plain), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _train(options: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, Any]:
    """Step all variants in turn, the order rotating, with a matrix product before each round."""
    rows, names = options.batch * options.seq, list(workers)
    product, product_flops = measure.gemm(rows, options.hidden, options.vocab)
    product()
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates = []
    for i in range(options.warmup + options.steps):
        rates.append(product_flops / measure.seconds(product))
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            answers[name].append(workers[name].ask({"do": "step"}))
    return {"answers": answers, "gemm": measure.spread(rates[options.warmup :]).median}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as plain numbers."""
    torch.set_num_threads(options.threads)
    keys = ("batch", "seq", "vocab", "hidden", "threads", "seed")
    shape = {key: getattr(options, key) for key in keys}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved = {name: Path(folder) / f"{i}.pt" for i, name in enumerate(VARIANTS)}
        try:
            for name, (ours, fused) in VARIANTS.items():
                spec = {"ours": ours, "fused": fused, "steps": options.warmup + options.steps}
                workers[name] = Worker({**spec, **shape})
            trained = _train(options, workers)
            memory = {name: w.peak_bytes() for name, w in workers.items()}
            for name, w in workers.items():
                w.ask({"do": "save", "path": str(saved[name])})
        finally:
            for w in workers.values():
                w.close()
        parameters = {n: _parameter_difference(saved[n], saved["plain"]) for n in VARIANTS}
    answers = trained["answers"]
    unique = sum(a["unique"] for a in answers["plain"]) / len(answers["plain"])
    needed = flops(options.batch, options.seq, options.vocab, options.hidden, unique)
    return {
        "machine": measure.machine(),
        "tokens": token_source(),
        "shape": {**shape, "steps": options.steps, "warmup": options.warmup},
        "unique_tokens": unique,
        "flops": needed,
        "gemm_flops_per_second": trained["gemm"],
        "floor_seconds": needed / trained["gemm"],
        "variants": {
            name: {
                **_timing(answers, name, options),
                "peak_bytes": memory[name],
                "loss_difference": _relative(
                    [a["loss"] for a in answers[name]], [a["loss"] for a in answers["plain"]]
                ),
                "parameter_difference": parameters[name],
            }
            for name in VARIANTS
        },
    }


def _timing(
    answers: dict[str, list[dict[str, Any]]], name: str, options: argparse.Namespace
) -> dict[str, Any]:
    timed = [a["phases"] for a in answers[name][options.warmup :]]
    plain = [sum(a["phases"]) for a in answers["plain"][options.warmup :]]
    totals = [sum(phases) for phases in timed]
    step = measure.spread(totals)
    ratio = measure.spread([p / t for p, t in zip(plain, totals, strict=True)])
    return {
        "tokens_per_second": options.batch * options.seq / step.median,
        "step_seconds": vars(step),
        "times_plain": vars(ratio),
        "phase_seconds": {
            phase: measure.spread([t[i] for t in timed]).median for i, phase in enumerate(PHASES)
        },
    }


def _phase(phase: str) -> Callable[[dict[str, Any]], str]:
    return lambda variant: f"{variant['phase_seconds'][phase] * 1e3:.1f}"


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    shape, machine = result["shape"], result["machine"]
    floor = result["floor_seconds"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens/s": lambda v: f"{v['tokens_per_second']:.0f}",
        "  quartiles of ms per step": lambda v: (
            f"{v['step_seconds']['low'] * 1e3:.0f} - {v['step_seconds']['high'] * 1e3:.0f}"
        ),
        "times plain": lambda v: f"{v['times_plain']['median']:.2f}",
        "ms per step": lambda v: f"{v['step_seconds']['median'] * 1e3:.1f}",
        **{f"  {p}": _phase(p) for p in PHASES},
        "share of the floor": lambda v: f"{floor / v['step_seconds']['median']:.0%}",
        "peak memory, MB": lambda v: (
            "-" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 1e6:.0f}"
        ),
        "largest loss difference": lambda v: f"{v['loss_difference']:.1e}",
        "largest parameter difference": lambda v: f"{v['parameter_difference']:.1e}",
    }
    variants = result["variants"]
    label = max(map(len, rows))
    lines = [
        f"Embedding({shape['vocab']}, {shape['hidden']}) -> GRU -> Linear -> cross-entropy -> Adam",
        f"batch {shape['batch']} x {shape['seq']} tokens ({result['tokens']}), float32, "
        f"{shape['threads']} threads, {shape['steps']} steps timed after {shape['warmup']}",
        f"{machine['name']}, torch {machine['torch']}, kernels: {machine['cpu_isa']}",
        "",
        "  ".join([" " * label, *variants]),
    ]
    for name, cell in rows.items():
        cells = [cell(v).rjust(len(column)) for column, v in variants.items()]
        lines.append("  ".join([name.ljust(label), *cells]))
    lines += [
        "",
        f"floor: {result['flops'] / 1e9:.1f} GFLOP of matrix products that identical float32 "
        f"mathematics must do ({result['unique_tokens']:.0f} distinct tokens a step),",
        f"at {result['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s measured between the steps: "
        f"{floor * 1e3:.1f} ms; optimizer, gates and softmax are not in it",
        "memory: peak of the process beyond torch and its libraries; "
        "differences: from plain, relative",
    ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be below 2**31, got {value}")
    return value


def _threads(text: str) -> int:
    if (value := _positive(text)) > 1024:  # OpenMP ends the process where it gets no thread
        raise argparse.ArgumentTypeError(f"must be at most 1024, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlm bench", description="Benchmarks of fastlm.")
    model = parser.add_subparsers(dest="what", required=True).add_parser(
        "model", help="the plain GRU language model against fastlm", description=__doc__
    )
    defaults = {"batch": 32, "seq": 64, "vocab": 10000, "hidden": 512, "steps": 12, "warmup": 2}
    for name, default in defaults.items():
        model.add_argument(f"--{name}", type=_positive, default=default, help=f"default {default}")
    model.add_argument(
        "--threads", type=_threads, default=torch.get_num_threads(), help="default: torch's"
    )
    model.add_argument("--seed", type=int, default=0, help="of parameters and tokens; default 0")
    model.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 when the losses of plain and fastlm differ, else 0."""
    options = _parser().parse_args(argv)
    result = run(options)
    print(json.dumps(result, indent=1) if options.json else report(result))
    worst = max(v["loss_difference"] for v in result["variants"].values())
    if worst > LOSS_TOLERANCE:
        print(
            f"fastlm bench: losses must agree to {LOSS_TOLERANCE:g} relative, got {worst:.1e}",
            file=sys.stderr,
        )
        return 1
    return 0
