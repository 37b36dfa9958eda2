"""What a test of an op is measured with: float64 is the truth, plain PyTorch sets the tolerance.

error(ours, float64) <= 2 * error(plain in the same dtype, float64) + floor
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16)

# the floor, in units of the dtype's epsilon times the largest true value: plain PyTorch is
# sometimes exact by luck, and a sum taken in another order differs in the last bits
FLOOR_EPS = 8.0

Call = Callable[..., Tensor | Sequence[Tensor]]


def strided(value: Tensor, kind: str) -> Tensor:
    """The same values in another layout: contiguous, transposed, sliced or offset."""
    if kind == "contiguous" or value.dim() == 0:
        return value.contiguous()
    if kind == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        wide = value.new_empty(*value.shape[:-1], 2 * value.shape[-1] + 1)
        wide[..., 1::2] = value
        return wide[..., 1::2]
    if kind == "offset":
        flat = value.new_empty(value.numel() + 3)
        flat[3:] = value.reshape(-1)
        return flat[3:].view(value.shape)
    raise ValueError(f"fastlm.testing: unknown layout {kind!r}")


LAYOUTS = ("contiguous", "transposed", "sliced", "offset")


def _outputs(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    items = [result] if isinstance(result, Tensor) else list(result)
    return [item for item in items if isinstance(item, Tensor)]


def _run(call: Call, args: Sequence[Any], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every float argument, all as float64."""
    leaves = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    outputs = _outputs(call(*leaves))
    have, want = [list(o.shape) for o in outputs], [list(g.shape) for g in upstream]
    assert have == want, f"outputs of shapes {have}, expected {want}"
    inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    grads: Iterable[Tensor | None] = ()
    if inputs and pairs:
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
    zeros = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=False)]
    return [value.detach().double() for value in (*outputs, *zeros)]


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference; positions where both are NaN or the same infinity agree."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {list(got.shape)}, expected {list(want.shape)}")
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, torch.zeros_like(want), (got - want).abs())
    if bool(difference.isnan().any()):
        return float("inf")
    return float(difference.max()) if difference.numel() else 0.0


def check(ours: Call, plain: Call, args: Sequence[Any], *, seed: int = 0) -> None:
    """Outputs and all gradients of `ours` are as accurate as those of `plain`.

    Args:
        ours, plain: the same mathematics; each takes `args` and returns one or several tensors.
        args: tensors in the dtype under test (floats get a gradient), or anything else.
        seed: of the random upstream gradient, which is not uniform and has both signs.
    """
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with torch.no_grad():
        shapes = [o.shape for o in _outputs(plain(*exact))]
    generator = torch.Generator().manual_seed(seed)
    device = next(a.device for a in args if isinstance(a, Tensor))
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    upstream = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for s in shapes
    ]
    truth = _run(plain, exact, upstream)
    theirs = _run(plain, args, upstream)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    got = _run(ours, args, upstream)
    for index, (a, b) in enumerate(zip(args, before, strict=True)):
        if isinstance(a, Tensor):
            assert bool(((a == b) | (a != a)).all()), f"argument {index} was written to"
    assert len(got) == len(truth), f"{len(got)} results, expected {len(truth)}"
    for index, (a, b, want) in enumerate(zip(got, theirs, truth, strict=True)):
        finite = want[want.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        allowed = FLOOR_EPS * torch.finfo(dtype).eps * scale
        # where plain PyTorch gives infinity or NaN and the truth is finite, it allows nothing
        if math.isfinite(error(b, want)):
            allowed += 2 * error(b, want)
        actual = error(a, want)
        kind = f"output {index}" if index < len(shapes) else f"gradient {index - len(shapes)}"
        assert actual <= allowed, (
            f"{kind}: error {actual:.3g} against float64, allowed {allowed:.3g} "
            f"(plain PyTorch {error(b, want):.3g})"
        )
