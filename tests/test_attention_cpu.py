"""The compiled CPU backend of fastlm.attention: options, instruction sets, same bits, NaN."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_attention import band, plain
from torch import Tensor

import fastlm
from fastlm import AttnMask, dispatch, testing
from fastlm.philox import philox

pytestmark = pytest.mark.skipif(
    "cpu" not in dispatch.ready("attention"), reason="the extension is not built"
)

ROOT = os.path.dirname(os.path.dirname(__file__))
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
Options = dict[str, Any]


def make(
    dtype: torch.dtype, batch: int, rows: int, keys: int, heads: tuple[int, int], *sizes: int
) -> list[Tensor]:
    return [
        torch.randn(batch, rows, heads[0], sizes[0]).to(dtype),
        torch.randn(batch, keys, heads[1], sizes[0]).to(dtype),
        torch.randn(batch, keys, heads[1], sizes[-1]).to(dtype),
    ]


def dropped(seed: int, rate: float, batch: int, heads: int, rows: int, keys: int) -> Tensor:
    """The documented mask of dropout, times 1 / (1 - rate)."""
    row = torch.arange(batch * heads * rows).view(batch, heads, rows, 1)
    words = torch.stack(philox(torch.tensor(seed), row, torch.arange((keys + 3) // 4)), -1)
    return (words.flatten(-2)[..., :keys] >= rate * 2**32) / (1 - rate)


def compare(args: list[Tensor], options: Options, keep: Tensor | None = None) -> None:
    """Out and lse with all gradients against the scores written out. `args` are q, k, v and what
    `options` names as None; `keep` is the dense form of the mask."""
    named = [name for name, value in options.items() if value is None]
    batch, rows, heads, _ = args[0].shape
    keys = args[1].shape[1]
    alive = torch.ones(rows, dtype=torch.bool) if keep is None else keep.any(-1)
    dense = {n: options[n] for n in ("softcap", "scale") if n in options}
    if "dropout_p" in options:
        rate, seed = options["dropout_p"], options["seed"]
        dense["drop"] = dropped(seed, rate, batch, heads, rows, keys)

    def ours(*given: Tensor) -> tuple[Tensor, Tensor]:
        extra = dict(zip(named, given[3:], strict=True))
        out, lse = fastlm.attention(*given[:3], **(options | extra), return_lse=True)
        return out, lse.where(alive, 0.0)

    def theirs(*given: Tensor) -> tuple[Tensor, Tensor]:
        extra = dict(zip(named, given[3:], strict=True))
        slopes, sink, bias = (extra.get(n) for n in ("alibi_slopes", "sink", "bias"))
        local = dict(dense)
        if "drop" in local:
            local["drop"] = local["drop"].to(given[0].dtype)
        # softmax over nothing is NaN in PyTorch: such rows are computed unmasked, then dropped
        safe = None if keep is None else keep | ~alive[:, None]
        out, lse = plain(*given[:3], slopes, sink, bias, keep=safe, **local)
        return out.where(alive[:, None, None], 0.0), lse.where(alive, 0.0)

    with fastlm.use_backend("cpu"):
        testing.check(ours, theirs, args)


def dense_of(options: Options, rows: int, keys: int) -> Tensor | None:
    keep = None
    if options.get("mask") == "causal":
        keep = band(rows, keys, right=0)
    elif "mask" in options:
        keep = options["mask"].to_dense(rows, keys)
    if "window" in options:
        window = band(rows, keys, *options["window"])
        keep = window if keep is None else keep & window
    return keep


ROWS, KEYS = 139, 150
LO = torch.randint(0, KEYS, (ROWS,), generator=torch.Generator().manual_seed(1))
FEATURES: dict[str, Options] = {
    "causal": {"mask": "causal"},
    "window": {"window": (70, 3)},
    "intervals": {"mask": AttnMask.intervals(LO, LO + 40)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.3},
    "alibi": {"alibi_slopes": None},
    "sink": {"sink": None},
    "bias": {"bias": None},
    "dropout": {"dropout_p": 0.3, "seed": 11},
}
SHAPES = {"alibi_slopes": (2, 4), "sink": (4,), "bias": (4, 1, KEYS)}
PAIRS = [p for p in itertools.combinations(FEATURES, 2) if p != ("causal", "intervals")]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_features(dtype, pair, poisoned):
    options = FEATURES[pair[0]] | FEATURES[pair[1]]
    keep = dense_of(options, ROWS, KEYS)
    extra = [torch.rand(SHAPES[n]).to(dtype) for n, value in options.items() if value is None]
    compare([*make(dtype, 2, ROWS, KEYS, (4, 2), 20, 12), *extra], options, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (33, 65), (64, 64), (128, 31), (257, 40)])
def test_sizes_of_heads(dtype, sizes, poisoned):
    args = make(dtype, 1, 131, 131, (2, 1), *sizes)
    compare(args, {"mask": "causal"}, band(131, 131, right=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 300), (300, 1), (5, 129), (385, 385)])
def test_lengths(dtype, rows, keys, poisoned):
    compare(make(dtype, 1, rows, keys, (3, 3), 16), {})


@pytest.mark.parametrize("sizes", [(64, 64), (128, 40), (24, 96)])
def test_scores_that_grow_along_the_keys(sizes, poisoned):
    """What a tile's probabilities are relative to is of no use to the next one: at the last keys,
    some rows are beyond 2^128 and others still below 2^8."""
    q, k, v = make(torch.float32, 1, 50, 420, (2, 1), *sizes)
    q = q.abs() * torch.linspace(0.01, 1, 50)[:, None, None]
    k = k.abs() * torch.linspace(0.1, 60, 420)[:, None, None]
    compare([x.bfloat16() for x in (q, k, v)], {})


@pytest.mark.parametrize("heads, keys", [((1, 1), 1100), ((16, 2), 140), ((3, 1), 600)])
def test_backward_in_parts(heads, keys, poisoned):
    """Few heads: keys or the heads of a group are cut, and the parts are added up."""
    args = make(torch.float32, 1, 150, keys, heads, 8)
    extra = [torch.rand(heads[0]), torch.randn(heads[0])]
    options = {"alibi_slopes": None, "sink": None, "mask": "causal"}
    compare([*args, *extra], options, band(150, keys, right=0))


@pytest.mark.parametrize("shape", [(2, 4, 90, 95), (1, 1, 90, 95), (4, 90, 1), (95,), (1,)])
def test_bias(shape, poisoned):
    for dtype in (torch.float32, torch.bfloat16):
        bias = torch.randn(shape).to(dtype)
        args = make(dtype, 2, 90, 95, (4, 2), 8)
        compare([*args, bias], {"bias": None, "mask": "causal"}, band(90, 95, right=0))


@pytest.mark.parametrize("kind", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, kind):
    def ours(*args: Tensor) -> Tensor:
        return fastlm.attention(*(testing.strided(a, kind) for a in args), mask="causal")

    with fastlm.use_backend("cpu"):
        testing.check(
            ours,
            lambda *a: plain(*a, keep=band(35, 35, right=0))[0],
            make(dtype, 2, 35, 35, (2, 2), 9),
        )


def test_broadcast_views_are_read_in_place():
    q, k, v = make(torch.float32, 1, 9, 9, (2, 2), 8)
    views = [x.expand(3, *x.shape[1:]) for x in (q, k, v)]
    with fastlm.use_backend("cpu"):
        got, want = fastlm.attention(*views), fastlm.attention(q, k, v)
    assert torch.equal(got, want.expand_as(got))


def test_addresses_beyond_two_to_the_31():
    """Rows 2^30 elements apart, in memory that is only touched where they stand."""
    room = torch.empty(2**30 * 3 + 16, dtype=torch.bfloat16)
    args = make(torch.bfloat16, 1, 4, 4, (1, 1), 8)
    want = both_passes(args, mask="causal")
    for i, x in enumerate(args):
        far = room.as_strided((1, 4, 1, 8), (0, 2**30, 8, 1)).copy_(x)
        same(both_passes([far if i == j else y for j, y in enumerate(args)], mask="causal"), want)


# ---- same bits whatever stands around ------------------------------------------------------------


def both_passes(args: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in args]
    with fastlm.use_backend("cpu"):
        out, lse = fastlm.attention(*leaves, return_lse=True, **options)
        upstream = torch.randn(out.shape[-3:], generator=torch.Generator().manual_seed(1))
        grad = upstream.to(out.dtype).expand_as(out)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), float((a - b).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
def test_any_number_of_threads(dtype, heads):
    args = make(dtype, 1, 700, 700, heads, 32)
    options = {"mask": "causal", "alibi_slopes": torch.rand(heads[0])}
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both_passes(args, **options))
    finally:
        torch.set_num_threads(before)
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_alone(dtype):
    rows, keys = [0, 300, 300, 429, 434, 700], [0, 310, 322, 400, 400, 720]
    args = [x[0] for x in make(dtype, 1, 709, 731, (4, 2), 24)]
    starts = [torch.tensor(x, dtype=torch.int32) for x in (rows, keys)]
    options = {"mask": "causal", "window": (200, None), "sink": torch.randn(4), "layout": "thd"}
    leaves = [a.requires_grad_() for a in args]
    grad = torch.randn(709, 4, 24).to(dtype)

    def run(given: list[Tensor], dout: Tensor, *cu: Tensor) -> list[Tensor]:
        named = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
        out, lse = fastlm.attention(*given, return_lse=True, **named, **options)
        return [out.detach(), lse.detach().mT, *torch.autograd.grad(out, given, dout)]

    with fastlm.use_backend("cpu"):
        packed = run(leaves, grad, *starts)
        for q0, q1, k0, k1 in zip(rows, rows[1:], keys, keys[1:], strict=False):
            part = [leaves[0][q0:q1], *(x[k0:k1] for x in leaves[1:])]
            part = [x.detach().requires_grad_() for x in part]
            one = [torch.tensor([0, n], dtype=torch.int32) for n in (q1 - q0, k1 - k0)]
            alone = run(part, grad[q0:q1], *one)
            cut = [x[q0:q1] for x in packed[:3]] + [x[k0:k1] for x in packed[3:]]
            same(cut, alone)
    behind = [packed[0][700:], packed[2][700:], packed[3][720:], packed[4][720:]]
    assert all(bool((x == 0).all()) for x in behind)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_rows_alone(dtype):
    args = make(dtype, 3, 260, 260, (2, 1), 16)
    options = {"mask": "causal", "softcap": 3.0}
    together = both_passes(args, **options)
    for b in range(3):
        same([x[b : b + 1] for x in together], both_passes([a[b : b + 1] for a in args], **options))


def test_the_same_mask_in_other_words():
    args = make(torch.float32, 1, 300, 300, (2, 2), 16)
    causal = both_passes(args, mask="causal")
    place = torch.arange(300)
    same(both_passes(args, mask=AttnMask.intervals(place * 0, place + 1)), causal)
    same(both_passes(args, mask="causal", window=(300, 5)), causal)
    same(both_passes(args, window=(300, 299)), both_passes(args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_document(dtype):
    """Two documents that share tiles of keys and queries; 0 * NaN would be NaN."""
    ids = (torch.arange(300) >= 133).long()
    options = {"mask": AttnMask.documents(ids)}
    args = make(dtype, 1, 300, 300, (2, 1), 16)
    clean = both_passes(args, **options)
    one, two = slice(0, 133), slice(133, 300)
    for which, bad in itertools.product(range(3), (math.nan, math.inf)):
        for hit, rows, other in ((slice(100, 133), one, two), (slice(133, 150), two, one)):
            broken = [a.clone() for a in args]
            broken[which][:, hit] = bad
            found = both_passes(broken, **options)
            pairs = [(a, b) for a, b in zip(found, clean, strict=True) if a.dim() == 4]
            same([a[:, other] for a, _ in pairs], [b[:, other] for _, b in pairs])
            assert not bool(found[0][:, rows].isfinite().all())


def test_a_row_with_one_key_has_no_gradient():
    for dtype in DTYPES:
        q, k, v = make(dtype, 1, 5, 5, (2, 2), 64)
        _, _, dq, dk, dv = both_passes([q, k, v], window=(0, 0))
        assert bool((dq == 0).all() and (dk == 0).all()) and bool((dv != 0).all())


# ---- values that are not finite ------------------------------------------------------------------


def against_reference(args: list[Tensor], **options: Any) -> None:
    found = []
    for backend in ("cpu", "reference"):
        leaves = [a.detach().requires_grad_() for a in args]
        with fastlm.use_backend(backend):
            out, lse = fastlm.attention(*leaves, return_lse=True, **options)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([out.detach(), lse.detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_rows_masked_by_bias_and_infinite_inputs():
    args = make(torch.float32, 1, 40, 40, (2, 2), 8)
    bias = torch.zeros(40, 40)
    bias[3], bias[5, 7:] = -math.inf, -math.inf
    against_reference(args, bias=bias)
    for which, value in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        broken = [a.clone() for a in args]
        broken[which][0, 17, 1, 3] = value
        against_reference(broken)
    loud = [(a * 60000).half() for a in args]
    against_reference(loud)


def test_gradients_that_arrive_at_rows_without_keys():
    for dtype in DTYPES:
        leaves = [x.requires_grad_() for x in make(dtype, 1, 200, 100, (2, 1), 8)]
        with fastlm.use_backend("cpu"):
            out, lse = fastlm.attention(*leaves, mask="causal", return_lse=True)
            dout, dlse = torch.ones_like(out), torch.ones_like(lse)
            dout[:, :100], dlse[..., :100] = math.nan, math.nan
            dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        assert bool((dq[:, :100] == 0).all())
        assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_empty(shape, dtype, poisoned):
    batch, rows, keys = shape
    args = make(dtype, batch, rows, keys, (2, 1), 8)
    extra = [torch.rand(2), torch.randn(2), torch.randn(2, 1, keys)]
    leaves = [a.requires_grad_() for a in (*args, *extra)]
    options = dict(zip(("alibi_slopes", "sink", "bias"), leaves[3:], strict=True))
    with fastlm.use_backend("cpu"):
        out, lse = fastlm.attention(*leaves[:3], return_lse=True, **options)
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), leaves)
    assert out.shape == (batch, rows, 2, 8) and bool((out == 0).all())
    assert all(bool((g == 0).all()) for g in (*grads[:4], grads[5]))
    # lse is the sink where there is nothing else
    assert bool((grads[4] == batch * rows).all())


# ---- choice --------------------------------------------------------------------------------------


def test_is_the_default_and_refuses_float64():
    q, k, v = make(torch.float32, 1, 8, 8, (2, 2), 8)
    assert fastlm.explain("attention", q, k, v)[0].chosen == "cpu"
    answer = fastlm.explain("attention", q.double(), k.double(), v.double())[0].answers["cpu"]
    assert answer == "takes float32, bfloat16 and float16, not float64"


@pytest.mark.parametrize("isa", ("base", "avx2", "avx512"))
def test_every_instruction_set(isa):
    code = (
        "import torch, sys; sys.path.insert(0, 'tests')\n"
        "from fastlm import extension\n"
        "import test_attention_cpu as t\n"
        "try: extension.cpu_isa()\n"
        "except RuntimeError as e: print('absent', e); raise SystemExit\n"
        f"assert extension.cpu_isa() == '{isa}'\n"
        "torch.manual_seed(0)\n"
        "for dtype in t.DTYPES:\n"
        "    t.test_sizes_of_heads(dtype, (33, 65), None)\n"
        "    for pair in t.PAIRS[::5]: \n"
        "        if 'sink' not in pair: t.test_pairs_of_features(dtype, pair, None)\n"
        "    t.test_nan_stays_in_its_document(dtype)\n"
        "    t.test_packed_is_alone(dtype)\n"
        "t.test_backward_in_parts((3, 1), 600, None)\n"
        "print('checked')"
    )
    env = {**os.environ, "FASTLM_CPU_ISA": isa, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("absent"):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "checked"


def test_memory_does_not_grow_with_the_square():
    """8192 x 8192 scores would be 256 MiB; in a process of its own, with all that is allocated."""
    code = (
        "import torch, fastlm\n"
        "from fastlm.bench import measure\n"
        "torch.set_num_threads(2)\n"
        "if not measure.has_peak(): print(0); raise SystemExit\n"
        "leaves = [torch.randn(1, 8192, 2, 16).requires_grad_() for _ in range(3)]\n"
        "def step(rows=8192):\n"
        "    part = [x[:, :rows] for x in leaves]\n"
        "    out = fastlm.attention(*part, window=(64, 0))\n"
        "    return torch.autograd.grad(out, leaves, torch.ones_like(out))\n"
        "step(64)\n"
        "measure.return_freed_memory()\n"
        "print(measure.extra_memory(step))"
    )
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 16 << 20
