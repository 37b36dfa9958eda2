"""Arguments, results and float64 truth of a GRU recurrence, for tests of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import testing
from fastlm.ops.embedding_gru import cuda_kernels, reference


def case(
    b: int, t: int, h: int, *, parts: int, rows: int = 7, resets: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of a recurrence; weights that the operands hold exactly."""
    w_hh = torch.randn(3 * h, h) / h**0.5
    args: dict[str, Any] = dict(
        table=torch.randn(rows, 3 * h),
        index=torch.randint(0, rows, (b * t,)),
        reset=(torch.rand(b * t) < 0.3).to(torch.uint8) if resets else None,
        w_hh=w_hh.bfloat16().float() if parts == 1 else w_hh,
        b_hh=torch.randn(3 * h) / h**0.5,
        h0=torch.randn(b, h),
        batch=b,
    )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def run(
    args: dict[str, Any], parts: int, batch_first: bool = True, reverse: bool = False
) -> list[Tensor]:
    """Results of both passes; the gradients are of fixed random upstream ones."""
    how = (args["batch"], batch_first, reverse)
    shared = (args["index"], args["reset"], args["w_hh"])
    forward = cuda_kernels.forward(parts, args["table"], *shared, args["b_hh"], args["h0"], *how)
    output, h_n, gates = (x.float() for x in forward)
    generator = torch.Generator().manual_seed(7)
    dout, dh_n = (torch.randn(x.shape, generator=generator).to(x.device) for x in (output, h_n))
    rows = args["table"].shape[0]
    index, reset, w_hh = shared
    backward = cuda_kernels.backward(
        parts, dout, dh_n, index, rows, reset, w_hh, args["h0"], output, gates, *how
    )
    return [*forward, *backward]


def truth(
    args: dict[str, Any], batch_first: bool = True, reverse: bool = False, like: list | None = None
) -> list[Tensor]:
    """The reference in float64; its backward on the states and gates in `like`."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in args.items()}  # fmt: skip
    how = (args["batch"], batch_first, reverse)
    forward = reference.forward(
        *(wide[k] for k in ("table", "index", "reset", "w_hh", "b_hh", "h0")), *how
    )
    output, h_n, gates = (x.double() for x in (like or forward)[:3])
    generator = torch.Generator().manual_seed(7)
    dout, dh_n = (torch.randn(x.shape, generator=generator).to(x) for x in (output, h_n))
    backward = reference.backward(
        dout, dh_n, wide["index"], args["table"].shape[0], wide["reset"], wide["w_hh"],
        wide["h0"], output, gates, *how,
    )  # fmt: skip
    return [*forward, *backward]


# relative to the largest value: bfloat16 outputs and operands, 16 bits, float32
ALLOWED = {1: 8e-3, 2: 2e-5, 3: 2e-6}


def check_close(got: list[Tensor], want: list[Tensor], parts: int) -> None:
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert testing.error(a.double(), b) <= ALLOWED[parts] * float(b.abs().max()), number
