"""The recurrence in Triton: what the tests of all backends do not ask.

On a GPU where there is one, else in Triton's interpreter, which test_triton_interpreted.py starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_embedding_gru import case, ours, plain
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.embedding_gru import reference, triton_recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if "triton" not in dispatch.ready("embedding_gru", DEVICE):
    why = fastlm.backends()["embedding_gru"]["triton"]
    pytest.skip(f"{why}; test_triton_interpreted.py runs this file", allow_module_level=True)

from fastlm.ops.embedding_gru import triton_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
ROWS = 11  # of the table


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def as_accurate(got: tuple[Tensor, ...], theirs: Any, truth: Any) -> None:
    """The rule of `testing.check`, for functions without autograd."""
    for index, (a, b, want) in enumerate(zip(got, theirs, truth, strict=True)):
        allowed = 2 * testing.error(b.double(), want)
        allowed += testing.FLOOR_EPS * torch.finfo(b.dtype).eps * float(want.abs().max())
        assert testing.error(a.double(), want) <= allowed, f"result {index}"


def recurrence(batch: int, length: int, hidden: int) -> dict[str, Any]:
    """Arguments of a forward; float16 numbers, which every weight can hold."""
    tokens = batch * length
    return dict(
        table=torch.randn(ROWS, 3 * hidden),
        index=torch.randint(0, ROWS, (tokens,)),
        reset=(torch.rand(tokens) < 0.3).to(torch.uint8),
        w_hh=(torch.randn(3 * hidden, hidden) / hidden**0.5).half().float(),
        b_hh=torch.randn(3 * hidden),
        h0=torch.randn(batch, hidden),
    )


def both_passes(
    module: Any, args: dict[str, Any], upstream: tuple[Tensor, Tensor], *layout: Any
) -> tuple[Tensor, ...]:
    """output, h_n, gates, dtable, dhidden, dh0, dbias."""
    output, h_n, gates = module.forward(**args, **named(layout))
    dtable, dhidden, dh0, dbias = module.backward(
        *(d.to(output.dtype) for d in upstream), args["index"], args["table"].shape[0],
        args["reset"], args["w_hh"], args["h0"], output, gates, *layout,
    )  # fmt: skip
    return output, h_n, gates, dtable, dhidden, dh0, dbias


def named(layout: tuple[int, bool, bool]) -> dict[str, Any]:
    return dict(zip(("batch", "batch_first", "reverse"), layout, strict=True))


def changed(args: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    floats = {k: change(v) for k, v in args.items() if v is not None and v.is_floating_point()}
    return {**args, **floats}


def between_nans(value: Tensor) -> Tensor:
    """The same values; what is read outside them shows up, also when it is multiplied by 0."""
    wide = torch.full((value.numel() + 256,), torch.nan, dtype=value.dtype)
    wide[128:-128] = value.reshape(-1)
    return wide[128:-128].view(value.shape)


def upstream(batch: int, length: int, hidden: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch * length, hidden), torch.randn(batch, hidden)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 7, 37, 12, 19), (67, 2, 11, 5, 33)])
def test_the_op_and_all_its_gradients(dtype: torch.dtype, shape: tuple, poisoned: None) -> None:
    # check draws on the CPU
    with fastlm.use_backend("triton"), torch.device("cpu"):
        testing.check(ours, plain, [a.to(DEVICE) for a in case(*shape, dtype)])


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("reverse", (True, False))
@pytest.mark.parametrize("missing", [(), ("reset", "b_hh"), ("index", "h0"), ("index", "reset")])
def test_the_recurrence_in_every_layout(
    batch_first: bool, reverse: bool, missing: tuple[str, ...], poisoned: None
) -> None:
    sizes = (5, 4, 21)
    args = {**recurrence(*sizes), **dict.fromkeys(missing)}
    if "index" in missing:
        args["table"] = torch.randn(20, 63)
    into, layout = upstream(*sizes), (5, batch_first, reverse)
    args, into = changed(args, between_nans), (between_nans(into[0]), between_nans(into[1]))
    got = both_passes(triton_kernels, args, into, *layout)
    theirs = both_passes(reference, args, into, *layout)
    exact = both_passes(reference, changed(args, Tensor.double), into, *layout)
    as_accurate(got, theirs, exact)
    if not missing:
        again = both_passes(triton_kernels, args, into, *layout)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_products_of_short_weights_have_the_digits_of_float32(dtype: torch.dtype) -> None:
    """Against float64: as good as the float32 reference, the state is not rounded to 16 bits."""
    sizes, layout = (3, 5, 48), (3, True, False)
    args = recurrence(*sizes)
    args["w_hh"] = args["w_hh"].to(dtype).float()
    into = upstream(*sizes)
    into = (into[0] * 1e-7, into[1] * 1e-7)  # less than float16 holds
    stored = {**args, "w_hh": args["w_hh"].to(dtype)}
    got = both_passes(triton_kernels, stored, into, *layout)
    theirs = both_passes(reference, args, into, *layout)
    exact = both_passes(reference, changed(args, Tensor.double), into, *layout)
    as_accurate(got, theirs, exact)


@pytest.mark.parametrize("bad", (ROWS, -1, 2**40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_row_that_is_nan_stays_alone(bad: int, dtype: torch.dtype) -> None:
    """A token out of range: NaN in its row, from there to the next reset; all else bit for bit."""
    batch, length, hidden = 4, 6, 19
    args, into = recurrence(batch, length, hidden), upstream(batch, length, hidden)
    args["w_hh"] = args["w_hh"].to(dtype)
    args["reset"].zero_().view(batch, length)[1, 4] = 1
    index = args["index"].view(batch, length)
    index[:, :] = torch.arange(length)  # a row of the table for each step
    index[1] = torch.tensor([6, 7, bad, 8, 9, 9])  # and others for this row
    good = {**args, "index": torch.where(args["index"] == bad, 10, args["index"])}
    whole = both_passes(triton_kernels, good, into, batch, True, False)
    output, h_n, gates, dtable, dhidden, dh0, _ = both_passes(
        triton_kernels, args, into, batch, True, False
    )
    assert not any(x.isnan().any() for x in whole)
    nan = torch.zeros(batch, length, dtype=torch.bool)
    nan[1, 2:4] = True
    for value, same in ((output, 0), (gates, 2)):
        value = value.view(batch, length, -1)
        assert torch.equal(value.isnan().any(-1), nan)
        assert torch.equal(value[~nan], whole[same].view(batch, length, -1)[~nan])
    assert torch.equal(h_n, whole[1])
    nan[1, :2] = True  # the gradient flows back
    assert torch.equal(dhidden.view(batch, length, -1).isnan().any(-1), nan)
    rest = whole[4].view(batch, length, -1)[~nan]
    assert torch.equal(dhidden.view(batch, length, -1)[~nan], rest)
    assert dtable.isnan().any(-1).tolist() == [i in (6, 7, 8) for i in range(ROWS)]
    assert torch.equal(dtable[:6], whole[3][:6])
    others = torch.tensor([0, 2, 3])
    assert dh0[1].isnan().all() and torch.equal(dh0[others], whole[5][others])


def test_a_reset_hides_a_nan_state() -> None:
    args = recurrence(3, 2, 19)
    args["reset"] = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.uint8)
    args["h0"][1] = torch.nan
    output, h_n, *_, dh0, dbias = both_passes(
        triton_kernels, args, upstream(3, 2, 19), 3, True, False
    )
    assert not any(x.isnan().any() for x in (output, h_n, dh0, dbias))
    assert not dh0[1].any() and dh0[0].all()


def test_the_batch_does_not_change_a_row() -> None:
    args, into = recurrence(70, 2, 19), upstream(70, 2, 19)
    many = both_passes(triton_kernels, args, into, 70, True, False)
    for row in (0, 17, 69):
        mine = slice(2 * row, 2 * row + 2)
        part = {**args, "h0": args["h0"][row : row + 1]}
        part |= {"index": args["index"][mine], "reset": args["reset"][mine]}
        alone = both_passes(
            triton_kernels, part, (into[0][mine], into[1][row : row + 1]), 1, True, False
        )
        for which in (0, 2, 4):
            torch.testing.assert_close(alone[which], many[which][mine], rtol=0, atol=0)


def test_sums_of_shared_rows() -> None:
    """Rows with no token, with one, and with more than a program reads at once."""
    tokens, hidden = 5 * triton_kernels.POSITIONS + 3, 45
    index = torch.randint(2, 4, (tokens,))
    index[7], index[8], index[9] = 0, -3, 6
    dhidden, dn = torch.randn(tokens, 3 * hidden), torch.randn(tokens, hidden)
    dhidden[8:10] = torch.nan  # out of range: in no row
    got = triton_kernels._segment_sum(dhidden, dn, index, 6)
    full = torch.cat((dhidden[:, : 2 * hidden], dn), -1)
    kept = (index >= 0) & (index < 6)
    theirs, exact = (
        full.new_zeros(6, 3 * hidden, dtype=d).index_add_(0, index[kept], full[kept].to(d))
        for d in (torch.float32, torch.float64)
    )
    as_accurate((got,), (theirs,), (exact,))
    assert not got[[1, 4, 5]].any() and torch.equal(got[0], full[7])
    assert torch.equal(got, triton_kernels._segment_sum(dhidden, dn, index, 6))


def test_one_graph_serves_other_values() -> None:
    """Nothing waits for the device and no launch depends on a value: both passes can be captured.
    In the interpreter, a second call."""
    sizes, layout = (4, 5, 32), (4, True, False)
    args, into = recurrence(*sizes), upstream(*sizes)

    def run() -> tuple[Tensor, ...]:
        return both_passes(triton_kernels, args, into, *layout)

    got = run()
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            got = run()
    for name, value in recurrence(*sizes).items():
        args[name].copy_(value)
    if DEVICE == "cuda":
        graph.replay()
    else:
        got = run()
    exact = both_passes(reference, changed(args, Tensor.double), into, *layout)
    as_accurate(got, both_passes(reference, args, into, *layout), exact)


def test_the_op_never_waits_for_the_device() -> None:
    args = [a.to(DEVICE).requires_grad_(a.is_floating_point()) for a in case(3, 4, 11, 5, 19)]
    if DEVICE == "cuda":
        with fastlm.use_backend("triton"):
            ours(*args)[0].sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
    try:
        with fastlm.use_backend("triton"):
            output, h_n = ours(*args, dedupe="vocab")
            grads = torch.autograd.grad(output.sum() + h_n.sum(), args[1:])
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    want = torch.autograd.grad(sum(x.sum() for x in plain(*args)), args[1:])
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


def test_addresses_beyond_2_31() -> None:
    """The last step of one row with 2^31 gate values before it; on the CPU pages are never used
    that nothing is written to."""
    hidden = 16
    tokens, rows = 2**31 // (4 * hidden) + 2, 2**31 // (3 * hidden) + 2
    args, into = recurrence(1, 1, hidden), upstream(1, 1, hidden)
    want = both_passes(triton_kernels, {**args, "index": torch.zeros_like(args["index"])},
                       into, 1, True, False)  # fmt: skip
    table, index = torch.empty(rows, 3 * hidden), torch.zeros(tokens, dtype=torch.int64)
    reset = torch.zeros(tokens, dtype=torch.uint8)
    table[-1], index[-1], reset[-1] = args["table"][0], rows - 1, args["reset"][0]
    output, gates = torch.empty(tokens, hidden), torch.empty(tokens, 4 * hidden)
    output[-2] = args["h0"][0]
    shape = triton_kernels._shape_of_a_program(1, hidden, torch.float32)
    strides = (tokens, 1, tokens)  # of rows, of steps, of rows of the state before
    triton_kernels.forward_kernel[(1,)](
        output, gates, table, index, reset, args["w_hh"], args["b_hh"], output, tokens - 1,
        tokens - 2, rows, 1, hidden, *strides, **shape,
    )  # fmt: skip
    assert torch.equal(output[-1:], want[0]) and torch.equal(gates[-1:], want[2])
    del table
    doutput = torch.empty(tokens, hidden)
    doutput[-1] = into[0]
    dhidden, dn = torch.empty(tokens, 3 * hidden), torch.empty(tokens, hidden)
    carry = into[1].clone()
    for gates_too in (True, False):
        triton_kernels.backward_kernel[(1,)](
            carry, dhidden, dn, doutput, gates, reset, args["w_hh"], output, tokens - 1,
            tokens - 2, tokens - 1, 1, hidden, hidden, *strides,
            PRODUCT=not gates_too, GATES=gates_too, **shape,
        )  # fmt: skip
    assert torch.equal(dhidden[-1:], want[4]) and torch.equal(carry, want[5])


def test_refuses() -> None:
    with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match="not float64"):
        ours(*(a.to(DEVICE) for a in case(2, 3, 9, 4, 6, torch.float64)))

    def of(hidden: int, rows: int) -> str | None:
        weight = torch.empty(rows, 1, device="meta")
        return triton_recurrence.refuses(torch.empty(3 * hidden, hidden, device="meta"), weight)

    assert of(512, 200_000) is None and of(2**27, 9) is None
    for hidden, rows in ((0, 9), (2**28, 9), (512, 2**28)):
        assert "hidden units" in str(of(hidden, rows))


def test_it_is_never_a_default() -> None:
    # enough tokens for the op: fewer are embedded first
    args = [a.to(DEVICE) for a in case(32, 32, 9, 64, 64)]
    for step in fastlm.explain("embedding_gru", args[0], args[1], *args[3:]):
        assert step.answers["triton"] == dispatch.NOT_PROVEN and step.chosen != "triton"
