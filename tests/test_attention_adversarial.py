"""What breaks attention: every pair of options, sizes and values at their limits, properties.

Every backend that is ready here runs both passes, where it does not refuse the call.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from backends import REFUSED, on_backends
from test_attention import band, plain
from torch import Tensor

import fastlm
from fastlm import AttnMask, dispatch, testing
from fastlm.philox import philox

BACKENDS = dispatch.ready("attention")
every_backend = on_backends(*BACKENDS)


# ---- pairs of options ----------------------------------------------------------------------------

OPTIONS = (
    "causal", "window", "documents", "prefix", "gqa", "values", "softcap", "alibi", "sink", "bias",
    "dropout", "lse", "packed", "scale",
)  # fmt: skip
PAIRS = [(), *itertools.combinations(OPTIONS, 1), *itertools.combinations(OPTIONS, 2)]
LENGTHS_Q, LENGTHS_K = (5, 0, 9, 7), (8, 3, 9, 3)
SEED, DROP = 11, 0.3


@dataclass
class Case:
    """One call: the tensors, the options of ours, and where each sequence lies."""

    chosen: tuple[str, ...]
    dtype: torch.dtype
    args: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        packed, self.square = "packed" in self.chosen, "documents" in self.chosen
        self.lengths = [(19, 23)]
        if packed:
            self.lengths = list(zip(LENGTHS_Q, LENGTHS_K, strict=True))
        if self.square:
            self.lengths = [(n, n) for n, _ in self.lengths]
        self.rows, self.keys = (sum(n) for n in zip(*self.lengths, strict=True))
        heads, batch = (2 if "gqa" in self.chosen else 4), (1 if packed else 2)
        shapes = {
            "q": (batch, self.rows, 4, 8),
            "k": (batch, self.keys, heads, 8),
            "v": (batch, self.keys, heads, 5 if "values" in self.chosen else 8),
            "alibi_slopes": (4,),
            "sink": (4,),
            "bias": (1, 4, self.rows, self.keys),
        }
        wanted = {"alibi_slopes": "alibi", "sink": "sink", "bias": "bias"}
        for name, shape in shapes.items():
            if wanted.get(name, name) in ("q", "k", "v", *self.chosen):
                value = torch.rand(shape) if name == "alibi_slopes" else torch.randn(shape)
                self.args.append(value.to(self.dtype))
                self.names.append(name)
        self.ids = torch.arange(self.rows) // 4
        self._collect(packed)

    def _collect(self, packed: bool) -> None:
        mask: AttnMask | None = None
        for name, term in (
            ("causal", AttnMask.causal()),
            ("documents", AttnMask.documents(self.ids)),
            ("prefix", AttnMask.prefix(3)),
        ):
            if name in self.chosen:
                mask = term if mask is None else mask & term
        self.options = {"mask": mask, "return_lse": True, "seed": SEED}
        for name, value in (
            ("window", {"window": (6, 4)}),
            ("softcap", {"softcap": 1.5}),
            ("scale", {"scale": -0.4}),
            ("dropout", {"dropout_p": DROP}),
        ):
            if name in self.chosen:
                self.options |= value
        if packed:
            starts = [
                torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*self.lengths, strict=True)
            ]
            names = ("cu_seqlens_q", "cu_seqlens_k")
            self.options |= {n: s.int() for n, s in zip(names, starts, strict=True)}
            self.options["layout"] = "thd"

    def ours(self, *args: Tensor) -> list[Tensor]:
        given = dict(zip(self.names, args, strict=True))
        packed = "packed" in self.chosen
        qkv = [given.pop(n)[0] if packed else given.pop(n) for n in "qkv"]
        out, lse = fastlm.attention(*qkv, **given, **self.options)
        out, lse = (out[None], lse[None]) if packed else (out, lse)
        return [out, lse.masked_fill(lse == -math.inf, 0.0)] if "lse" in self.chosen else [out]

    def keep(self, rows: int, keys: int, first: int) -> Tensor:
        chosen = self.chosen
        keep = torch.ones(rows, keys, dtype=torch.bool)
        if "causal" in chosen:
            keep &= band(rows, keys, right=0)
        if "window" in chosen:
            keep &= band(rows, keys, 6, 4)
        if "prefix" in chosen:
            keep &= band(rows, keys, right=0) | (torch.arange(keys) < 3)
        if "documents" in chosen:
            ids = self.ids[first : first + rows]
            keep &= ids[:, None] == ids
        return keep

    def drop(self) -> Tensor:
        """The documented mask over the whole call, as factors [B, H, rows, keys]."""
        batch = self.args[0].shape[0]
        row = torch.arange(batch * 4 * self.rows).view(batch, 4, self.rows, 1)
        quads = torch.arange((self.keys + 3) // 4)
        words = torch.stack(philox(torch.tensor(SEED), row, quads), -1).flatten(-2)
        return (words[..., : self.keys] >= DROP * 2**32) / (1 - DROP)

    def theirs(self, *args: Tensor) -> list[Tensor]:
        given = dict(zip(self.names, args, strict=True))
        q, k, v = (given.pop(n) for n in "qkv")
        bias, drop = given.pop("bias", None), self.drop().to(q.dtype)
        options = {n: self.options[n] for n in ("softcap", "scale") if n in self.options}
        outs, lses, at, start = [], [], 0, 0
        for rows, keys in self.lengths:
            i, j = slice(at, at + rows), slice(start, start + keys)
            keep = self.keep(rows, keys, at)
            alive = keep.any(-1) | ("sink" in given)
            out, lse = plain(
                q[:, i], k[:, j], v[:, j], given.get("alibi_slopes"), given.get("sink"),
                None if bias is None else bias[:, :, i, j], keep=keep | ~alive[:, None],
                drop=drop[:, :, i, j] if "dropout" in self.chosen else None, **options,
            )  # fmt: skip
            outs.append(out.where(alive[:, None, None], 0.0))
            lses.append(lse.where(alive, 0.0))
            at, start = at + rows, start + keys
        return [torch.cat(outs, 1), torch.cat(lses, -1)][: 2 if "lse" in self.chosen else 1]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", OPTIONS)
def test_every_pair_of_options(backend, dtype, first, poisoned):
    """Outputs and every gradient, by the rule of twice plain PyTorch's error."""
    for chosen in PAIRS:
        if first not in chosen[:1] and (chosen or first != OPTIONS[0]):
            continue
        case = Case(chosen, dtype)
        try:
            testing.check(case.ours, case.theirs, case.args)
        except AssertionError as error:
            raise AssertionError(f"{' + '.join(chosen) or 'no option'}: {error}") from None
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise


@pytest.mark.parametrize("chosen", PAIRS, ids="+".join)
def test_backends_agree_in_float64(chosen):
    """The reference against the definition: no room for an error that rounding hides."""
    case = Case(chosen, torch.float64)
    leaves = [x.requires_grad_() for x in case.args]
    found = []
    for call in (case.ours, case.theirs):
        outs = call(*leaves)
        upstream = [o.detach().cos() for o in outs]
        found.append([*outs, *torch.autograd.grad(outs, leaves, upstream)])
    torch.testing.assert_close(*found)


# ---- sizes ---------------------------------------------------------------------------------------


def qkv(
    rows: int = 9, keys: int = 9, heads: int = 2, size: int = 8, batch: int = 2
) -> list[Tensor]:
    shapes = ((batch, rows, heads, size), (batch, keys, heads, size), (batch, keys, heads, size))
    return [torch.randn(s) for s in shapes]


@every_backend
@pytest.mark.parametrize("empty", ["rows", "keys", "batch", "rows and keys"])
@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"window": (3, 0), "softcap": 2.0}])
def test_empty(backend, empty, options, poisoned):
    q, k, v = qkv(
        rows=0 if "rows" in empty else 9, keys=0 if "keys" in empty else 7,
        batch=0 if empty == "batch" else 2,
    )  # fmt: skip
    sink = torch.randn(2, requires_grad=True)
    leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out, lse = fastlm.attention(*leaves, return_lse=True, **options)
    assert out.shape == q.shape and lse.shape == (q.shape[0], 2, q.shape[1])
    assert not out.any() and bool((lse == -math.inf).all())
    grads = torch.autograd.grad((out.sum() + lse.exp().sum()), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))
    out = fastlm.attention(*leaves, sink=sink, **options)
    grads = torch.autograd.grad(out.sum(), [*leaves, sink])
    assert not any(g.any() for g in grads)


@every_backend
@pytest.mark.parametrize("size", [1, 3, 7, 9, 17, 33, 65, 100, 129, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(backend, size, dtype, poisoned):
    args = [x.to(dtype) for x in qkv(5, 11, 2, size, 1)]
    args[2] = torch.randn(1, 11, 2, size // 2 + 1).to(dtype)
    testing.check(
        lambda *a: fastlm.attention(*a, mask="causal"),
        lambda *a: plain(*a, keep=band(5, 11, right=0))[0],
        args,
    )


@every_backend
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 300), (300, 1), (129, 257), (64, 64), (65, 63)])
@pytest.mark.parametrize("options", [{}, {"window": (17, 5)}])
def test_lengths(backend, rows, keys, options, poisoned):
    """Around the edges of any tile, in one dtype that leaves no room."""
    keep = band(rows, keys, *options.get("window", (-1, -1)))
    alive = keep.any(-1)

    def theirs(*args: Tensor) -> Tensor:
        out = plain(*args, keep=keep | ~alive[:, None])[0]
        return out.where(alive[:, None, None], 0.0)

    def ours(*args: Tensor) -> Tensor:
        return fastlm.attention(*args, **options)

    q, k, v = qkv(rows, keys, size=16, batch=1)
    if keys > 1:
        testing.check(ours, theirs, [q, k, v])
        return
    # the gradient of q and k is 0, and what rounding leaves of it has no scale to measure in
    testing.check(
        lambda v: ours(q.to(v.dtype), k.to(v.dtype), v),
        lambda v: theirs(q.to(v.dtype), k.to(v.dtype), v),
        [v],
    )
    leaves = [x.requires_grad_() for x in (q, k)]
    grads = torch.autograd.grad(ours(q, k, v).sum(), leaves)
    assert all(bool((g.abs() <= 1e-4).all()) for g in grads)


@every_backend
def test_heads_of_any_group(backend, poisoned):
    for heads, key_heads in ((1, 1), (6, 1), (6, 2), (6, 3), (12, 4), (7, 7)):
        q, k, v = (
            torch.randn(2, n, h, 8) for n, h in ((9, heads), (11, key_heads), (11, key_heads))
        )
        testing.check(
            lambda *a: fastlm.attention(*a, mask="causal"),
            lambda *a: plain(*a, keep=band(9, 11, right=0))[0],
            [q, k, v],
        )


@every_backend
def test_more_elements_than_an_int32_counts(backend):
    """Keys at the end of 2^31 elements, and views whose count passes it: nothing is copied."""
    keys, size = 2**26 + 5, 32
    base = torch.empty(1, keys, 1, size)  # its pages are not touched
    base[:, -64:] = torch.randn(1, 64, 1, size)
    q = torch.randn(1, 3, 1, size)
    for k in (base, base[:, -1:].expand(1, keys, 1, size)):
        got = fastlm.attention(q, k, k, window=(4, 0))
        part = k[:, -64:].clone()
        torch.testing.assert_close(got, fastlm.attention(q, part, part, window=(4, 0)))


# ---- values --------------------------------------------------------------------------------------


@every_backend
def test_scores_beyond_float16(backend):
    """Products of float16 that overflow it: sums are float32."""
    args = [(x * 200).half() for x in qkv(size=64)[:2]] + [torch.randn(2, 9, 2, 64).half()]
    assert not bool((args[0].transpose(1, 2) @ args[1].permute(0, 2, 3, 1)).isfinite().all())
    leaves = [x.requires_grad_() for x in args]
    out = fastlm.attention(*leaves)
    want = plain(*(a.detach().double() for a in args))[0]
    assert testing.error(out.detach().double(), want) <= torch.finfo(torch.float16).eps * 4
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(backend, dtype):
    """exp underflows for all but one key; scores of -1e4 in every row; one-hot softmax."""
    q, k, v = (x.to(dtype) for x in qkv(size=16))
    for factor in (100.0, -100.0):
        args = [q * factor, k, v]
        with torch.no_grad():
            testing.check(fastlm.attention, lambda *a: plain(*a)[0], args)
        leaves = [x.requires_grad_() for x in args]
        out = fastlm.attention(*leaves)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))
    bias = torch.full((9, 9), -1e4, dtype=dtype)
    got = fastlm.attention(q, k, v, bias=bias)
    want = plain(*(x.double() for x in (q, k, v)), bias=bias.double())[0]
    assert testing.error(got.double(), want) <= 1e4 * 8 * torch.finfo(torch.float32).eps + (
        8 * torch.finfo(dtype).eps
    )


@every_backend
@pytest.mark.parametrize("factor", [3.0, 6.0])
@pytest.mark.parametrize("with_sink", [False, True])
def test_gradients_where_lse_is_far_from_zero(backend, factor, with_sink):
    """exp(s - lse) has the rounding of lse in it: the sum of a row's ds must not."""
    q, k, v = qkv(rows=64, keys=64, size=64)
    sink = 2 * factor**2 + factor * torch.randn(q.shape[2])  # among the largest scores of a row
    args = [q * factor, k * factor, v] + [sink] * with_sink

    def ours(q, k, v, sink=None):
        return fastlm.attention(q, k, v, sink=sink)

    testing.check(ours, lambda q, k, v, s=None: plain(q, k, v, sink=s)[0], args)


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_row(backend, value):
    """A bad query spoils its own row, and the gradient of its own row of q."""
    q, k, v = qkv(rows=70, keys=70)
    dout = torch.randn(2, 70, 2, 8)

    def run(q: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastlm.attention(*leaves, mask="causal")
        return [out.detach(), torch.autograd.grad(out, leaves, dout)[0]]

    want = run(q)
    bad = q.clone()
    bad[1, 40, 1, 3] = value
    for a, b in zip(run(bad), want, strict=True):
        assert not bool(a[1, 40, 1].isfinite().all())
        a[1, 40, 1] = b[1, 40, 1]
        torch.testing.assert_close(a, b)


@every_backend
def test_nan_stays_in_its_sequence_and_its_head(backend):
    starts = torch.tensor([0, 40, 100], dtype=torch.int32)
    options = {"layout": "thd", "cu_seqlens_q": starts, "cu_seqlens_k": starts, "mask": "causal"}
    clean = [torch.randn(100, 2, 8) for _ in range(4)]
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[:40, 1] = math.nan
    found = []
    for *args, dout in (clean, poisoned):
        leaves = [a.requires_grad_() for a in args]
        out = fastlm.attention(*leaves, **options)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[40:], b[40:]) and torch.equal(a[:40, 0], b[:40, 0])
        assert bool(b[:40, 1].isnan().any())


@every_backend
@pytest.mark.parametrize("where", ["bias", "intervals", "documents"])
def test_rows_of_nothing(backend, where):
    """-inf in a whole row of the bias, an empty interval: 0, -inf, and no gradient or NaN."""
    leaves = [x.requires_grad_() for x in qkv()]
    options: dict[str, Any] = {}
    if where == "bias":
        bias = torch.zeros(9, 9)
        bias[4] = -math.inf
        options["bias"] = bias.requires_grad_()
    elif where == "intervals":
        hi = torch.full((9,), 9)
        hi[4] = 0
        options["mask"] = AttnMask.intervals(torch.zeros(9).long(), hi)
    else:
        options["mask"] = AttnMask.documents(cu_seqlens=torch.tensor([0, 4, 4]))
    out, lse = fastlm.attention(*leaves, return_lse=True, **options)
    assert not out[:, 4].any() and bool((lse[..., 4] == -math.inf).all())
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dout[:, 4], dlse[..., 4] = math.nan, math.nan
    inputs = [*leaves, *([options["bias"]] if where == "bias" else [])]
    grads = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    assert all(bool(g.isfinite().all()) for g in grads) and not grads[0][:, 4].any()


# ---- properties ----------------------------------------------------------------------------------


def both_passes(backend: str, args: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in args]
    out, lse = fastlm.attention(*leaves, return_lse=True, **options)
    upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).sin() for x in (out, lse)]
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    grads = torch.autograd.grad((out, finite), leaves, upstream)
    return [out.detach(), lse.detach(), *grads]


@every_backend
def test_window_as_long_as_the_keys_is_none(backend):
    args = qkv(rows=40, keys=50, size=16)
    full = both_passes(backend, args)
    for window in ((49, 49), (10**6, 10**6), (2**31 - 1, 2**31 - 1), (-1, -1), (None, None)):
        torch.testing.assert_close(both_passes(backend, args, window=window), full)
    causal = both_passes(backend, args, mask="causal")
    torch.testing.assert_close(both_passes(backend, args, window=(10**9, 0)), causal)
    for lo, hi in ((-5, 50), (0, 2**31 - 1)):
        mask = AttnMask.intervals(torch.full((40,), lo), torch.full((40,), hi))
        torch.testing.assert_close(both_passes(backend, args, mask=mask), full)


@every_backend
def test_intervals_are_their_dense_mask(backend):
    """As a bias of -inf, rows without keys included; int32 and int64, per head and batch."""
    args = qkv(rows=40, keys=50, size=16)
    for shape in ((40,), (2, 40), (2, 2, 40), (1, 2, 40)):
        lo, hi = torch.randint(-9, 50, shape), torch.randint(0, 60, shape)
        dense = AttnMask.intervals(lo, hi).to_dense(40, 50)
        assert bool((~dense).all(-1).any())
        bias = torch.zeros(dense.shape).masked_fill(~dense, -math.inf)
        want = both_passes(backend, args, bias=bias)
        for given in (AttnMask.intervals(lo, hi.int()), AttnMask.from_dense(dense)):
            torch.testing.assert_close(both_passes(backend, args, mask=given), want)


@every_backend
def test_documents_in_another_order(backend):
    """Outputs and gradients move with their documents."""
    lengths = [13, 1, 40, 27]
    parts = [[torch.randn(n, 2, 8) for _ in range(4)] for n in lengths]

    def run(order: list[int]) -> list[list[Tensor]]:
        tensors = [torch.cat([parts[i][t] for i in order]) for t in range(4)]
        *args, dout = tensors
        ids = torch.cat([torch.full((lengths[i],), i) for i in order])
        leaves = [x[None].requires_grad_() for x in args]
        mask = AttnMask.documents(ids) & AttnMask.causal()
        out = fastlm.attention(*leaves, mask=mask)
        found = [out, *torch.autograd.grad(out, leaves, dout[None])]
        split = [x[0].split([lengths[i] for i in order]) for x in found]
        return [[s[order.index(i)] for s in split] for i in range(4)]

    torch.testing.assert_close(run([2, 0, 3, 1]), run([0, 1, 2, 3]))


@every_backend
@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"window": (20, 3)}])
def test_splits_merge_into_the_whole(backend, options):
    """Parts of the keys, each by itself, through merge_attention: outputs and gradients."""
    args = qkv(rows=30, keys=50, size=16)
    rows, edges = 30, [0, 7, 8, 31, 50]
    mask, window = options.get("mask"), options.get("window")
    whole = AttnMask.window(*(window or (-1, -1)))
    dense = (whole & AttnMask.causal() if mask else whole).to_dense(rows, 50)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for a, b in itertools.pairwise(edges):
            part = AttnMask.from_dense(dense[:, a:b])
            call = (q, k[:, a:b], v[:, a:b])
            out, lse = fastlm.attention(*call, mask=part, return_lse=True)
            outs.append(out)
            lses.append(lse)
        return fastlm.merge_attention(outs, lses)

    testing.check(ours, lambda *a: plain(*a, keep=dense), args)


@every_backend
def test_twice_and_on_any_number_of_threads(backend):
    """The same bits, both passes."""
    args = [torch.randn(2, 150, h, 16) for h in (4, 2, 2)]
    options: dict[str, Any] = {"mask": "causal"}
    if backend != "torch":
        options |= {"softcap": 3.0, "sink": torch.randn(4), "alibi_slopes": torch.rand(4)}
    first = both_passes(backend, args, **options)
    again = both_passes(backend, args, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threads = both_passes(backend, args, **options)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, threads, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@every_backend
@pytest.mark.parametrize("needed", ["q", "k", "v", "alibi_slopes", "sink", "bias"])
def test_one_gradient_alone(backend, needed):
    """Whatever else needs none; the upstream gradient has stride 0."""
    names = ("q", "k", "v", "alibi_slopes", "sink", "bias")
    values = [*qkv(), torch.rand(2), torch.randn(2), torch.randn(9, 9)]
    given = dict(zip(names, values, strict=True))

    def run(which: tuple[str, ...]) -> dict[str, Tensor | None]:
        leaves = {n: x.detach().requires_grad_(n in which) for n, x in given.items()}
        q, k, v = (leaves.pop(n) for n in "qkv")
        out = fastlm.attention(q, k, v, **leaves)
        out.sum().backward()
        return {n: x.grad for n, x in (leaves | {"q": q, "k": k, "v": v}).items()}

    alone, together = run((needed,)), run(names)
    torch.testing.assert_close(alone.pop(needed), together[needed])
    assert not any(g is not None for g in alone.values())


@every_backend
def test_modes_of_autograd(backend):
    """No gradient mode, inference mode, lse alone, and no silent second derivative."""
    leaves = [x.requires_grad_() for x in qkv()]
    with torch.no_grad():
        out = fastlm.attention(*leaves)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(fastlm.attention(*leaves), out)
    lse = fastlm.attention(*leaves, return_lse=True)[1]
    grads = torch.autograd.grad(lse.sum(), leaves)
    want = torch.autograd.grad(plain(*leaves)[1].sum(), leaves[:2])
    torch.testing.assert_close(grads[:2], want)
    assert not grads[2].any()
    out = fastlm.attention(*leaves)
    grad = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- wrong calls ---------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    "starts, message",
    [
        ([0, 5, 3, 6], "cu_seqlens_q must be non-decreasing from 0 to at most 6"),
        ([1, 3, 5, 6], "non-decreasing from 0 to at most 6"),
        ([0, 3, 5, 7], "non-decreasing from 0 to at most 6"),
        ([0, -1, 5, 6], "non-decreasing from 0 to at most 6"),
        ([0], r"cu_seqlens_q must be \[sequences \+ 1\], got \[1\]"),
        ([0, 3, 6], r"equally long, got \[3\] and \[4\]"),
        ([[0, 6, 6, 6]], r"cu_seqlens_q must be \[sequences \+ 1\], got \[1, 4\]"),
    ],
)
def test_bad_packing(backend, starts, message):
    x, good = torch.zeros(6, 2, 8), torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    bad = torch.tensor(starts, dtype=torch.int32)
    with fastlm.use_backend(backend), pytest.raises(ValueError, match=message):
        fastlm.attention(x, x, x, layout="thd", cu_seqlens_q=bad, cu_seqlens_k=good)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"softcap": -1.0}, ValueError, "softcap must be >= 0, got -1.0"),
        ({"softcap": math.nan}, ValueError, "softcap must be >= 0, got nan"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\], got nan"),
        ({"window": (-3, 0)}, ValueError, r"window\[0\] must be >= 0"),
        ({"bias": torch.zeros(9, 9, dtype=torch.int32)}, TypeError, "bias must be float64"),
        ({"bias": torch.zeros(9, 9, dtype=torch.bool)}, TypeError, "bias must be float64"),
        ({"sink": torch.zeros(2, dtype=torch.int64)}, TypeError, "sink must be float64"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \[2\] or \[2, 2\]"),
        ({"mask": torch.ones(9, 9).bool()}, ValueError, "goes through AttnMask.from_dense or bias"),
        ({"mask": AttnMask.intervals(*torch.zeros(2, 8).long())}, ValueError, "must be 9"),
        ({"seed": torch.tensor([1]), "dropout_p": 0.5}, ValueError, r"seed must be an int or"),
        ({"layout": "thd"}, ValueError, r"q must be \[\*, \*, \*\] \(\[T, H, D\]\)"),
    ],
)
def test_wrong_options(change, error, message):
    with pytest.raises(error, match=message):
        fastlm.attention(*qkv(), **change)


def test_int64_starts_are_told_how_to_be_fixed():
    x, starts = torch.zeros(6, 2, 8), torch.tensor([0, 6])
    with pytest.raises(TypeError, match=r"int32, got int64; call .int\(\) once per batch"):
        fastlm.attention(x, x, x, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=starts)
