"""Attention in Triton: every mask and option, both passes; what is promised to the bit.

On a GPU where there is one, else in Triton's interpreter, which test_triton_interpreted.py starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import AttnMask, dispatch
from fastlm.testing import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if "triton" not in dispatch.ready("attention", DEVICE):
    why = fastlm.backends()["attention"]["triton"]
    pytest.skip(f"{why}; test_triton_interpreted.py runs this file", allow_module_level=True)

from fastlm.ops.attention import triton_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
F32 = torch.float32
NAMES = ("alibi_slopes", "sink", "bias")
Options = dict[str, Any]


def on_device(options: Options) -> Options:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}


def qkv(
    shape: tuple[int, int, int, int, int] = (2, 70, 100, 2, 1),
    sizes: tuple[int, int] = (24, 40),
    dtype: torch.dtype = F32,
) -> list[Tensor]:
    batch, rows, keys, heads, key_heads = shape
    return [
        torch.randn(batch, rows, heads, sizes[0]).to(DEVICE, dtype),
        torch.randn(batch, keys, key_heads, sizes[0]).to(DEVICE, dtype),
        torch.randn(batch, keys, key_heads, sizes[1]).to(DEVICE, dtype),
    ]


def packed(
    starts_q: list[int], starts_k: list[int], rows: int, keys: int
) -> tuple[list[Tensor], Options]:
    tensors = [x[0] for x in qkv((1, rows, keys, 2, 1))]
    starts = [torch.tensor(s, dtype=torch.int32) for s in (starts_q, starts_k)]
    named = {"layout": "thd", "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    return tensors, on_device(named)


def results(
    backend: str, args: list[Tensor], options: Options, dout: Tensor | None = None
) -> list[Tensor]:
    """Out, lse, and the gradients of q, k and v for a gradient of both."""
    leaves = [a.clone().requires_grad_() for a in args]
    with fastlm.use_backend(backend):
        out, lse = fastlm.attention(*leaves, return_lse=True, **options)
        generator = torch.Generator().manual_seed(3)
        if dout is None:
            dout = torch.randn(out.shape, generator=generator).to(DEVICE, out.dtype)
        dlse = torch.randn(lse.shape, generator=generator).to(DEVICE)
        return [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


def against_reference(args: list[Tensor], options: Options) -> None:
    """Every output and gradient; the reference has tests of its own."""
    options = on_device(options)
    names = [name for name in NAMES if name in options]
    fixed = {k: v for k, v in options.items() if k not in NAMES}

    def call(backend: str, *given: Tensor) -> tuple[Tensor, ...]:
        with fastlm.use_backend(backend):
            named = dict(zip(names, given[3:], strict=True))
            out, lse = fastlm.attention(*given[:3], return_lse=True, **named, **fixed)
            return out, lse.masked_fill(lse == -torch.inf, 0.0)

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        return call("reference" if given[0].dtype == torch.float64 else "triton", *given)

    check(ours, lambda *a: call("reference", *a), [*args, *(options[name] for name in names)])


BANDS: dict[str, Options] = {
    "full": {},
    "causal": {"mask": "causal"},
    "window": {"window": (20, 3)},
    "left": {"window": (30, None)},
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("sizes", [(70, 100), (100, 70)])
def test_bands(band: str, sizes: tuple[int, int], poisoned: None) -> None:
    against_reference(qkv((1, *sizes, 4, 2)), BANDS[band])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 96])
def test_half_precision(dtype: torch.dtype, size: int, poisoned: None) -> None:
    against_reference(qkv((1, 65, 65, 2, 2), (size, size), dtype), {"mask": "causal"})


@pytest.mark.parametrize("size", [16, 33])
def test_rows_that_are_not_aligned(size: int, poisoned: None) -> None:
    """Columns out of wider rows, and rows apart from each other, give the bits of a copy."""
    args = qkv((1, 40, 50, 2, 1), (size, size))
    wider = [torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2] for x in args]
    assert all(triton_kernels.aligned(x).data_ptr() % 16 == 0 for x in wider)
    as_it_is = triton_kernels.aligned(args[0])
    assert (as_it_is is args[0]) == (size == 16) and as_it_is.shape[3] % 16 == 0
    for ours, copied in zip(strided(wider), strided(args), strict=True):
        assert ours.is_contiguous() and torch.equal(ours, copied)


def strided(args: list[Tensor]) -> list[Tensor]:
    """As `results`, of tensors whose strides a clone would not keep."""
    args = [a.detach().requires_grad_() for a in args]
    with fastlm.use_backend("triton"):
        out = fastlm.attention(*args, mask="causal")
        return [out, *torch.autograd.grad(out.square().sum(), args)]


SCORES: dict[str, Options] = {
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.01]), "window": (50, 0)},
    "alibi-batch": {"alibi_slopes": torch.tensor([[0.3, 0.01], [1.0, -0.2]])},
    "sink": {"sink": torch.tensor([0.5, -2.0]), "mask": "causal"},
    "dropout": {"dropout_p": 0.3, "seed": 2**64 - 5, "mask": "causal"},
    "dropout-all": {"dropout_p": 1.0, "seed": 1},
}


# on a GPU each set of options is compiled, seconds a kernel; together they are tested there too
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="test_all_at_once has it on a GPU")


@interpreted
@pytest.mark.parametrize("kind", SCORES)
def test_scores(kind: str, poisoned: None) -> None:
    against_reference(qkv((2, 40, 70, 2, 1)), SCORES[kind])


@pytest.mark.parametrize("rows, keys", [(33, 65), (65, 33)])
def test_all_at_once(rows: int, keys: int, poisoned: None) -> None:
    options: Options = {"mask": "causal", "softcap": 2.0, "dropout_p": 0.2, "seed": 7}
    extra = {"alibi_slopes": torch.rand(2), "sink": torch.randn(2), "bias": torch.randn(rows, keys)}
    against_reference(qkv((2, rows, keys, 2, 1)), options | extra)


BIASES = [(1, 1, 70, 100), (1, 2, 1, 100), (2, 1, 70, 1), (2, 2, 70, 100), (2, 2, 1, 1)]


@pytest.mark.parametrize("shape", BIASES[:2] if DEVICE == "cuda" else BIASES, ids=str)
def test_bias(shape: tuple[int, ...], poisoned: None) -> None:
    bias = torch.randn(shape)
    bias[..., :5] = -torch.inf if shape[-1] > 1 else 1.0
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wide[..., ::2] = bias
    against_reference(qkv(), {"bias": wide[..., ::2], "window": (60, 10)})


def test_bias_that_leaves_rows_without_keys(poisoned: None) -> None:
    bias = torch.zeros(70, 100)
    bias[10:20] = -torch.inf
    against_reference(qkv(), {"bias": bias})


def test_intervals_and_documents(poisoned: None) -> None:
    lo, hi = torch.randint(-5, 70, (2, 1, 70)), torch.randint(20, 130, (2, 1, 70))
    by_head = [x.transpose(0, 1).contiguous() for x in (lo, hi)]
    for mask in (AttnMask.intervals(lo, hi), AttnMask.intervals(*by_head)):
        moved = AttnMask(tuple(type(t)(t.lo.to(DEVICE), t.hi.to(DEVICE)) for t in mask._terms))
        against_reference(qkv(), {"mask": moved & AttnMask.window(60, 20)})
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([64, 3, 70, 1, 12]))
    documents = AttnMask.documents(ids.to(DEVICE)) & AttnMask.causal()
    against_reference(qkv((1, 150, 150, 2, 1)), {"mask": documents})


# an empty sequence, one without keys, one without rows; rows and keys behind the last
STARTS_Q, STARTS_K = [0, 3, 3, 70, 75, 75, 133], [0, 5, 9, 90, 90, 95, 130]


@pytest.mark.parametrize("search", [256, 2])
@pytest.mark.parametrize("band", BANDS)
def test_packed(band: str, search: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "SEARCH", search)
    args, options = packed(STARTS_Q, STARTS_K, 141, 137)
    if search == 2:
        options["sink"] = torch.tensor([0.5, -1.0])
    against_reference(args, options | BANDS[band])


@pytest.mark.parametrize("extra", ["prefix", "dropout", "bias"])
def test_packed_with(extra: str, poisoned: None) -> None:
    args, options = packed(STARTS_Q, STARTS_K, 141, 137)
    choices: dict[str, Options] = {
        "prefix": {"mask": AttnMask.prefix(4)},
        "dropout": {"dropout_p": 0.4, "seed": 3, "window": (20, 3)},
        "bias": {"bias": torch.randn(141, 137), "alibi_slopes": torch.rand(2), "mask": "causal"},
    }
    against_reference(args, options | choices[extra])


def test_a_packed_sequence_is_what_it_gives_alone_and_nan_stays_in_its_own() -> None:
    """To the bit, and with NaN in the sequence before."""
    args, options = packed([0, 40, 105], [0, 37, 133], 110, 140)
    dout = torch.randn(110, 2, 40).to(DEVICE)
    for x in (*args, dout):
        x[:37] = torch.nan
    for band in (BANDS["full"], BANDS["window"]):
        together = results("triton", args, options | band, dout)
        alone = [args[0][None, 40:105], *(x[None, 37:133] for x in args[1:])]
        out, lse, dq, dk, dv = results("triton", alone, dict(band), dout[None, 40:105])
        # without the gradient of lse, which is drawn by shape
        assert torch.equal(together[0][40:105], out[0])
        assert torch.equal(together[1][:, 40:105], lse[0])
        assert all(bool(x[105:].eq(0).all()) for x in (together[0], together[2]))
        assert all(bool(x[133:].eq(0).all()) for x in together[3:])
        assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


@pytest.mark.parametrize("band", ["causal", "window"])
def test_gradients_of_a_packed_sequence_are_those_alone(band: str) -> None:
    args, options = packed([0, 40, 105], [0, 37, 133], 105, 133)
    dout = torch.randn(105, 2, 40).to(DEVICE)
    for x in (*args, dout):
        x[:37] = torch.nan

    def grads(tensors: list[Tensor], upstream: Tensor, named: Options) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        with fastlm.use_backend("triton"):
            out = fastlm.attention(*leaves, **named, **BANDS[band])
            return list(torch.autograd.grad(out, leaves, upstream))

    together = grads(args, dout, options)
    alone = [args[0][None, 40:], *(x[None, 37:] for x in args[1:])]
    for a, b, first in zip(together, grads(alone, dout[None, 40:], {}), (40, 37, 37), strict=True):
        assert torch.equal(a[first:], b[0])


def test_rows_that_attend_to_nothing_pass_no_gradient() -> None:
    """Whatever gradient arrives there, NaN included."""
    q, k, v = (x.requires_grad_() for x in qkv((1, 60, 30, 2, 2)))
    with fastlm.use_backend("triton"):
        out, lse = fastlm.attention(q, k, v, mask="causal", return_lse=True)
        assert bool((out[:, :30] == 0).all()) and bool((lse[..., :30] == -torch.inf).all())
        dout, dlse = torch.ones_like(out), torch.ones_like(lse)
        dout[:, :30], dlse[..., :30] = torch.nan, torch.nan
        grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert bool((grads[0][:, :30] == 0).all()) and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1), (2, 0, 4, 2, 1), (2, 4, 0, 2, 1)], ids=str)
def test_nothing(shape: tuple[int, int, int, int, int], poisoned: None) -> None:
    for options in ({}, {"mask": "causal", "sink": torch.zeros(2).to(DEVICE)}):
        pair = [results(backend, qkv(shape), options) for backend in ("triton", "reference")]
        for got, want in zip(*pair, strict=True):
            torch.testing.assert_close(got, want)


def test_one_key(poisoned: None) -> None:
    """The gradient through a probability of 1 is exactly 0."""
    args = qkv((1, 3, 1, 2, 1))
    against_reference(args, {"mask": "causal"})
    leaves = [a.requires_grad_() for a in args]
    with fastlm.use_backend("triton"):
        dq, dk, _ = torch.autograd.grad(fastlm.attention(*leaves).square().sum(), leaves)
    assert bool((dq == 0).all()) and bool((dk == 0).all())


@pytest.mark.parametrize("share", [0, 100])
def test_order_of_launch_does_not_change_the_result(
    share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head at a time, or as many as do not divide them; and the second call."""
    args = qkv((1, 70, 70, 3, 3))
    want = results("triton", args, BANDS["causal"])
    assert all(map(torch.equal, want, results("triton", args, BANDS["causal"])))
    monkeypatch.setattr(triton_kernels, "L2_BYTES", share * 70 * (24 + 40) * 4 // 25)
    assert all(map(torch.equal, want, results("triton", args, BANDS["causal"])))


def test_refusals() -> None:
    for q, message in (
        (torch.zeros(1, 2, 1, 16, dtype=torch.float64), "not float64"),
        (torch.zeros(1, 2, 1, 300), "head sizes to 256, not 300"),
    ):
        with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match=message):
            fastlm.attention(*(q.to(DEVICE) for _ in range(3)))
    wide = torch.zeros(1, 2, 1, 160, device=DEVICE)
    for more in ({"dropout_p": 0.1}, {"bias": torch.zeros(2, 2, device=DEVICE)}):
        with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match="heads to 128 with"):
            fastlm.attention(wide, wide, wide, **more)
