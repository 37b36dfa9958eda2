"""fastlm.attention: against scores written out, in every dtype, mask, layout and option."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import AttnMask, dispatch, testing
from fastlm.philox import philox

BACKENDS = dispatch.ready("attention")


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition with the whole matrix of scores; [B, S, H, D] and a dense mask."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    rows, keys = s.shape[-2:]
    if slopes is not None:
        place = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
        s = s - slopes[..., None, None] * place.abs()
    if bias is not None:
        s = s + bias
    if keep is not None:
        s = s.masked_fill(~keep, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1)
    p = s.softmax(-1)
    p = p.masked_fill(lse[..., None] == -math.inf, 0.0)[..., :keys]
    if drop is not None:
        p = p * drop
    return (p @ v).transpose(1, 2), lse


def qkv(
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int, int, int] = (2, 9, 13, 4, 2),
    sizes: tuple[int, int] = (8, 8),
) -> list[Tensor]:
    batch, rows, keys, heads, key_heads = shape
    return [
        torch.randn(batch, rows, heads, sizes[0]).to(dtype),
        torch.randn(batch, keys, key_heads, sizes[0]).to(dtype),
        torch.randn(batch, keys, key_heads, sizes[1]).to(dtype),
    ]


def band(rows: int, keys: int, left: int = -1, right: int = -1) -> Tensor:
    """The sentence of the docstring, pair by pair."""
    delta = keys - rows
    return torch.tensor(
        [
            [
                (left < 0 or i + delta - j <= left) and (right < 0 or j - i - delta <= right)
                for j in range(keys)
            ]
            for i in range(rows)
        ],
        dtype=torch.bool,
    ).view(rows, keys)


MASKS: dict[str, tuple[dict, Callable[[int, int], Tensor | None]]] = {
    "full": ({}, lambda r, c: None),
    "causal": ({"mask": "causal"}, lambda r, c: band(r, c, right=0)),
    "window": ({"window": (3, 1)}, lambda r, c: band(r, c, 3, 1)),
    "left": ({"window": (2, None), "mask": "causal"}, lambda r, c: band(r, c, 2, 0)),
    "top-left": (
        {"mask": AttnMask.causal("top_left") & AttnMask.window(-1, 4)},
        lambda r, c: torch.ones(r, c, dtype=torch.bool).tril() & band(r, c, right=4),
    ),
    "prefix": (
        {"mask": AttnMask.prefix(4)},
        lambda r, c: band(r, c, right=0) | (torch.arange(c) < 4),
    ),
}


SHAPES = [(1, 1, 1, 1, 1), (2, 33, 33, 3, 3), (1, 150, 150, 4, 2)]


def against_pytorch(causal: bool, args: list[Tensor]) -> None:
    """Same as the docstring says, both passes; two head counts give PyTorch's enable_gqa."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastlm.attention(q, k, v, mask="causal" if causal else None)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    testing.check(ours, theirs, args)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_pytorch(backend, dtype, shape, causal, poisoned):
    with fastlm.use_backend(backend):
        against_pytorch(causal, qkv(dtype, shape))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_pytorch(shape, causal):
    with fastlm.use_backend("reference"):
        against_pytorch(causal, qkv(torch.float64, shape))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", testing.FLOATS)
@pytest.mark.parametrize("sizes", [(9, 13), (13, 9), (1, 5), (150, 140)])
def test_masks(mask, dtype, sizes, poisoned):
    """Out and lse with gradients through both; rows without keys; D of v unlike that of q."""
    options, dense = MASKS[mask]
    keep = dense(*sizes)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fastlm.attention(q, k, v, return_lse=True, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        alive = torch.ones(sizes[0], dtype=torch.bool) if keep is None else keep.any(-1)
        # softmax over nothing is NaN in PyTorch: such rows are computed unmasked, then dropped
        safe = None if keep is None else keep | ~alive[:, None]
        out, lse = plain(q, k, v, keep=safe)
        return out.where(alive[:, None, None], 0.0), lse.where(alive, 0.0)

    testing.check(ours, theirs, qkv(dtype, (2, *sizes, 4, 2), (8, 5)))


@pytest.mark.parametrize("dtype", testing.FLOATS)
@pytest.mark.parametrize("bias_shape", [(2, 4, 9, 13), (1, 4, 1, 13), (4, 9, 1), (13,)])
def test_every_option_at_once(dtype, bias_shape, poisoned):
    extra = [torch.rand(4).to(dtype), torch.randn(4).to(dtype), torch.randn(bias_shape).to(dtype)]
    common = {"softcap": 1.5, "scale": 0.7}

    def ours(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        names = ("alibi_slopes", "sink", "bias")
        options = dict(zip(names, given, strict=True)) | common
        return fastlm.attention(q, k, v, mask="causal", return_lse=True, **options)

    def theirs(*args: Tensor) -> tuple[Tensor, Tensor]:
        return plain(*args, keep=band(9, 13, right=0), **common)

    testing.check(ours, theirs, qkv(dtype) + extra)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(shape=(2, 4, 5, 2, 1), sizes=(3, 2)))
    slopes, sink, bias = (
        torch.rand(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 2), (2,), (4, 1))
    )

    def call(q, k, v, slopes, sink, bias):
        options = {"alibi_slopes": slopes, "sink": sink, "bias": bias, "softcap": 2.0}
        options |= {"dropout_p": 0.4, "seed": 3, "window": (2, 0), "return_lse": True}
        return fastlm.attention(q, k, v, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, slopes, sink, bias))


def test_options_in_float32_beside_float64():
    """Wide inputs are computed wide, whatever holds the options."""
    q, k, v = (x.requires_grad_() for x in qkv())
    options = [torch.rand(4), torch.randn(4), torch.randn(1, 4, 1, 13)]

    def run(options: list[Tensor]) -> list[Tensor]:
        slopes, sink, bias = options = [x.requires_grad_() for x in options]
        out, lse = fastlm.attention(
            q, k, v, alibi_slopes=slopes, sink=sink, bias=bias, return_lse=True
        )
        loss = out.sin().sum() + lse.cos().sum()
        return [out, lse, *torch.autograd.grad(loss, (q, k, v, *options))]

    narrow, wide = run(options), run([x.detach().double() for x in options])
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_alibi_per_batch_and_sink_without_keys():
    q, k, v = qkv(shape=(2, 6, 2, 4, 4))
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, 4, dtype=torch.float64)
    options = {"alibi_slopes": slopes, "sink": sink, "mask": "causal"}
    out, lse = fastlm.attention(q, k, v, return_lse=True, **options)
    want, want_lse = plain(q, k, v, slopes, sink, keep=band(6, 2, right=0))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert bool((out[:, :4] == 0).all()) and torch.equal(lse[1, :, 0], sink)
    got = torch.autograd.grad(lse.sum() + out.sum(), sink)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want_lse.sum() + want.sum(), sink)[0])


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("kind", testing.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_strides(layout, kind, backend):
    args = qkv(torch.float32, (2, 7, 7, 4, 2))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [testing.strided(x, kind) for x in (q, k, v)]
        if layout == "bshd":
            return fastlm.attention(*tensors, mask="causal")
        tensors = [testing.strided(x.transpose(1, 2), kind) for x in tensors]
        return fastlm.attention(*tensors, mask="causal", layout=layout).transpose(1, 2)

    with fastlm.use_backend(backend):
        testing.check(ours, lambda *a: plain(*a, keep=band(7, 7, right=0))[0], args)


PACKED_Q, PACKED_K = [0, 3, 3, 150, 155], [0, 5, 9, 150, 152]


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "causal"}, {"window": (4, 2)}, {"mask": AttnMask.prefix(2)}],
    ids=["full", "causal", "window", "prefix"],
)
@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_packed_is_each_sequence_alone(options, dtype, poisoned):
    """Different lengths of queries and keys, an empty sequence, rows behind the last one."""
    starts = {
        "cu_seqlens_q": torch.tensor(PACKED_Q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(PACKED_K, dtype=torch.int32),
    }
    slopes, sink = torch.rand(4), torch.randn(4)
    args = [torch.randn(160, 4, 8), torch.randn(157, 2, 8), torch.randn(157, 2, 6), slopes, sink]

    def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sink: Tensor) -> Tensor:
        extra = {"alibi_slopes": slopes, "sink": sink, "layout": "thd"}
        return fastlm.attention(q, k, v, **extra, **starts, **options)

    def theirs(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sink: Tensor) -> Tensor:
        extra = {"alibi_slopes": slopes, "sink": sink}
        parts = []
        for q0, q1, k0, k1 in zip(PACKED_Q, PACKED_Q[1:], PACKED_K, PACKED_K[1:], strict=False):
            part = [q[None, q0:q1], k[None, k0:k1], v[None, k0:k1]]
            parts.append(fastlm.attention(*part, **extra, **options)[0])
        return torch.cat([*parts, torch.zeros(5, 4, 6, dtype=q.dtype)])

    testing.check(ours, theirs, [a.to(dtype) for a in args])
    lse = fastlm.attention(*args[:3], layout="thd", **starts, return_lse=True)[1]
    assert lse.shape == (4, 160) and bool((lse[:, 155:] == -math.inf).all())


def test_nan_stays_in_its_sequence():
    starts = torch.tensor([0, 40, 100], dtype=torch.int32)
    options = {"layout": "thd", "cu_seqlens_q": starts, "cu_seqlens_k": starts, "mask": "causal"}

    def run(poison: bool) -> list[Tensor]:
        torch.manual_seed(3)
        args = [torch.randn(100, 2, 8) for _ in range(3)]
        dout = torch.randn(100, 2, 8)
        for x in (*args, dout):
            if poison:
                x[:40] = math.nan
        leaves = [a.requires_grad_() for a in args]
        out = fastlm.attention(*leaves, **options)
        return [out[40:], *(g[40:] for g in torch.autograd.grad(out, leaves, dout))]

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, poisoned)


def test_rows_that_attend_to_nothing_pass_no_gradient():
    """Whatever gradient arrives there, NaN included."""
    q, k, v = (x.requires_grad_() for x in qkv(shape=(1, 6, 3, 2, 2)))
    out, lse = fastlm.attention(q, k, v, mask="causal", return_lse=True)
    assert bool((out[:, :3] == 0).all()) and bool((lse[..., :3] == -math.inf).all())
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[:, :3], dlse[..., :3] = math.nan, math.nan
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert bool((grads[0][:, :3] == 0).all()) and all(bool(g.isfinite().all()) for g in grads)


def test_dropout_is_the_documented_mask():
    q, k, v = qkv(shape=(2, 5, 70, 4, 2))
    row = torch.arange(2 * 4 * 5).view(2, 4, 5, 1)
    words = torch.stack(philox(torch.tensor(-1), row, torch.arange(18)), -1).flatten(-2)[..., :70]
    drop = (words >= 0.3 * 2**32) / 0.7

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastlm.attention(q, k, v, window=(60, 0), dropout_p=0.3, seed=2**64 - 1)

    def theirs(*args: Tensor) -> Tensor:
        return plain(*args, keep=band(5, 70, 60, 0), drop=drop.to(args[0].dtype))[0]

    testing.check(ours, theirs, [q, k, v])
    assert abs(float((drop == 0).double().mean()) - 0.3) < 0.02


def test_dropout_seeds():
    q, k, v = qkv(torch.float32)

    def call(**options):
        return fastlm.attention(q, k, v, dropout_p=0.5, **options)

    assert torch.equal(call(seed=1), call(seed=torch.tensor(1)))
    assert not torch.equal(call(seed=1), call(seed=2))
    assert not torch.equal(call(), call())
    torch.manual_seed(5)
    first = call()
    torch.manual_seed(5)
    assert torch.equal(first, call())
    assert bool((fastlm.attention(q, k, v, dropout_p=1.0) == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, (2, 7, 7, 4, 2)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastlm.attention(q, k, v, mask="causal")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    none = (None,) * 8
    options = (0.3, -1, 0, 0.0, 0.0)
    with fastlm.use_backend(backend):
        tensors = [x.detach() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.fastlm.attention.default, (*tensors, *none, *options))
        out, lse = torch.ops.fastlm.attention(*tensors, *none, *options)
        saved = (torch.randn_like(out), None, *tensors, out, lse)
        torch.library.opcheck(
            torch.ops.fastlm.attention_backward.default,
            (*saved, *none, *options, [False, False, False]),
        )
        for rows in (7, 5):
            args = [x[:, :rows].detach().requires_grad_() for x in (q, k, v)]
            want, got = call(*args), compiled(*args)
            torch.testing.assert_close(got, want)
            for a, b in zip(
                torch.autograd.grad(got.square().sum(), args),
                torch.autograd.grad(want.square().sum(), args),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


def test_opcheck_and_compile_with_every_argument():
    q, k, v = qkv(torch.float32)
    slopes, sink, bias = torch.rand(4), torch.randn(4), torch.randn(1, 4, 1, 13)
    mask = AttnMask.intervals(torch.zeros(9, dtype=torch.int32), torch.arange(3, 12)).limits
    at = fastlm.ops.attention.mask.coordinates(9, 13, None, None, q.device)
    limits = mask(at, fastlm.ops.attention.mask.Limits())
    lo, hi = limits.lo, limits.hi
    given = (lo, hi, None, None, slopes, sink, bias, torch.tensor(4), 0.3, 5, -1, 2.0, 0.1)
    torch.library.opcheck(torch.ops.fastlm.attention.default, (q, k, v, *given))
    out, lse = torch.ops.fastlm.attention(q, k, v, *given)
    saved = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    op = torch.ops.fastlm.attention_backward.default
    torch.library.opcheck(op, (*saved, *given, [True, True, True]))

    def call(q, k, v, sink, ids):
        documents = AttnMask.causal() & AttnMask.documents(ids)
        out = fastlm.attention(
            q, k, v, mask=documents, sink=sink, softcap=3.0, dropout_p=0.2, seed=7
        )
        return out.square().sum()

    ids = torch.tensor([0, 0, 0, 1, 1, 4, 4, 4, 4])
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k[:, :9], v[:, :9], sink)]
    got = torch.autograd.grad(compiled(*leaves, ids), leaves)
    for a, b in zip(got, torch.autograd.grad(call(*leaves, ids), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_number_of_packed_sequences_stays_dynamic():
    """mark_dynamic raises where the trace makes a constant of a size."""
    torch._dynamo.reset()
    x, starts = torch.randn(9, 2, 8), torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    torch._dynamo.mark_dynamic(starts, 0)

    def call(x, starts):
        return fastlm.attention(x, x, x, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=starts)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, starts), call(x, starts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_call_retain_graph_and_double_backward(backend):
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, (1, 5, 5, 2, 2)))
    with fastlm.use_backend(backend):
        out = fastlm.attention(q, k, v)
        first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        again = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        out = fastlm.attention(q, k, v)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_modes():
    q, k, v = qkv(torch.float32)
    want = fastlm.attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(fastlm.attention(q, k, v), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.attention(q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1), (2, 0, 4, 2, 1), (2, 4, 0, 2, 1)])
def test_empty(shape, poisoned):
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, shape))
    for options in ({}, {"mask": "causal", "sink": torch.zeros(2)}):
        out, lse = fastlm.attention(q, k, v, return_lse=True, **options)
        grads = torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v))
        assert out.shape == q.shape and bool((out == 0).all())
        assert all(bool((g == 0).all()) for g in grads)


def test_memory_does_not_grow_with_the_square():
    """8192 x 8192 scores would be 256 MiB; no tensor of the op may come near that."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel() * x.element_size())
            return result

    q, k, v = (torch.randn(1, 8192, 1, 4) for _ in range(3))
    given = fastlm.ops.attention.reference.Options(*(None,) * 8, 0.5, 64, 0, 0.0, 0.0)
    with Watch():
        out, lse = fastlm.ops.attention.reference.forward(q, k, v, given)
        fastlm.ops.attention.reference.backward(
            out, None, q, k, v, lse, given, (False, False, False)
        )
    assert largest <= 8 << 20


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, keys", [(6, 6), (3, 8), (8, 3)])
def test_mask_bands(rows, keys):
    for left, right in [(-1, 0), (2, 1), (0, None), (None, None), (1, 5)]:
        want = band(rows, keys, -1 if left is None else left, -1 if right is None else right)
        assert torch.equal(AttnMask.window(left, right).to_dense(rows, keys), want)
    assert torch.equal(AttnMask.causal().to_dense(rows, keys), band(rows, keys, right=0))
    square = torch.ones(rows, keys, dtype=torch.bool).tril()
    assert torch.equal(AttnMask.causal("top_left").to_dense(rows, keys), square)


def test_mask_documents():
    ids = torch.tensor([[5, 5, 5, 2, 2, 7], [0, 1, 1, 1, 0, 0]])
    run = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
    want = run[:, None, :, None] == run[:, None, None, :]
    assert torch.equal(AttnMask.documents(ids).to_dense(6, 6), want)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)  # the last token is in no document
    want[0, 0, 5] = False
    for mask in (AttnMask.documents(starts), AttnMask.documents(cu_seqlens=starts)):
        assert torch.equal(mask.to_dense(6, 6), want[0, 0])
    with pytest.raises(ValueError, match="documents must be used on as many queries as keys"):
        AttnMask.documents(ids).to_dense(5, 6)


def test_mask_intersection_and_prefix():
    prefix = AttnMask.prefix(torch.tensor([1, 4]))
    dense = prefix.to_dense(5, 6)
    for b, n in enumerate((1, 4)):
        assert torch.equal(dense[b, 0], band(5, 6, right=0) | (torch.arange(6) < n))
    both = prefix & AttnMask.window(2, 3) & AttnMask.causal()
    assert torch.equal(both.to_dense(5, 6), dense & band(5, 6, 2, 0))


def test_mask_from_dense():
    lo, hi = torch.randint(-3, 9, (2, 3, 7, 1)), torch.randint(-3, 12, (2, 3, 7, 1))
    key = torch.arange(9)
    dense = (key >= lo) & (key < hi)
    assert torch.equal(AttnMask.from_dense(dense).to_dense(7, 9), dense)
    intervals = AttnMask.intervals(lo[..., 0], hi[..., 0])
    assert torch.equal(intervals.to_dense(7, 9), dense)
    q, k, v = qkv(shape=(2, 7, 9, 3, 3))
    q = q.requires_grad_()
    out, lse = fastlm.attention(q, k, v, mask=intervals, return_lse=True)
    want, want_lse = plain(q, k, v, keep=dense)
    alive = dense.any(-1).transpose(1, 2)
    torch.testing.assert_close(out[alive], want[alive])
    torch.testing.assert_close(lse, want_lse)
    assert bool((out[~alive] == 0).all())
    dense[1, 2, 4] = torch.tensor([True, False, True] + [False] * 6)
    with pytest.raises(
        ValueError, match=r"one interval of keys per row, got more in row \[1, 2, 4\]"
    ):
        AttnMask.from_dense(dense)


def test_packed_documents_and_prefixes():
    """Prefixes count from the start of each sequence, documents over the whole packing."""
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    tensors = [torch.randn(10, 2, 4, dtype=torch.float64) for _ in range(3)]
    options = {"layout": "thd", "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    mask = AttnMask.documents(ids) & AttnMask.prefix(torch.tensor([1, 3], dtype=torch.int32))
    got = fastlm.attention(*tensors, mask=mask, **options)
    sequence = torch.tensor([0] * 4 + [1] * 6)
    key, first = torch.arange(10), starts[sequence][:, None]
    keep = (key <= key[:, None]) | (key - first < torch.tensor([1, 3])[sequence][:, None])
    keep &= (ids[:, None] == ids) & (sequence[:, None] == sequence)
    torch.testing.assert_close(got, plain(*(t[None] for t in tensors), keep=keep)[0][0])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 5, 2, 9)}, r"k.shape\[-1\] must be 8 \(as q\), got 9"),
        ({"v": torch.zeros(2, 6, 2, 8)}, r"length and heads of v must be \[5, 2\] \(as k\)"),
        ({"k": torch.zeros(1, 5, 2, 8)}, r"k.shape\[0\] must be 2 \(as q\), got 1"),
        ({"q": torch.zeros(2, 5, 3, 8)}, r"heads of q must be a multiple of 2 \(as k\), got 3"),
        ({"q": torch.zeros(5, 4, 8)}, r"q must be \[\*, \*, \*, \*\] \(\[B, S, H, D\]\)"),
        ({"layout": "sbhd"}, "layout must be one of"),
        ({"mask": "full"}, "mask must be None, 'causal' or an AttnMask, got 'full'"),
        ({"mask": torch.ones(5, 5)}, "got Tensor; a tensor goes through AttnMask.from_dense"),
        ({"window": (-2, 0)}, r"window\[0\] must be >= 0, or -1 or None for no limit, got -2"),
        ({"window": 256}, r"window must be \(left, right\), got 256"),
        ({"softcap": -1.0}, "softcap must be >= 0"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"sink": torch.zeros(2)}, r"sink must be \[4\], got \[2\]"),
        ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \[4\] or \[2, 4\], got \[2\]"),
        ({"bias": torch.zeros(5, 4)}, r"bias must be \[2, 4, 5, 5\] or broadcast to it"),
        ({"cu_seqlens_q": torch.zeros(2).int()}, "cu_seqlens_q must be None in layout 'bshd'"),
        (
            {"mask": AttnMask.intervals(*torch.zeros(2, 3, 5).long())},
            r"mask must be for \[B, H, Sq\] = \[2, 4, 5\], got \[3, 1, 5\]",
        ),
    ],
)
def test_rejects(change, message):
    given = {
        "q": torch.zeros(2, 5, 4, 8),
        "k": torch.zeros(2, 5, 2, 8),
        "v": torch.zeros(2, 5, 2, 8),
    }
    with pytest.raises(ValueError, match=message):
        fastlm.attention(**(given | change))


def test_rejects_types_and_bad_packing():
    q = torch.zeros(2, 5, 4, 8)
    with pytest.raises(TypeError, match=r"k must be float32 \(as q\), got float64"):
        fastlm.attention(q, q.double(), q)
    x = torch.zeros(6, 2, 4)
    good = torch.tensor([0, 6], dtype=torch.int32)

    def call(starts):
        fastlm.attention(x, x, x, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=good)

    with pytest.raises(TypeError, match="cu_seqlens_q must be a tensor, got NoneType"):
        call(None)
    with pytest.raises(TypeError, match="must be int32, got int64; call .int\\(\\) once per batch"):
        call(good.long())
    with pytest.raises(ValueError, match=r"non-decreasing from 0 to at most 6, got \[0, 7\]"):
        call(torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"equally long, got \[2\] and \[3\]"):
        call(torch.tensor([0, 3, 6], dtype=torch.int32))
