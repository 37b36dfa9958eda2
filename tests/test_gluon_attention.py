"""The Hopper attention kernels without a Hopper GPU: run on the CPU, and read as machine code.

`gluon_interpreter.py` runs the source of the kernels, with every order of events it can draw;
`gluon_compile.py` compiles it. What neither sees is in test_gpu.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gluon_interpreter import interpreted
from gluon_machine import Deadlock
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.attention import hopper, reference
from fastlm.ops.attention.mask import coordinates, row_bounds

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parent / "fastlm" / "ops" / "attention"
PACKAGE = "fastlm.ops.attention"
kernels = interpreted(FOLDER / "gluon_kernels.py", PACKAGE)
gradients = interpreted(FOLDER / "gluon_backward.py", PACKAGE)
EMPTY: dict[str, Any] = dict.fromkeys(
    ("lo", "hi", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink", "bias", "seed")
)


def options(size: int, **changes: Any) -> dict[str, Any]:
    band = {"scale": size**-0.5, "left": -1, "right": -1, "softcap": 0.0, "dropout_p": 0.0}
    return {**EMPTY, **band, **changes}


def small(module: Any, stages: int = 2, groups: int = 2, keys: int = 16) -> Any:
    """Tiles of few keys, so that small sizes have many of them."""
    ours = module.configuration

    def configuration(*args: Any) -> Any:
        found = ours(*args)
        return dataclasses.replace(found, stages=stages, groups=groups, keys=keys)

    return configuration


def inputs(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views into larger tensors."""
    batch, rows, keys, heads, key_heads, size = sizes
    made = []
    for count, many in ((rows, heads), (keys, key_heads), (keys, key_heads)):
        x = torch.randn(batch, many, count, 2 * size).to(dtype).transpose(1, 2)[..., size:]
        made.append(x)
    return made[0], made[1], made[2]


def plain(q: Tensor, k: Tensor, v: Tensor, given: reference.Options) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in the dtype of its arguments."""
    starts = (given.cu_seqlens_q, given.cu_seqlens_k)
    at = coordinates(q.shape[1], k.shape[1], *starts, q.device)
    low, high = row_bounds(at, given.left, given.right, given.lo, given.hi)
    key = torch.arange(k.shape[1])
    keep = (key >= low[..., None]) & (key < high[..., None])
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * given.scale
    if given.softcap:
        s = given.softcap * torch.tanh(s / given.softcap)
    s = s.masked_fill(~keep, -torch.inf)
    if given.sink is not None:
        sink = given.sink.to(s.dtype)[:, None, None]
        s = torch.cat([s, sink.expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1)
    p = s.softmax(-1).masked_fill(lse[..., None] == -torch.inf, 0.0)[..., : k.shape[2]]
    return (p @ v).transpose(1, 2), lse


def compare(module: Any, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> None:
    assert hopper.refuses_call(q, k, v, **given) is None
    found = module.forward(q, k, v, *given.values())
    choices = reference.Options(**given)
    exact = reference.forward(q.double(), k.double(), v.double(), choices)
    theirs = plain(q, k, v, choices)
    empty = exact[1] == -torch.inf
    assert torch.equal(found[1] == -torch.inf, empty)
    assert not found[0].transpose(1, 2)[empty].any()
    for got, want, other in zip(found, exact, theirs, strict=True):
        assert testing.error(got.double(), want) <= 2 * testing.error(other.double(), want) + 1e-5


def starts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAND = {"left": 20, "right": 3}
CAUSAL = {"right": 0}
# batch, queries, keys, heads, key heads; options
CALLS = {
    "full": ((2, 130, 77, 2, 2), {}),
    "causal": ((1, 150, 150, 4, 2), CAUSAL),
    "more_keys": ((1, 70, 200, 2, 1), {**CAUSAL, "sink": torch.randn(2)}),
    "rows_without_keys": ((1, 200, 70, 2, 1), {**CAUSAL, "sink": torch.tensor([-torch.inf, 1.0])}),
    "window": ((2, 170, 190, 1, 1), {**BAND, "softcap": 2.0}),
    "one_row": ((3, 1, 33, 3, 1), CAUSAL),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("stages, groups", [(2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("name", CALLS)
def test_forward(name: str, stages: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, changes = CALLS[name]
    dtype = torch.bfloat16 if groups == 2 else torch.float16
    monkeypatch.setattr(kernels, "configuration", small(kernels, stages, groups))
    compare(kernels, *inputs((*sizes, 64), dtype), options(64, **changes))


@pytest.mark.parametrize("size", [64, 128])
def test_forward_with_its_own_tiles(size: int) -> None:
    compare(kernels, *inputs((1, 300, 333, 2, 1, size), torch.bfloat16), options(size, right=0))


@pytest.mark.parametrize("groups", [2, 3])
def test_packed(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of every kind, rows behind the last one, and NaN in one that reaches no other."""
    monkeypatch.setattr(kernels, "configuration", small(kernels, groups=groups))
    queries, keys = starts(0, 130, 130, 137, 300, 301), starts(0, 50, 90, 90, 250, 260)
    packing = {"cu_seqlens_q": queries, "cu_seqlens_k": keys}
    for changes in ({}, CAUSAL, BAND):
        q, k, v = inputs((1, 400, 280, 2, 1, 64), torch.bfloat16)
        compare(kernels, q, k, v, options(64, **packing, **changes))
        before = kernels.forward(q, k, v, *options(64, **packing, **changes).values())
        k[:, 250:], v[:, 250:] = float("nan"), float("nan")
        after = kernels.forward(q, k, v, *options(64, **packing, **changes).values())
        for a, b in ((before[0], after[0]), (before[1].transpose(1, 2), after[1].transpose(1, 2))):
            assert torch.equal(a[:, :300], b[:, :300])


def test_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "configuration", small(kernels))
    for batch, heads in ((1, 1), (2, 1), (1, 2), (2, 2)):
        lo = torch.randint(-20, 120, (batch, heads, 150), dtype=torch.int32)
        hi = lo + torch.randint(-10, 100, lo.shape, dtype=torch.int32)
        given = options(64, lo=lo.expand(batch, heads, 150), hi=hi, right=4)
        compare(kernels, *inputs((2, 150, 130, 2, 1, 64), torch.bfloat16), given)


@pytest.mark.parametrize("stages", [2, 3])
def test_any_number_of_tiles(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 to 7 tiles of keys, in many orders of events."""
    monkeypatch.setattr(kernels, "configuration", small(kernels, stages))
    for tiles in range(1, 8):
        for _ in range(6):
            keys = 16 * tiles - random.randrange(16)
            drawn = inputs((1, random.randrange(1, 128), keys, 1, 1, 64), torch.bfloat16)
            compare(kernels, *drawn, options(64, right=random.choice((-1, 0))))


# pieces of the kernel, and what a mistake there would be
MISTAKES = {
    "no wait for V": ("    mbarrier.wait(v_full.index(before), ((j - 1) // cfg.stages) & 1)\n", ""),
    "no wait for K": ("    mbarrier.wait(k_full.index(stage), (j // cfg.stages) & 1)\n", ""),
    "no room for V": (
        "            mbarrier.wait(v_empty.index(stage), (((j - 1) // cfg.stages) & 1) ^ 1)\n",
        "",
    ),
    "no room for K": (
        "            mbarrier.wait(k_empty.index(stage), ((j // cfg.stages) & 1) ^ 1)\n",
        "",
    ),
    "wrong phase": ("stage), ((j // cfg.stages) & 1) ^ 1)", "stage), (j // cfg.stages) & 1)"),
    "wrong count": ("ring(cfg.groups, cfg.stages)", "ring(1, cfg.stages)"),
    "fewer bytes": ("k_full.index(stage), cfg.keys * cfg.size", "k_full.index(stage), cfg.keys"),
    "more bytes": ("expect(q_full.index(0), cfg", "expect(q_full.index(0), 16 + cfg"),
    "early release of K": (
        "    s = hopper.warpgroup_mma_wait(1, deps=[s])\n"
        "    mbarrier.arrive(k_empty.index(stage), count=1)\n",
        "    mbarrier.arrive(k_empty.index(stage), count=1)\n"
        "    s = hopper.warpgroup_mma_wait(1, deps=[s])\n",
    ),
    "early release of V": (
        "    acc, total = hopper.warpgroup_mma_wait(0, deps=[acc, total])\n"
        "    mbarrier.arrive(v_empty.index(before), count=1)\n",
        "    mbarrier.arrive(v_empty.index(before), count=1)\n"
        "    acc, total = hopper.warpgroup_mma_wait(0, deps=[acc, total])\n",
    ),
    "no release": ("    mbarrier.arrive(v_empty.index(before), count=1)\n", ""),
    "no wait for O": (
        "acc, total = hopper.warpgroup_mma_wait(0, deps=[acc, total])",
        "acc, total = hopper.warpgroup_mma_wait(1, deps=[acc, total])",
    ),
}


def occurs(text: str) -> bool:
    return any(text in path.read_text() for path in FOLDER.glob("gluon_*.py"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert occurs(MISTAKES[mistake][0])
    wrong = interpreted(FOLDER / "gluon_kernels.py", PACKAGE, MISTAKES[mistake])
    monkeypatch.setattr(wrong, "configuration", small(wrong))
    with pytest.raises((AssertionError, Deadlock)):
        for _ in range(20):
            compare(wrong, *inputs((1, 128, 100, 1, 1, 64), torch.bfloat16), options(64, right=0))


# -- backward -------------------------------------------------------------------------------------


def compare_backward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], lse_too: bool = True
) -> tuple[Tensor, ...]:
    choices = reference.Options(**given)
    out, lse = reference.forward(q, k, v, choices)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if lse_too else None
    named = {**given, "dout": dout}
    assert hopper.refuses_call(q, k, v, **named) is None
    found = module.backward(dout, dlse, q, k, v, out, lse, *given.values())
    wide = [x.double() for x in (q, k, v)]
    _, exact_lse = reference.forward(*wide, choices)
    wide_dlse = None if dlse is None else dlse.double()
    exact = reference.backward(
        dout.double(), wide_dlse, *wide, exact_lse, choices, (False, False, False)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    theirs, their_lse = plain(*leaves, choices)
    keep = exact_lse > -torch.inf
    loss = (theirs * dout * keep.transpose(1, 2)[..., None]).sum()
    if dlse is not None:
        loss = loss + torch.where(keep, their_lse * dlse, 0.0).sum()
    other = torch.autograd.grad(loss, leaves)
    for got, want, rough in zip(found, (exact.q, exact.k, exact.v), other, strict=False):
        rough = rough.nan_to_num()
        assert testing.error(got.double(), want) <= 2 * testing.error(rough.double(), want) + 1e-5
    return found


BACKWARDS = {name: call for name, call in CALLS.items() if "softcap" not in call[1]}
BACKWARDS["window"] = ((2, 170, 190, 1, 1), BAND)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward(name: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, changes = BACKWARDS[name]
    dtype = torch.bfloat16 if stages == 2 else torch.float16
    monkeypatch.setattr(gradients, "configuration", staged(stages))
    compare_backward(gradients, *inputs((*sizes, 64), dtype), options(64, **changes))


def staged(stages: int) -> Any:
    ours = gradients.configuration
    return lambda *args: dataclasses.replace(ours(*args), stages=stages)


def test_backward_of_wide_heads_without_lse() -> None:
    drawn = inputs((1, 200, 150, 2, 1, 128), torch.bfloat16)
    compare_backward(gradients, *drawn, options(128, right=0), lse_too=False)


@pytest.mark.parametrize("changes", [{}, CAUSAL, BAND], ids=["full", "causal", "window"])
def test_backward_packed(changes: dict[str, Any]) -> None:
    """As `test_packed`; the gradient of the sink comes from delta."""
    queries, keys = starts(0, 130, 130, 137, 300, 301), starts(0, 50, 90, 90, 250, 260)
    sink = torch.randn(2)
    given = options(64, cu_seqlens_q=queries, cu_seqlens_k=keys, sink=sink, **changes)
    q, k, v = inputs((1, 400, 280, 2, 1, 64), torch.bfloat16)
    *_, delta = compare_backward(gradients, q, k, v, given)
    assert delta.shape == (1, 2, 400)
    choices = reference.Options(**given)
    out, lse = reference.forward(q, k, v, choices)
    dout = torch.randn_like(out)
    k[:, 250:], v[:, 250:] = float("nan"), float("nan")
    dout[:, 301:] = float("nan")
    found = gradients.backward(dout, None, q, k, v, out, lse, *given.values())
    assert not any(bool(x[:, :250].isnan().any()) for x in found[:3])


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend takes CPU tensors, and runs the interpreted kernels."""
    for name, module in (("gluon_kernels", kernels), ("gluon_backward", gradients)):
        monkeypatch.setitem(sys.modules, f"{PACKAGE}.{name}", module)
        monkeypatch.setattr(sys.modules[PACKAGE], name, module, raising=False)
    ours = dispatch._OPS["attention"]
    taken = dataclasses.replace(
        ours["triton"], devices=("cpu",), unavailable=None, refuses=hopper.refuses_call
    )
    monkeypatch.setitem(ours, "triton", taken)


def test_the_op_runs_them(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "refuses", hopper.refuses_call)

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        with fastlm.use_backend("triton"):
            return fastlm.attention(q, k, v, mask="causal", sink=sink, return_lse=True)

    def theirs(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        given = reference.Options(**options(64, right=0, sink=sink))
        return plain(q, k, v, given)

    args = [torch.randn(2, 150, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    with fastlm.use_backend("triton"):
        testing.check(ours, theirs, [*args, torch.randn(4, dtype=torch.bfloat16)])
    assert hopper._self_test(torch.device("cpu"), torch.bfloat16, 64) is None


def test_a_failed_self_test_keeps_its_reason(
    on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "_reasons", {})
    stuck = interpreted(FOLDER / "gluon_kernels.py", PACKAGE, MISTAKES["wrong phase"])
    wrong = interpreted(FOLDER / "gluon_kernels.py", PACKAGE)
    monkeypatch.setattr(wrong, "LN2", 0.7)
    for module, size, reason in ((stuck, 64, "raised Deadlock"), (wrong, 128, "off by")):
        monkeypatch.setattr(sys.modules[PACKAGE], "gluon_kernels", module)
        for _ in range(2):
            assert reason in str(hopper._failed(torch.device("cpu"), torch.bfloat16, size))
    assert len(hopper._reasons) == 2


@pytest.mark.parametrize("is_packed", [False, True])
def test_gradient_of_the_sink(is_packed: bool, on_the_cpu: None) -> None:
    q, k, v = inputs((1 if is_packed else 2, 150, 140, 2, 1, 64), torch.bfloat16)
    packing = {"cu_seqlens_q": starts(0, 20, 130), "cu_seqlens_k": starts(0, 90, 140)}
    given = options(64, right=0, sink=torch.randn(2), **(packing if is_packed else {}))
    choices = reference.Options(**given)
    out, lse = reference.forward(q, k, v, choices)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    needs = (False, True, False)
    found = hopper.backward(dout, dlse, q, k, v, out, lse, *given.values(), needs)
    want = reference.backward(dout, dlse, q, k, v, lse, choices, needs)
    assert want.sink is not None
    torch.testing.assert_close(found[4], want.sink, rtol=1e-2, atol=1e-2)


BACKWARD_MISTAKES = {
    "no wait for Q": ("    mbarrier.wait(q_full.index(stage), phase)\n    s =", "    s ="),
    "no wait for dO": ("    mbarrier.wait(g_full.index(stage), phase)\n    dp =", "    dp ="),
    "no wait for dK": (
        "dv, dk = hopper.warpgroup_mma_wait(0, deps=[dv, dk])",
        "dv, dk = hopper.warpgroup_mma_wait(1, deps=[dv, dk])",
    ),
    "no release": (
        "    mbarrier.arrive(empty.index(stage), count=1)\n    return dq",
        "    return dq",
    ),
    "fewer bytes": ("g_full.index(stage), cfg.keys * (cfg.size * 2 + 4)", "g_full.index(stage), 4"),
    "no room": ("        mbarrier.wait(empty.index(stage), phase)\n", ""),
}


@pytest.mark.parametrize("mistake", BACKWARD_MISTAKES)
def test_mistakes_of_the_backward_are_seen(mistake: str) -> None:
    assert occurs(BACKWARD_MISTAKES[mistake][0])
    wrong = interpreted(FOLDER / "gluon_backward.py", PACKAGE, BACKWARD_MISTAKES[mistake])
    with pytest.raises((AssertionError, Deadlock)):
        for _ in range(20):
            drawn = inputs((1, 400, 500, 1, 1, 64), torch.bfloat16)
            compare_backward(wrong, *drawn, options(64, right=0))


def test_query_tiles_are_those_with_a_row() -> None:
    query_range = interpreted(FOLDER / "gluon_backward_keys.py", PACKAGE).query_range
    cfg = gradients.configuration(64, reference.Options(**options(64)))
    for _ in range(500):
        rows, keys, first = (random.randrange(1, 400) for _ in range(3))
        left, right = (random.choice((-1, random.randrange(150))) for _ in range(2))
        if first >= keys:
            continue
        cfg = dataclasses.replace(cfg, left=left >= 0, right=right >= 0)
        at = coordinates(rows, keys, None, None, torch.device("cpu"))
        low, high = (x[0, 0] for x in row_bounds(at, left, right, None, None))
        begin, count, head, end = query_range(first, rows, keys, left, right, cfg)
        stop = min(first + 128, keys)
        touched = ((low < stop) & (high > first)).nonzero()[:, 0] // 64
        visited = range(begin, begin + count)
        assert set(touched.tolist()) <= set(visited)
        assert 0 <= head <= end or count == 0
        for tile in visited[head:end]:
            part = slice(64 * tile, min(64 * tile + 64, rows))
            assert bool(((low[part] <= first) & (high[part] >= stop)).all())


def test_formulas_are_those_of_the_mask() -> None:
    """The tiles of a block of rows are the ones with a key of some row, and those without a mask
    are inside the limits of every row."""
    cfg = kernels.configuration(64, reference.Options(**options(64)))
    for _ in range(500):
        rows, keys, first = (random.randrange(1, 200) for _ in range(3))
        left, right = (random.choice((-1, random.randrange(60))) for _ in range(2))
        cfg = dataclasses.replace(cfg, left=left >= 0, right=right >= 0, keys=16)
        at = coordinates(rows, keys, None, None, torch.device("cpu"))
        low, high = (x[0, 0] for x in row_bounds(at, left, right, None, None))
        end = min(first + 128, rows) - 1
        if first > end:
            continue
        for i in range(first, end + 1):
            got = kernels.row_limits(i, rows, keys, left, right, cfg)
            want = (int(low[i]), int(high[i]))
            assert got == want or (got[0] >= got[1] and want[0] >= want[1])
        one, other = (kernels.row_limits(i, rows, keys, left, right, cfg) for i in (first, end))
        last, count, head, stop = kernels.tile_range(one[0], other[0], one[1], other[1], cfg)
        touched = {j // 16 for i in range(first, end + 1) for j in range(int(low[i]), int(high[i]))}
        visited = list(range(last - 1, last - 1 - count, -1))
        assert touched <= set(visited) and (len(visited) == len(touched) or not touched)
        for tile in visited[head:stop]:
            inside = (low[first : end + 1] <= 16 * tile) & (high[first : end + 1] >= 16 * tile + 16)
            assert bool(inside.all())
        assert 0 <= head <= stop or count == 0


def test_schedule_is_a_permutation() -> None:
    for tiles, heads, section in ((1, 1, 1), (5, 12, 4), (7, 10, 4), (3, 8, 8)):
        programs = range(tiles * heads)
        places = {kernels.schedule(p, tiles, heads, section) for p in programs}
        assert places == {(t, h) for t in range(tiles) for h in range(heads)}


def test_refuses() -> None:
    q, k, v = (torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    given = options(64)
    assert hopper.refuses_call(q, k, v, **given) is None
    assert hopper.refuses(q, k, v, **given) == dispatch.NOT_PROVEN
    with hopper.use():
        assert "9.0" in str(hopper.refuses(q, k, v, **given))
    wide = torch.zeros(1, 8, 2, 96, dtype=torch.bfloat16)
    odd = torch.zeros(1, 8, 2, 68, dtype=torch.bfloat16)[..., :64]
    for args, changes, reason in (
        ((q.float(), k.float(), v.float()), {}, "bfloat16"),
        ((q, k, wide), {}, "64 or 128"),
        ((wide, wide, wide), {}, "64 or 128"),
        ((q, k, v), {"bias": q}, "no bias"),
        ((q, k, v), {"dropout_p": 0.5}, "no dropout"),
        ((q, k, v), {"scale": -1.0}, "above 0"),
        ((q, k, v), {"softcap": 1.0, "dout": q}, "no softcap"),
        ((q, k, v), {"lo": q, "hi": q, "dout": q}, "no intervals"),
        ((q[:0], k[:0], v[:0]), {}, "empty"),
        ((q, odd, v), {}, "rows of k"),
        ((q, k, v[:, :1].expand(1, 8, 2, 64)), {}, "rows of v"),
    ):
        assert reason in str(hopper.refuses_call(*args, **{**given, **changes})), reason


# -- machine code ---------------------------------------------------------------------------------

no_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLM_BACKEND")}
    path = os.pathsep.join([str(TESTS.parent), kept.get("PYTHONPATH", "")])
    cache = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, str(TESTS / "gluon_compile.py")],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@no_triton
def test_nothing_spills_and_everything_fits(
    compiled: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [kernel for kernel in compiled if kernel["objections"]]
    assert compiled and not bad, "\n".join(map(json.dumps, bad))
    with capsys.disabled():
        most = max(kernel["registers"] for kernel in compiled)
        print(f" [{len(compiled)} compiled, at most {most} registers]", end="", flush=True)


@no_triton
def test_forward_instructions(compiled: list[dict[str, Any]]) -> None:
    """Every product and copy once, and all exponentials of the loops under a product."""
    for kernel in (k for k in compiled if k["kernel"] == "forward_kernel"):
        cfg = kernel["config"]
        groups, size, keys = cfg["groups"], cfg["size"], cfg["keys"]
        masks_right = cfg["right"] or cfg["intervals"]
        masks_left = cfg["left"] or cfg["intervals"]
        loops = 1 + masks_right + masks_left
        assert kernel["HGMMA"] == groups * (loops + 1) * (size + keys) // 16, kernel
        # more waits than these: the compiler has put products one after another
        assert kernel["waits"] == groups * (2 * loops + 2), kernel
        # the first K may stand before the loop of the producer
        copies = (groups + 2) * size // 64
        assert kernel["UTMALDG"] in (copies, copies + size // 64), kernel
        assert len(kernel["overlaps"]) == groups * loops, kernel
        each = 2 + keys // 2 * (2 if cfg["softcap"] else 1)  # of a thread, and of its two rows
        for between in kernel["overlaps"]:
            assert between["MUFU.EX2"] == each, kernel
            assert between["FMNMX"] >= keys // 2 and between["FADD"] >= keys // 2, kernel
            assert "PRMT" not in between and "F2FP" not in between, kernel
        outside = kernel["exponentials"] - groups * loops * each
        assert outside <= groups * (each + 4), kernel


@no_triton
def test_backward_instructions(compiled: list[dict[str, Any]]) -> None:
    """Every product and copy once; the exponentials stand under dP."""
    for kernel in (k for k in compiled if k["kernel"] in ("key_kernel", "query_kernel")):
        cfg = kernel["config"]
        size, tile = cfg["size"], 64
        of_keys = kernel["kernel"] == "key_kernel"
        loops = 1 + (cfg["left"] or cfg["right"]) if of_keys else 2 + cfg["left"]
        products = 2 * size // 16 + (2 if of_keys else 1) * tile // 16
        assert kernel["HGMMA"] == 2 * loops * products, kernel
        assert kernel["waits"] == 2 * loops * 3, kernel
        assert kernel["UTMALDG"] == 6 * size // 64 + (2 if of_keys else 0), kernel
        under = [o["MUFU.EX2"] for o in kernel["overlaps"] if "MUFU.EX2" in o]
        assert under == [tile // 2] * (2 * loops), kernel
        assert kernel["exponentials"] == 2 * loops * tile // 2, kernel
