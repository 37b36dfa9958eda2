"""Attention on a GPU: ours in Triton beside PyTorch's, forward and backward, in TFLOP/s.

    python benchmarks/gpu_attention.py [--seconds 120] [--no-compile]

bfloat16, B * S = 16384 tokens, H * D = 2048: the shapes on which flash attention is usually
compared. Every side is checked against the first before it is timed; sides take turns. Writes
benchmarks/results/<gpu>-attention.json. Exit codes: 0 all agree, 1 something failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.bench import measure

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS, WIDTH = 16384, 2048
ROUNDS = 9
# of the largest value, between two ways to compute the same in bfloat16
TOLERANCE = 0.03


@dataclass(frozen=True)
class Shape:
    seq: int
    size: int
    causal: bool
    documents: int = 0  # of the same length, in one packed batch

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        packed = f" {self.documents} documents" if self.documents else ""
        return f"D{self.size} S{self.seq} {kind}{packed}"

    @property
    def flops(self) -> float:
        """Two products forward, five backward."""
        pairs = TOKENS * (self.seq + 1) / 2 if self.causal else TOKENS * self.seq
        return 4.0 * pairs * WIDTH


def shapes() -> list[Shape]:
    """Those that say the most first: the time may end before the list."""
    found = [
        Shape(seq, size, causal)
        for seq in (4096, 16384, 1024, 512, 2048, 8192)
        for size in (128, 64, 256)
        for causal in (True, False)
    ]
    packed = [Shape(seq, 128, True, TOKENS // seq) for seq in (512, 4096)]
    return found[:6] + packed + found[6:]


Side = Callable[..., Tensor]


def ours(shape: Shape) -> Side:
    options: dict[str, Any] = {"mask": "causal"} if shape.causal else {}
    if not shape.documents:
        return lambda q, k, v: fastlm.attention(q, k, v, **options)
    starts = torch.arange(shape.documents + 1, device="cuda", dtype=torch.int32) * shape.seq
    options |= {"layout": "thd", "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return lambda q, k, v: fastlm.attention(
        *(x.flatten(0, 1) for x in (q, k, v)), **options
    ).view_as(q)


def sdpa(shape: Shape, backend: SDPBackend | None = None) -> Side:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        if backend is None:
            out = F.scaled_dot_product_attention(*heads_first, is_causal=shape.causal)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*heads_first, is_causal=shape.causal)
        return out.transpose(1, 2)

    return call


def flex(shape: Shape) -> Side:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def past(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(past, None, None, shape.seq, shape.seq) if shape.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
        return out.transpose(1, 2)

    return call


def sides(shape: Shape, compiles: bool) -> Iterator[tuple[str, Callable[[], Side]]]:
    """Ways to compute it; PyTorch has its documents as a batch, which they fit exactly."""
    yield "sdpa", lambda: sdpa(shape)
    yield "cudnn", lambda: sdpa(shape, SDPBackend.CUDNN_ATTENTION)
    yield "triton", lambda: ours(shape)
    # a compilation for each shape: two sizes tell how it stands
    if compiles and shape.size == 128 and shape.seq in (4096, 16384) and not shape.documents:
        yield "flex", lambda: flex(shape)


class Measured:
    """Forward and backward of one side, as calls without arguments."""

    def __init__(self, call: Side, args: list[Tensor], dout: Tensor) -> None:
        self.call, self.dout = call, dout
        self.leaves = [a.detach().requires_grad_() for a in args]
        self.out = self.call(*self.leaves)
        self.results = [self.out.detach(), *self.backward()]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)


def disagreement(got: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(got, want, strict=True)
    )


def prepare(shape: Shape, compiles: bool) -> tuple[dict[str, Measured], dict[str, str]]:
    """The sides that run and agree, and what the others say."""
    heads = WIDTH // shape.size
    args = [
        torch.randn(
            TOKENS // shape.seq, shape.seq, heads, shape.size, device="cuda", dtype=torch.bfloat16
        )
        for _ in range(4)
    ]
    ready: dict[str, Measured] = {}
    objections: dict[str, str] = {}
    for name, make in sides(shape, compiles):
        try:
            with fastlm.use_backend("triton" if name == "triton" else None):
                side = Measured(make(), args[:3], args[3])
                torch.cuda.synchronize()
        except (RuntimeError, ImportError) as error:
            objections[name] = str(error).strip().splitlines()[0][:80]
            continue
        if ready:
            worst = disagreement(side.results, next(iter(ready.values())).results)
            if not worst <= TOLERANCE:
                objections[name] = f"WRONG: {worst:.2g} of the largest value away"
                continue
        ready[name] = side
    return ready, objections


def time_shape(shape: Shape, ready: dict[str, Measured]) -> dict[str, Any]:
    """Median seconds and TFLOP/s of each side, forward and backward."""
    row: dict[str, Any] = {}
    for which, factor in (("forward", 1.0), ("backward", 2.5)):
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(ROUNDS):
            names = list(ready)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                backend = "triton" if name == "triton" else None
                with fastlm.use_backend(backend):
                    call = getattr(ready[name], which)
                    seconds[name].append(measure.seconds(call, "cuda", 3))
        for name, values in seconds.items():
            spread = measure.spread(values)
            row.setdefault(name, {})[which] = {
                **vars(spread),
                "tflops": factor * shape.flops / spread.median / 1e12,
            }
    return row


def line(shape: Shape, row: dict[str, Any], objections: dict[str, str]) -> str:
    cells = [
        f"{name} {r['forward']['tflops']:.0f}/{r['backward']['tflops']:.0f}"
        for name, r in row.items()
    ]
    return "  ".join([shape.name.ljust(32), *cells, *(f"{n}: {e}" for n, e in objections.items())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="start no shape later")
    parser.add_argument("--no-compile", action="store_true", help="leave FlexAttention out")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_attention: needs a CUDA device, torch finds none", file=sys.stderr)
        return 2
    state = fastlm.backends()["attention"]["triton"]
    print(f"attention in Triton: {state}")
    start, rows, failed, left_out = time.monotonic(), {}, False, 0
    print("TFLOP/s forward/backward (five products), bfloat16, 16384 tokens, H * D = 2048")
    for shape in shapes():
        if time.monotonic() - start > options.seconds:
            left_out += 1
            continue
        torch.manual_seed(0)
        ready, objections = prepare(shape, not options.no_compile)
        row = time_shape(shape, ready)
        failed |= "triton" in objections
        rows[shape.name] = row | {f"{name} failed": why for name, why in objections.items()}
        print(line(shape, row, objections), flush=True)
        del ready
        torch.cuda.empty_cache()
    if left_out:
        print(f"{left_out} shapes not timed: the time limit was reached")
    machine = measure.machine("cuda")
    path = RESULTS / f"{machine['slug']}-attention.json"
    path.write_text(json.dumps({"machine": machine, "shapes": rows}, indent=1) + "\n")
    print(f"results in benchmarks/results/{path.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
