"""gru over sequences of different lengths: PackedSequence, cu_seqlens, lengths, resets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import fastlm
from fastlm import dispatch, testing

BACKENDS = dispatch.ready("ragged_gru")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
STACKS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "bias": False},
]


def pair(inputs: int, hidden: int, **options: Any) -> tuple[fastlm.nn.GRU, nn.GRU]:
    theirs = nn.GRU(inputs, hidden, **options)
    mine = fastlm.nn.GRU(inputs, hidden, **options)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


def states(module: nn.RNNBase, batch: int) -> Tensor:
    directions = 2 if module.bidirectional else 1
    return torch.randn(module.num_layers * directions, batch, module.hidden_size)


def weights_of(module: nn.GRU) -> list[Tensor]:
    return [w.detach() for w in module._flat_weights]


@every_backend
@pytest.mark.parametrize("options", STACKS)
@pytest.mark.parametrize("in_order", (True, False))
@pytest.mark.parametrize("given", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packed_is_as_exact_as_torch(
    backend: str, options: dict, in_order: bool, given: bool, dtype: torch.dtype, poisoned: None
) -> None:
    """Outputs and every gradient, of input, hx and weights, against float64."""
    lengths = [9, 7, 7, 2, 1] if in_order else [2, 9, 1, 7, 7]
    mine, theirs = pair(6, 19, **options)
    names = [n for n, _ in theirs.named_parameters()]
    x = torch.randn(5, 9, 6) if theirs.batch_first else torch.randn(9, 5, 6)
    hx = states(theirs, 5)

    def run(module: nn.Module, x: Tensor, hx: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        packed = rnn.pack_padded_sequence(
            x, lengths, batch_first=theirs.batch_first, enforce_sorted=in_order
        )
        out, h_n = torch.func.functional_call(
            module, dict(zip(names, w, strict=True)), (packed, hx) if given else (packed,)
        )
        return out.data, h_n

    args = [a.detach().to(dtype) for a in (x, hx, *theirs.parameters())]
    with dispatch.use_backend(backend):
        testing.check(lambda *a: run(mine, *a), lambda *a: run(theirs, *a), args)


def test_packed_layout_is_kept() -> None:
    mine, theirs = pair(6, 5, bidirectional=True)
    x = rnn.pack_sequence([torch.randn(n, 6) for n in (2, 6, 1, 6)], enforce_sorted=False)
    got, want = mine(x)[0], theirs(x)[0]
    assert isinstance(got, rnn.PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    padded, lengths = rnn.pad_packed_sequence(got)
    assert padded.shape == (6, 4, 10) and lengths.tolist() == [2, 6, 1, 6]
    one = rnn.pack_sequence([torch.randn(4, 6)])
    for a, b in zip(mine(one), theirs(one), strict=True):
        torch.testing.assert_close(a, b)


def test_packed_equals_each_sequence_alone() -> None:
    """Bitwise, at sizes where the library's products take other kernels for few rows."""
    mine = fastlm.nn.GRU(33, 40, num_layers=2)
    pieces = [torch.randn(n, 33) for n in (1, 2, 3, 5, 13, 70)]
    # without it torch's kernel would take the shortest ones
    with dispatch.use_backend(BACKENDS[0]):
        out, h_n = mine(rnn.pack_sequence(pieces, enforce_sorted=False))
        for row, (piece, got) in enumerate(zip(pieces, rnn.unpack_sequence(out), strict=True)):
            alone, last = mine(piece)
            assert torch.equal(got, alone)
            assert torch.equal(h_n[:, row], last)


def alone(module: nn.Module, pieces: list[Tensor], hx: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, lasts = [], []
    for row, piece in enumerate(pieces):
        h0 = None if hx is None else hx[:, row]
        if len(piece):
            out, last = module(piece, h0)
        else:
            width = module.hidden_size * (2 if module.bidirectional else 1)
            out, last = piece.new_zeros(0, width), states(module, 1)[:, 0] * 0 if h0 is None else h0
        outs.append(out)
        lasts.append(last)
    return torch.cat(outs), torch.stack(lasts, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", STACKS[:2])
@pytest.mark.parametrize("given", (True, False))
def test_documents_are_each_alone(backend: str, options: dict, given: bool) -> None:
    """cu_seqlens: outputs, h_n and the gradients of input and hx are each document's own."""
    lengths = [3, 1, 17, 0, 5, 2, 40]
    module = fastlm.nn.GRU(12, 21, **options)
    pieces = [torch.randn(n, 12, requires_grad=True) for n in lengths]
    hx = states(module, len(lengths)).requires_grad_() if given else None
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)]).int()
    leaves = pieces if hx is None else [*pieces, hx]
    with dispatch.use_backend(backend):
        got = module(torch.cat(pieces), hx, cu_seqlens=offsets)
        want = alone(module, pieces, hx)
        upstream = [torch.randn_like(w) for w in want]
        grads = torch.autograd.grad(got, leaves, upstream)
        own = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    for a, b in zip((*got, *grads), (*want, *own), strict=True):
        b = torch.zeros_like(a) if b is None else b
        if backend == "cpu":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("dedupe", ("batch", "vocab", "off"))
@pytest.mark.parametrize("save", ("gates", "hidden"))
def test_embedded_documents(backend: str, dedupe: str, save: str, poisoned: None) -> None:
    lengths, v = [4, 1, 0, 9], 11
    tokens = torch.randint(0, v, (14,))
    offsets = torch.tensor([0, 4, 5, 5, 14]).int()
    w = weights_of(nn.GRU(5, 19))

    def ours(weight: Tensor, h0: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        return fastlm.embedding_gru(
            tokens, weight, *w, h0=h0, cu_seqlens=offsets, dedupe=dedupe, save=save, padding_idx=3
        )

    def plain(weight: Tensor, h0: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        outs, lasts = [], []
        for row, piece in enumerate(tokens.split(lengths)):
            state = h0[None, row : row + 1]
            if len(piece):
                x = torch.nn.functional.embedding(piece, weight, padding_idx=3)
                out, state = torch.gru(
                    x[:, None], state, list(w), True, 1, 0.0, False, False, False
                )
                outs.append(out[:, 0])
            lasts.append(state[0, 0])
        return torch.cat(outs), torch.stack(lasts)

    with dispatch.use_backend(backend):
        testing.check(ours, plain, (torch.randn(v, 5), torch.randn(4, 19), *w))


@every_backend
@pytest.mark.parametrize("options", STACKS)
def test_lengths_are_a_packed_sequence(backend: str, options: dict, poisoned: None) -> None:
    mine, theirs = pair(6, 19, **options)
    lengths, shape = torch.tensor([4, 7, 1, 7]), (4, 7, 6) if theirs.batch_first else (7, 4, 6)
    hx = states(theirs, 4)
    names = [n for n, _ in theirs.named_parameters()]

    def ours(x: Tensor, hx: Tensor, *w: Tensor) -> Any:
        return torch.func.functional_call(
            mine, dict(zip(names, w, strict=True)), (x, hx), {"lengths": lengths}
        )

    def plain(x: Tensor, hx: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        packed = rnn.pack_padded_sequence(
            x, lengths, batch_first=theirs.batch_first, enforce_sorted=False
        )
        out, h_n = torch.func.functional_call(
            theirs, dict(zip(names, w, strict=True)), (packed, hx)
        )
        return rnn.pad_packed_sequence(out, batch_first=theirs.batch_first)[0], h_n

    with dispatch.use_backend(backend):
        testing.check(ours, plain, (torch.randn(shape), hx, *weights_of(theirs)))
        empty, h_n = mine(torch.randn(shape), hx, lengths=torch.tensor([0, 7, 0, 0]))
    row = empty[0] if theirs.batch_first else empty[:, 0]
    assert row.abs().sum() == 0 and torch.equal(h_n[:, 0], hx[:, 0])


@pytest.mark.parametrize("options", STACKS)
@pytest.mark.parametrize("split", (True, False))
def test_padded_rows_on_a_gpu_are_the_same(options: dict, split: bool) -> None:
    """Where lengths stand on a GPU whole rows are computed: the route, taken here by hand."""
    from fastlm.ops.embedding_gru import arguments, sequences, stack

    mine, _ = pair(6, 19, **options)
    first = mine.batch_first
    lengths, hx = torch.tensor([4, 7, 0, 1]), states(mine, 4)
    x = torch.randn(4, 7, 6) if first else torch.randn(7, 4, 6)
    starts = (torch.rand(x.shape[:2]) < 0.4).to(torch.uint8) if split else None
    cells = arguments.cells_of("gru", mine.weights(), len(hx), mine.bias)
    how = stack.Options(first, 0.0, False, "gates", "ieee", 0.0)

    def run(layout: sequences.Layout, flat: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), hx.clone().requires_grad_()]
        given = leaves[0].reshape(-1, 6) if flat else leaves[0]
        out, h_n = stack._stack(given, leaves[1], cells, mine.bidirectional, layout, how)
        out = out.view(*x.shape[:2], -1)
        loss = out.square().sum() + h_n.sum()
        return [out, h_n, *torch.autograd.grad(loss, [*leaves, *mine.parameters()])]

    where = sequences.padded("gru", lengths, x.shape[:2], first)
    side_by_side = run(sequences.Layout(4, where, starts, None), True)
    whole = run(sequences.Layout(4, None, starts, None, lengths), False)
    for a, b in zip(whole, side_by_side, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bidirectional", (False, True))
def test_resets_inside_documents(bidirectional: bool) -> None:
    """A start in the middle splits a document; one before its first token leaves hx out."""
    module = fastlm.nn.GRU(6, 21, bidirectional=bidirectional)
    x, hx = torch.randn(12, 6), states(module, 2)
    starts = torch.zeros(12, dtype=torch.bool)
    starts[[3, 5]] = True
    got, h_n = module(x, hx, cu_seqlens=torch.tensor([0, 5, 12]).int(), reset=starts)
    zero = torch.zeros_like(hx)

    def outputs(*begin: Tensor) -> Tensor:
        pieces = zip((x[:3], x[3:5], x[5:]), begin, strict=True)
        # without it torch's kernel would take the shortest ones
        with dispatch.use_backend(BACKENDS[0]):
            return torch.cat([module(piece, state)[0] for piece, state in pieces])

    want = outputs(hx[:, 0], zero[:, 0], zero[:, 1])[:, :21]
    assert torch.equal(got[:, :21], want)
    assert torch.equal(h_n[0], torch.stack((want[4], want[11])))
    if bidirectional:
        assert torch.equal(got[:, 21:], outputs(zero[:, 0], hx[:, 0], hx[:, 1])[:, 21:])


def test_one_long_row_on_a_gpu_is_the_same() -> None:
    """Where the offsets stand on a GPU their values are not read: starts in one row."""
    from fastlm.ops.embedding_gru import sequences

    offsets = torch.tensor([0, 4, 4, 9]).int()
    assert sequences.one_row(offsets, 9).tolist() == [[1, 0, 0, 0, 1, 0, 0, 0, 0]]
    output = torch.arange(9.0)[:, None].expand(9, 2)
    assert sequences.final_states(output, offsets)[:, 0].tolist() == [3, 0, 8]
    assert sequences.final_states(output, offsets, True)[:, 0].tolist() == [0, 0, 4]


@pytest.mark.parametrize("kind", ("packed", "cu_seqlens", "lengths", "dense"))
def test_nan_stays_in_its_sequence(kind: str) -> None:
    """Forward, and the gradient of every other sequence's input."""
    lengths = [5, 8, 3]
    module = fastlm.nn.GRU(6, 21, num_layers=2, bidirectional=True)
    clean = [torch.randn(n, 6) for n in lengths]
    dirty = [clean[0], torch.full_like(clean[1], float("nan")), clean[2]]

    def run(pieces: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        leaves = [p.clone().requires_grad_() for p in pieces]
        padded = rnn.pad_sequence(leaves)
        if kind == "packed":
            out, h_n = module(rnn.pack_sequence(leaves, enforce_sorted=False))
            outs = rnn.unpack_sequence(out)
        elif kind == "cu_seqlens":
            out, h_n = module(torch.cat(leaves), cu_seqlens=torch.tensor([0, 5, 13, 16]).int())
            outs = list(out.split(lengths))
        else:
            more = {"lengths": torch.tensor(lengths)} if kind == "lengths" else {}
            out, h_n = module(padded, **more)
            outs = [out[:n, row] for row, n in enumerate(lengths)]
        grads = torch.autograd.grad([o.sum() for o in outs], leaves)
        return [*outs, *grads], h_n

    (want, want_h), (got, got_h) = run(clean), run(dirty)
    for position in (0, 2, 3, 5):
        assert torch.equal(want[position], got[position])
    assert torch.equal(want_h[:, ::2], got_h[:, ::2])
    assert got[1].isnan().all() and got_h[:, 1].isnan().all()


BAD = [
    ({"cu_seqlens": torch.tensor([0, 3, 6])}, TypeError, "must be int32, got int64; call .int()"),
    ({"cu_seqlens": torch.tensor([0, 4, 2, 6]).int()}, ValueError, "ascending from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, "ascending from 0 to 6"),
    ({"cu_seqlens": torch.tensor([1, 6]).int()}, ValueError, "ascending from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 9]).int()}, ValueError, "ascending from 0 to 6"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"\[documents \+ 1\]"),
    ({"cu_seqlens": torch.zeros(2, 2).int()}, ValueError, r"\[documents \+ 1\]"),
    ({"cu_seqlens": [0, 6]}, TypeError, "must be a tensor, got list"),
    ({"cu_seqlens": torch.tensor([0, 6]).int(), "hx": torch.zeros(1, 2, 5)}, ValueError,
     r"hx must be \[1, 1, 5\], got \[1, 2, 5\]"),
    ({"lengths": torch.tensor([6])}, ValueError, "with lengths"),
]  # fmt: skip
BAD_BATCH = [
    ({"lengths": torch.tensor([3, 7])}, ValueError, r"lengths\[1\] must be in \[0, 6\]"),
    ({"lengths": torch.tensor([-1, 2])}, ValueError, r"lengths\[0\] must be in \[0, 6\]"),
    ({"lengths": torch.tensor([3, 3, 3])}, ValueError, r"lengths must be \[2\]"),
    ({"lengths": torch.tensor([3.0, 3.0])}, TypeError, "integer tensor"),
    ({"cu_seqlens": torch.tensor([0, 6]).int()}, ValueError, "input with cu_seqlens"),
    ({"reset": torch.zeros(6, 3)}, ValueError, r"reset must be \[6, 2\]"),
    ({"segment_ids": torch.zeros(2, 6)}, ValueError, r"segment_ids must be \[6, 2\]"),
    ({"hx": torch.zeros(1, 3, 5)}, ValueError, r"hx must be \[1, 2, 5\], got \[1, 3, 5\]"),
    ({"hx": torch.zeros(1, 2, 5).double()}, TypeError, "hx must be float32"),
]


@pytest.mark.parametrize("change, error, message", BAD + BAD_BATCH)
def test_rejects(change: dict, error: type[Exception], message: str) -> None:
    x = torch.randn(6, 4) if any(change is c for c, _, _ in BAD) else torch.randn(6, 2, 4)
    arguments = {"hx": None, **change}
    hx = arguments.pop("hx")
    with pytest.raises(error, match=message):
        fastlm.gru(x, hx, weights_of(nn.GRU(4, 5)), **arguments)
    packed = rnn.pack_sequence([torch.randn(3, 4)])
    if "lengths" in arguments:
        with pytest.raises(ValueError, match="None for a PackedSequence"):
            fastlm.gru(packed, None, weights_of(nn.GRU(4, 5)), **arguments)


def test_the_op_trusts_no_positions() -> None:
    """Under torch.compile values are not read before the op: it refuses what lies outside."""
    w = weights_of(nn.GRU(4, 5))
    x = torch.randn(6, 4)
    op = torch.ops.fastlm.ragged_gru

    def run(first: list[int], lengths: list[int], index: Any = None, offsets: Any = None) -> None:
        op(x, *w, None, None, index, torch.tensor(first), torch.tensor(lengths), offsets, 1,
           False, False)  # fmt: skip

    run([0, 3], [3, 3])
    for first, lengths in (([0, 4], [3, 3]), ([-1, 3], [3, 3]), ([0, 0], [3, -1]), ([0], [7])):
        with pytest.raises(IndexError, match="fastlm.ragged_gru"):
            run(first, lengths)
    with pytest.raises(IndexError, match="index must be in"):
        run([0], [2], torch.tensor([0, 6]))
    with pytest.raises(IndexError, match="lengths must be in"):
        run([0], [3], None, torch.tensor([0, 1]))
    torch.library.opcheck(
        op.default,
        (x, *w, None, None, None, torch.tensor([0, 3]), torch.tensor([3, 3]), None, 1, True, True),
    )


@pytest.mark.parametrize("threads", (2, 3))
def test_threads_do_not_change_a_bit(threads: int) -> None:
    module = fastlm.nn.GRU(64, 144, bidirectional=True)
    pieces = [torch.randn(n, 64) for n in (30, 4, 12, 12)]
    packed = rnn.pack_sequence(pieces, enforce_sorted=False)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out, h_n = module(packed)
            grads = torch.autograd.grad(out.data.square().sum(), list(module.parameters())[1:2])
            results.append((out.data, h_n, *grads))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(results[0][2], results[1][2])
