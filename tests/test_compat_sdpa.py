"""fastlm.compat.sdpa: torch's function, case by case, on every backend of fastlm.attention."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastlm
from fastlm import dispatch, testing
from fastlm.compat import sdpa
from fastlm.nn import functional

# None: the usual choice; "torch" has few of the options
BACKENDS = (None, *(b for b in dispatch.ready("attention") if b != "torch"))
every_backend = on_backends(*BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", testing.FLOATS)


def theirs(*args: Any, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **options)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s).to(dtype) for s in shapes]


def against_torch(args: list[Any], **options: Any) -> None:
    ours, want = sdpa(*args, **options), theirs(*args, **options)
    assert ours.shape == want.shape and ours.dtype == want.dtype
    testing.check(lambda *a: sdpa(*a, **options), lambda *a: theirs(*a, **options), args)


RANKS = {
    "2-D": ((5, 8), (7, 8), (7, 6), {}),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8), {}),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), {}),
    "5-D": ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 6), {}),
    "broadcast": ((2, 1, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6), {}),
    "one key head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6), {}),
    "one query": ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "one key": ((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 1, 8), {}),
    "GQA": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), {"enable_gqa": True}),
    "GQA equal heads": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), {"enable_gqa": True}),
    "GQA unequal heads": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8), {"enable_gqa": True}),
    "GQA 3-D": ((4, 5, 8), (2, 7, 8), (2, 7, 6), {"enable_gqa": True}),
    "GQA 5-D": ((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 6), {"enable_gqa": True}),
    "other ranks": ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8), {}),
    "no query": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "no batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8), {}),
    "no head": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8), {}),
    "no value": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0), {}),
    "no feature": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4), {}),
}


@every_backend
@every_dtype
@pytest.mark.parametrize("rank", RANKS)
def test_shapes(backend, dtype, rank, poisoned):
    *shapes, options = RANKS[rank]
    args = tensors(*shapes, dtype=dtype)
    if rank != "one key":
        against_torch(args, **options)
        return
    # the gradient of q and k is 0, and what p = exp(s - lse) leaves of it has no scale
    leaves = [x.requires_grad_() for x in args]
    grads = [torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (sdpa, theirs)]
    torch.testing.assert_close(*grads)


@every_backend
@pytest.mark.parametrize("rank", ["2-D", "4-D", "5-D", "GQA", "one query", "broadcast"])
@pytest.mark.parametrize("swap", [False, True])
def test_causal_is_top_left(backend, rank, swap, poisoned):
    """More keys than queries and more queries than keys."""
    q, k, v, options = RANKS[rank]
    if swap:
        rows, keys = k[-2], q[-2]
        q, k, v = (*q[:-2], rows, q[-1]), (*k[:-2], keys, k[-1]), (*v[:-2], keys, v[-1])
    against_torch(tensors(q, k, v), is_causal=True, scale=0.7, **options)


def test_no_key():
    """Nothing to attend to: zeros, and no gradient."""
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8))
    for backend in BACKENDS:
        with fastlm.use_backend(backend):
            out = sdpa(q.requires_grad_(), k, v)
            assert out.shape == (2, 3, 5, 8) and not out.any()
            assert not torch.autograd.grad(out.sum(), q)[0].any()


MASKS: dict[str, Callable[[], Tensor]] = {
    "runs": lambda: torch.ones(20, 30, dtype=torch.bool).tril(5).triu(-4),
    "scattered": lambda: torch.rand(20, 30) < 0.6,
    "each": lambda: torch.rand(2, 3, 20, 30) < 0.6,
    "padding": lambda: (torch.arange(30) < torch.tensor([30, 11])[:, None])[:, None, None],
    "holes": lambda: (torch.rand(2, 30) < 0.6)[:, None, None],
    "rows": lambda: torch.rand(20, 1) < 0.6,
    "heads": lambda: torch.rand(3, 20, 30) < 0.6,
    "open": lambda: torch.ones(1, 1, dtype=torch.bool),
}


@every_backend
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(backend, name, kind, poisoned):
    """Booleans with and without runs, and floats with their gradient; empty rows give 0."""
    mask = MASKS[name]()
    args = tensors((2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8))
    if kind == "float":
        mask = torch.randn(mask.shape).masked_fill(~mask, -math.inf)
    if name in ("rows", "open"):  # a constant in a row has no gradient
        against_torch(args, attn_mask=mask)
    else:
        against_torch([*args, mask])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_mask_of_half_inputs(backend, dtype):
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype=dtype)
    mask = torch.randn(5, 7)
    got = sdpa(q, k, v, mask)
    exact = theirs(q.double(), k.double(), v.double(), mask.double())
    plain = theirs(q, k, v, mask)
    allowed = 2 * testing.error(plain.double(), exact) + 8 * torch.finfo(dtype).eps
    assert got.dtype == dtype and testing.error(got.double(), exact) <= allowed


@every_backend
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_biases_of_torch(backend, sizes, bias):
    """A row without keys gives 0, where torch warns of NaN."""
    rows, keys = sizes
    args = tensors((2, 3, rows, 8), (2, 3, keys, 8), (2, 3, keys, 6))
    against_torch(args, attn_mask=bias(rows, keys))
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        sdpa(*args, attn_mask=bias(rows, keys), is_causal=True)


def test_masks_become_runs_only_where_that_is_cheap(monkeypatch):
    """Seen from the arguments of fastlm.attention."""
    seen: list[dict[str, Any]] = []

    def spy(*args: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return fastlm.attention(*args, **options)

    monkeypatch.setattr(functional, "attention", spy)
    q, k, v = tensors((2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8))
    runs = torch.ones(20, 30, dtype=torch.bool).tril(5)
    with fastlm.use_backend("reference"):
        sdpa(q, k, v, runs)
        sdpa(q, k, v, torch.ones(2, 1, 1, 30, dtype=torch.bool))
        assert all(c["mask"] is not None and c["bias"] is None for c in seen) and len(seen) == 2
        seen.clear()
        sdpa(q, k, v, runs.expand(2, 3, 20, 30))  # as many elements as scores
        sdpa(q, k, v, MASKS["scattered"]())
        sdpa(q, k, v, runs.float())
        assert all(c["mask"] is None and c["bias"] is not None for c in seen) and len(seen) == 3
        seen.clear()
        sdpa(q, q, q, is_causal=True)
        assert seen[0]["mask"] is not None and seen[0]["bias"] is None


def test_goes_to_torch_where_no_kernel_takes_it(monkeypatch):
    """Not to the reference, which is slower."""
    calls = []
    monkeypatch.setattr(functional, "attention", lambda *a, **o: calls.append(o))
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    monkeypatch.setattr(dispatch, "preferred", lambda *a: "reference")
    torch.testing.assert_close(sdpa(q, k, v), theirs(q, k, v))
    mask = torch.rand(5, 7) < 0.5
    torch.testing.assert_close(sdpa(q, k, v, mask), theirs(q, k, v, mask))
    assert not calls
    monkeypatch.setattr(dispatch, "preferred", lambda *a: "cpu")
    torch.testing.assert_close(sdpa(q, k, v), theirs(q, k, v))  # too small to gain
    assert not calls
    q, k, v = tensors((2, 8, 300, 64), (2, 8, 400, 64), (2, 8, 400, 64))
    with pytest.raises(AssertionError):
        sdpa(q, k, v)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["full", "causal", "runs", "scattered", "padding", "float"])
def test_large_calls_by_the_usual_choice(dtype, name, poisoned):
    """Large enough for a kernel of ours, where there is one."""
    q, k, v = tensors((2, 4, 300, 64), (2, 4, 310, 64), (2, 4, 310, 64), dtype=dtype)
    place = torch.arange(310)
    options: dict[str, Any] = {
        "full": {},
        "causal": {"is_causal": True},
        "runs": {"attn_mask": torch.ones(300, 310, dtype=torch.bool).tril(5).triu(-70)},
        "scattered": {"attn_mask": torch.rand(300, 310) < 0.6},
        "padding": {"attn_mask": (place < torch.tensor([310, 11])[:, None])[:, None, None]},
        "float": {"attn_mask": torch.randn(300, 310)},
    }[name]
    floats = options["attn_mask"] if name == "float" else None

    def call(function: Any) -> Any:
        def run(*args: Tensor) -> Tensor:
            mask = {} if floats is None else {"attn_mask": floats.to(args[0].dtype)}
            return function(*args, **(options | mask))

        return run

    testing.check(call(sdpa), call(theirs), [q, k, v])


@every_backend
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_strides(backend, kind):
    args = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 7))
    testing.check(lambda *a: sdpa(*(testing.strided(x, kind) for x in a)), theirs, args)
    q, k, v = (x[:1, :1].expand(2, 3, *x.shape[2:]) for x in args[:3])
    torch.testing.assert_close(sdpa(q, k, v), theirs(q, k, v))


@every_backend
def test_dropout(backend):
    """The generator decides; the mean is that of no dropout; 1 drops everything."""
    q, k = tensors((4, 8, 64, 8), (4, 8, 64, 8))
    ones = torch.ones(4, 8, 64, 8)
    torch.manual_seed(3)
    first = sdpa(q, k, ones, dropout_p=0.25)
    assert not torch.equal(first, sdpa(q, k, ones, dropout_p=0.25))
    torch.manual_seed(3)
    assert torch.equal(first, sdpa(q, k, ones, dropout_p=0.25))
    assert abs(float(first.mean()) - 1) < 0.02
    assert not sdpa(q, k, ones, dropout_p=1.0).any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", dtype=dtype):
        assert sdpa(q, k, v, mask).dtype == theirs(q, k, v, mask).dtype == dtype
        assert sdpa(q, k.to(dtype), v).dtype == theirs(q, k.to(dtype), v).dtype
        if backend != "cpu":  # it has no float64
            assert sdpa(q.double(), k.double(), v.double()).dtype == torch.float64


X = torch.zeros(2, 4, 5, 8)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "1-D": ((torch.zeros(8),) * 3, {}),
    "heads": ((X, X[:, :2], X[:, :2]), {}),
    "GQA heads": ((X, X[:, :3], X[:, :3]), {"enable_gqa": True}),
    "GQA 2-D": ((X[0, 0],) * 3, {"enable_gqa": True}),
    "head size": ((X, X[..., :7], X), {}),
    "dtype": ((X, X.double(), X), {}),
    "integers": ((X.int(),) * 3, {}),
    "float8": ((X.to(torch.float8_e4m3fn),) * 3, {}),
    "no tensor": ((1, X, X), {}),
    "device": ((X, X.to("meta"), X), {}),
    "mask dtype": ((X, X, X, torch.ones(5, 5).int()), {}),
    "mask double": ((X, X, X, torch.ones(5, 5).double()), {}),
    "mask shape": ((X, X, X, torch.ones(5, 6)), {}),
    "mask batch": ((X, X, X, torch.ones(3, 4, 5, 5)), {}),
    "mask 5-D": ((X, X, X, torch.ones(1, 2, 4, 5, 5)), {}),
    "mask 1-D": ((X, X, X, torch.ones(5)), {}),
    "mask list": ((X, X, X, [1]), {}),
    "dropout": ((X, X, X), {"dropout_p": 2.0}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_errors_are_those_of_torch(name, backend):
    args, options = WRONG[name]
    with pytest.raises(Exception) as want:  # noqa: B017
        theirs(*args, **options)
    with fastlm.use_backend(backend), pytest.raises(type(want.value)) as got:
        sdpa(*args, **options)
    assert str(got.value) == str(want.value)


def test_key_and_value_of_other_lengths():
    """PyTorch's CPU kernel takes such a call, and reads past the end."""
    with pytest.raises(RuntimeError, match="key and value must be equally long"):
        sdpa(X, X, X[:, :, :4])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": torch.rand(5, 7) < 0.7}],
    ids=["full", "causal", "mask"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_compile_and_transforms(backend, options):
    args = [x.requires_grad_() for x in tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))]

    def call(*a: Tensor) -> Tensor:
        return sdpa(*a, **options)

    with fastlm.use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        got, want = compiled(*args), call(*args)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(o.sin().sum(), args) for o in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    mapped = torch.func.vmap(call)(*(x[None].expand(2, *x.shape) for x in args))
    torch.testing.assert_close(mapped[1], call(*args))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_in_the_place_of_pytorchs_own(monkeypatch):
    """A program may put it there: calls that are PyTorch's still get PyTorch's answer."""
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6))
    cases = ({}, {"attn_mask": causal_upper_left(5, 7)}, {"attn_mask": causal_lower_right(5, 7)})
    want = [F.scaled_dot_product_attention(q, k, v, **options) for options in cases]
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    for options, expected in zip(cases, want, strict=True):
        got = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        F.scaled_dot_product_attention(q, k, v, causal_upper_left(5, 7), is_causal=True)


def test_dynamic_sizes_stay_dynamic():
    """mark_dynamic raises where the trace makes a constant of a size."""
    torch._dynamo.reset()
    args = tensors((4, 2, 5, 8), (4, 2, 7, 8), (4, 2, 7, 8))
    for x in args:
        torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(sdpa, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), sdpa(*args))


def test_signature_and_lazy_import():
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa"
    parameters = inspect.signature(sdpa).parameters
    assert " ".join(parameters) == names
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False]
    script = (
        "import sys, fastlm, fastlm.compat\n"
        "new = [m for m in sys.modules if m.startswith('fastlm.compat.')]\n"
        "assert not new, new\n"
        "from fastlm.compat import sdpa, flash_attn\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)
