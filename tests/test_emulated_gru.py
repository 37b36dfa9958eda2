"""The CUDA kernels of the GRU without a GPU: their own source on an emulated device.

Every thread of the grid is a fiber, switched in random order; global stores arrive late and out of
order (tests/emulated_gpu). So what is tested is the kernels' index arithmetic, the exchange between
blocks, and every launch plan; not speed, and not the hardware's own instructions.
"""

from __future__ import annotations

import dataclasses
import mmap
import shutil
import sys
from collections.abc import Iterator

import emulated_gru
import pytest
import torch
from gru_cases import case, check_close, run, truth
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.embedding_gru import autograd, cuda_kernels

if sys.platform != "linux" or shutil.which(emulated_gru.COMPILER.split()[0]) is None:
    reason = f"the emulated device needs Linux and {emulated_gru.COMPILER}"
    pytest.skip(reason, allow_module_level=True)

# parts of an operand, and what exchanges the state; 2 is for float16, which clusters do not take
PARTS = [(1, "grid"), (2, "grid"), (3, "grid"), (1, "clusters"), (3, "clusters")]
each_kernel = pytest.mark.parametrize("parts, exchange", PARTS, indirect=["exchange"])
grid_only = pytest.mark.parametrize("exchange", ["grid"], indirect=True)
# batch, steps, features, hidden: odd, tails of every kind, one of everything
SHAPES = [(1, 1, 1, 1), (5, 7, 12, 19), (9, 3, 5, 48), (2, 9, 7, 65)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated_gru.Device:
    return emulated_gru.Device(emulated_gru.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=("grid", "clusters"))
def exchange(request: pytest.FixtureRequest) -> str:
    """How blocks exchange the state: through global memory, or within clusters."""
    return request.param


@pytest.fixture
def device(
    library: emulated_gru.Device, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[emulated_gru.Device]:
    """The cuda backend takes CPU tensors, and its kernels are the emulated ones."""
    library.reset()
    monkeypatch.setattr(cuda_kernels, "raw", library.raw)
    answers = {"grid": "not wanted here", "clusters": None}
    monkeypatch.setattr(cuda_kernels, "_objection", lambda *_: answers[exchange])
    for name in ("gru", "embedding_gru"):
        changed = dataclasses.replace(
            dispatch._OPS[name]["cuda"],
            devices=("cpu",),
            unavailable=None,
            refuses=lambda **_: None,
        )
        monkeypatch.setitem(dispatch._OPS[name], "cuda", changed)
    yield library


def weights(features: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((3 * hidden, features), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    return [(torch.randn(s) / hidden**0.5).to(dtype) for s in shapes]


def plain(x: Tensor, h0: Tensor, *w: Tensor, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    out, h_n = torch.gru(x, h0[None], list(w), True, 1, 0.0, False, False, batch_first)
    return out, h_n[0]


def ours(x: Tensor, h0: Tensor, *w: Tensor, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    with fastlm.use_backend("cuda"):
        out, h_n = fastlm.gru(x, h0[None], w, batch_first=batch_first)
    return out, h_n[0]


@pytest.fixture
def forced() -> Iterator[None]:
    with fastlm.use_backend("cuda"):
        yield


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_plain(
    device: emulated_gru.Device, forced: None, poisoned: None, shape: tuple, dtype: torch.dtype,
    batch_first: bool,
) -> None:  # fmt: skip
    b, t, c, h = shape
    x = torch.randn(b, t, c) if batch_first else torch.randn(t, b, c)
    args = (x.to(dtype), torch.randn(b, h).to(dtype), *weights(c, h, dtype))
    testing.check(
        lambda *a: ours(*a, batch_first=batch_first),
        lambda *a: plain(*a, batch_first=batch_first),
        args,
    )


@pytest.mark.parametrize("dedupe", ("batch", "vocab", "off"))
@pytest.mark.parametrize("save", ("gates", "hidden"))
def test_embedding_matches_plain(
    device: emulated_gru.Device, forced: None, dedupe: str, save: str
) -> None:
    def embedded(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        return plain(torch.nn.functional.embedding(tokens, weight), h0, *w)

    def fused(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        return fastlm.embedding_gru(tokens, weight, *w, h0=h0, dedupe=dedupe, save=save)

    args = (torch.randint(0, 9, (4, 6)), torch.randn(9, 8), torch.randn(4, 21), *weights(8, 21))
    testing.check(fused, embedded, args)


@each_kernel
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
def test_resets_and_directions(
    device: emulated_gru.Device, poisoned: None, parts: int, reverse: bool, batch_first: bool
) -> None:
    args = case(11, 6, 21, parts=parts)
    got = run(args, parts, batch_first, reverse)
    check_close(got, truth(args, batch_first, reverse, got), parts)


def test_a_reset_hides_everything_before(device: emulated_gru.Device) -> None:
    """Bitwise: what follows a reset is the run that starts there, on whatever device size."""
    args = case(3, 6, 37, parts=3, resets=False)
    args["reset"] = torch.zeros(3, 6, dtype=torch.uint8)
    args["reset"][:, 2] = 1
    whole = run({**args, "reset": args["reset"].flatten()}, 3)[0].view(3, 6, -1)
    tail = {**args, "index": args["index"].view(3, 6)[:, 2:].reshape(-1), "h0": None, "reset": None}
    assert torch.equal(whole[:, 2:], run(tail, 3)[0].view(3, 4, -1))


# one hidden size for each tiling, the largest ones with few steps
@pytest.mark.parametrize("parts, h, exchange", [
    (1, 250, "grid"), (1, 300, "grid"), (1, 520, "grid"), (1, 1030, "grid"), (2, 140, "grid"),
    (2, 300, "grid"), (2, 520, "grid"), (3, 140, "grid"), (3, 300, "grid"), (3, 520, "grid"),
    (1, 250, "clusters"), (1, 330, "clusters"), (1, 520, "clusters"), (3, 140, "clusters"),
    (3, 270, "clusters"),
], indirect=["exchange"])  # fmt: skip
def test_every_tiling(device: emulated_gru.Device, parts: int, h: int) -> None:
    args = case(2, 2, h, parts=parts, resets=False)
    got = run(args, parts)
    check_close(got, truth(args, like=got), parts)


@pytest.mark.parametrize("parts", (1, 2, 3))
@grid_only
def test_a_batch_of_several_launches(device: emulated_gru.Device, parts: int) -> None:
    """Bitwise what a large device gives in one launch; the last slice is not full."""
    args = case(75, 2, 40, parts=parts)
    one = run(args, parts)
    assert device.launches == 2
    device.reset(multiprocessors=6 if parts == 1 else 3, seed=5)
    several = run(args, parts)
    assert device.launches > 2
    assert device.rows(40, parts, False, False) < 75
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a, b)


@grid_only
def test_a_grid_refuses_what_cannot_be_on_chip_at_once(device: emulated_gru.Device) -> None:
    device.reset(multiprocessors=2)
    assert device.rows(33, 3, False, False) == 0 and device.rows(32, 3, False, False) > 0
    with pytest.raises(RuntimeError, match="cudaError_t 801"):
        run(case(2, 2, 33, parts=3), 3)
    device.reset(shared=48 * 1024)
    assert device.rows(520, 3, False, True) == 0
    device.reset()
    assert device.rows(2049, 1, False, True) == device.rows(1025, 3, False, False) == 0


@pytest.mark.parametrize("exchange", ["clusters"], indirect=True)
def test_clusters_refuse_what_does_not_fit(device: emulated_gru.Device) -> None:
    fits = {(1, 768): True, (1, 769): False, (2, 8): False, (3, 512): True, (3, 513): False}
    for (parts, hidden), fit in fits.items():
        for backward in (False, True):
            assert (device.rows(hidden, parts, True, backward) > 0) == fit, (parts, hidden)
    with pytest.raises(RuntimeError, match="cudaError_t 801"):
        run(case(2, 2, 513, parts=3), 3)


@each_kernel
def test_the_order_of_threads_does_not_change_a_bit(
    device: emulated_gru.Device, parts: int
) -> None:
    args = case(9, 4, 40, parts=parts)
    results = []
    for seed in range(1, 7):
        device.reset(seed=seed)
        results.append(run(args, parts))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def _sparse(rows: int, width: int, dtype: torch.dtype, like: Tensor, stride: int) -> Tensor:
    """[rows, width] of memory that exists only where it is written: the two steps of two sequences
    that stand `stride` rows apart."""
    size = rows * width * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    wide = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(rows, width)
    for b in range(2):
        wide[b * stride : b * stride + 2] = like.view(2, 2, width)[b].to(dtype)
    return wide


@each_kernel
def test_addresses_have_64_bits(device: emulated_gru.Device, parts: int, exchange: str) -> None:
    """The second sequence has its gates past 2^31 elements."""
    stride, h = 2**26 + 7, 8
    args = case(2, 2, h, parts=parts, resets=False)
    want = run(args, parts)
    far = dict(rows=stride + 2, stride=stride)
    kind = torch.bfloat16 if parts == 1 else torch.float32
    unwritten = torch.full((4, 3 * h * kind.itemsize), 255, dtype=torch.uint8).view(kind)
    index = _sparse(width=1, dtype=torch.int64, like=args["index"], **far)
    out = _sparse(width=h, dtype=kind, like=unwritten[:, :h].contiguous(), **far)
    gates = _sparse(width=4 * h, dtype=torch.float32, like=torch.zeros(4, 4 * h), **far)
    h_n, common = torch.empty(2, h), (parts, exchange == "clusters", False, 2, 2, h, stride, 1)
    device.call(
        "emulated_gru_forward", args["table"], 7, index, None, args["w_hh"], args["b_hh"],
        args["h0"], *common, out, h_n, gates,
    )  # fmt: skip
    near = [0, 1, stride, stride + 1]
    for got, expected in zip((out, h_n, gates), want, strict=False):
        assert torch.equal(got[near] if got is not h_n else got, expected)
    generator = torch.Generator().manual_seed(7)
    dout, dh_n = (torch.randn(x.shape, generator=generator) for x in want[:2])
    swap = _sparse(width=3 * h, dtype=kind, like=unwritten, **far)
    dinput = _sparse(width=3 * h, dtype=torch.float32, like=torch.zeros(4, 3 * h), **far)
    dhidden = _sparse(width=3 * h, dtype=torch.float32, like=torch.zeros(4, 3 * h), **far)
    dh0 = torch.empty(2, h)
    device.call(
        "emulated_gru_backward", _sparse(width=h, dtype=torch.float32, like=dout, **far), dh_n,
        None, args["w_hh"], args["h0"],
        _sparse(width=h, dtype=torch.float32, like=want[0].float(), **far), gates, *common, swap,
        dinput, dhidden if parts == 1 else None, dh0,
    )  # fmt: skip
    assert torch.equal((dhidden if parts == 1 else swap)[near], want[4])
    assert torch.equal(dh0, want[5])
    summed = torch.zeros(7, 3 * h).index_put_((args["index"],), dinput[near], accumulate=True)
    assert torch.equal(summed, want[3])


@each_kernel
def test_a_nan_stays_in_its_sequence(device: emulated_gru.Device, parts: int) -> None:
    """And it hangs nobody who waits for a value that is not the NaN of unwritten memory."""
    clean = case(9, 4, 40, parts=parts, rows=36, resets=False)
    clean["index"] = torch.arange(36)
    dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in clean.items()}
    dirty["h0"][1, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits one
    dirty["table"][4 * 5 + 1, :] = float("nan")  # row 5, from its second step on
    dirty["table"][4 * 7 + 1, 3] = float("inf")
    a, b = run(clean, parts), run(dirty, parts)
    kept = [0, 2, 3, 4, 6, 8]
    for x, y in zip(a[:3], b[:3], strict=True):
        assert torch.equal(x.view(9, -1)[kept], y.view(9, -1)[kept])
    assert b[0].view(9, 4, -1)[1].isnan().all()
    assert b[0].view(9, 4, -1)[5, 1:].isnan().all() and b[0].view(9, 4, -1)[5, 0].isfinite().all()
    for number in (3, 4, 5):  # dtable of rows of their own, dhidden, dh0
        assert torch.equal(a[number].view(9, -1)[kept], b[number].view(9, -1)[kept])


def test_an_index_outside_the_table_is_nan(device: emulated_gru.Device) -> None:
    args = case(3, 2, 9, parts=3, resets=False)
    args["index"][2], args["index"][5] = 7, -1
    output = cuda_kernels.forward(
        3, *(args[k] for k in ("table", "index", "reset", "w_hh", "b_hh", "h0")), 3, True, False
    )[0].view(3, 2, -1)
    assert output[0].isfinite().all()
    assert output[1].isnan().all() and output[2, 1].isnan().all()


@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda"),
                                           ("cuda", "reference")])  # fmt: skip
def test_any_forward_with_any_backward(
    device: emulated_gru.Device, first: str, second: str
) -> None:
    x, h0, w = torch.randn(4, 6, 8), torch.randn(1, 4, 21), weights(8, 21)
    leaves = [a.requires_grad_() for a in (x, h0, *w)]

    def grads(first: str, second: str) -> tuple[Tensor, ...]:
        with fastlm.use_backend(first):
            out, h_n = fastlm.gru(leaves[0], leaves[1], leaves[2:], batch_first=True)
        with fastlm.use_backend(second):
            return torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)

    for a, b in zip(grads(first, second), grads("reference", "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_state_no_bias(device: emulated_gru.Device, forced: None) -> None:
    x, (w_ih, w_hh, *_) = torch.randn(3, 4, 5), weights(5, 9)
    call = ((x, w_ih, w_hh, None, None, None, None), (True, True), "gates", "ieee")
    got = autograd.apply(autograd.DENSE, *call)[0]
    with fastlm.use_backend("reference"):
        want = autograd.apply(autograd.DENSE, *call)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skipped, exchange", [(1, "grid"), (2, "grid"), (3, "grid"),
                                               (2, "clusters")], indirect=["exchange"])  # fmt: skip
def test_the_emulation_sees_a_missing_barrier(device: emulated_gru.Device, skipped: int) -> None:
    """Of a grid 1: before the first step. 2: states are gathered. 3, and 2 of a cluster: sums."""
    args = case(9, 3, 40, parts=3, resets=False)
    want = run(args, 3)[:3]
    wrong = 0
    for seed in range(1, 6):
        device.reset(seed=seed, skipped_barrier=skipped)
        try:
            got = run(args, 3)[:3]
        except RuntimeError:
            wrong += 1
            continue
        wrong += any(not torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert wrong
