"""gru: precision, save, zoneout, autocast, and derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.nn.utils import rnn

import fastlm
from fastlm import dispatch, matmul, philox, testing
from fastlm.dispatch import ready
from fastlm.ops.embedding_gru import cpu_kernels, differentiable, reference

BACKENDS = dispatch.ready("gru")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def weights(inputs: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [w.detach().to(dtype) for w in nn.GRU(inputs, hidden)._flat_weights]


def plain_gru(x: Tensor, hx: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.gru(x, hx, list(w), True, 1, 0.0, False, False, False)


def rounding_gru(x: Tensor, hx: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    """By definition: operands of every product to the nearest bfloat16, derivative 1."""

    def near(v: Tensor) -> Tensor:
        return v + (v.bfloat16().to(v.dtype) - v).detach()

    w_ih, w_hh, b_ih, b_hh = w
    h, outputs = hx[0], []
    for step in x:
        x_r, x_z, x_n = (near(step) @ near(w_ih).t() + b_ih).chunk(3, -1)
        h_r, h_z, a = (near(h) @ near(w_hh).t() + b_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * a)
        h = n + z * (h - n)
        outputs.append(h)
    return torch.stack(outputs), h[None]


@every_backend
@pytest.mark.parametrize("precision", ("ieee", "auto", "bf16x3", "tf32"))
def test_on_the_cpu_precisions_are_ieee(backend: str, precision: str) -> None:
    args = (torch.randn(7, 3, 12), torch.randn(1, 3, 19), *weights(12, 19))
    with dispatch.use_backend(backend):
        testing.check(lambda x, hx, *w: fastlm.gru(x, hx, w, precision=precision), plain_gru, args)


@every_backend
@pytest.mark.parametrize("save", ("gates", "hidden"))
def test_bf16_rounds_the_operands(backend: str, save: str, poisoned: None) -> None:
    """Results of the definition, to the noise of bfloat16 states that round the other way."""
    x, hx, w = torch.randn(9, 3, 12), torch.randn(1, 3, 21), weights(12, 21)
    leaves = [t.requires_grad_() for t in (x, hx, *w)]

    def results(call: Any) -> list[Tensor]:
        out, h_n = call(x, hx, *w)
        return [out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)]

    with dispatch.use_backend(backend):
        got = results(lambda x, hx, *w: fastlm.gru(x, hx, w, precision="bf16", save=save))
    want, exact = results(rounding_gru), results(plain_gru)
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == torch.float32
        scale = b.abs().max()
        # gradients of products of rounded gradients differ from the definition by that rounding
        assert (a - b).abs().max() <= 2**-8 * scale
        assert (a - c).abs().max() <= 2**-5 * c.abs().max()
    assert torch.equal(got[0][0], got[0][0]) and (got[0] - exact[0]).abs().max() > 1e-4
    # the first step has no rounded state of its own yet: the definition to the last bits
    torch.testing.assert_close(got[0][0], want[0][0], rtol=2e-6, atol=2e-6)


@every_backend
def test_bf16_rounds_the_operands_of_the_backward(backend: str) -> None:
    """Of one token, a weight's gradient is a product of two bfloat16 values, exact in float32."""
    x, hx, w = torch.randn(1, 1, 12), torch.randn(1, 1, 21), weights(12, 21)
    leaves = [t.requires_grad_() for t in w[:2]]
    with dispatch.use_backend(backend):
        out, _ = fastlm.gru(x, hx, w, precision="bf16")
        grads = torch.autograd.grad(out.square().sum(), leaves)
    for grad, operand in zip(grads, (x, hx), strict=True):
        factor = grad / operand.view(1, -1).bfloat16().float()
        torch.testing.assert_close(factor, factor.bfloat16().float(), rtol=1e-6, atol=0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("hidden", (5, 21, 48, 160))
def test_weights_in_bfloat16_are_those_widened(hidden: int, poisoned: None) -> None:
    """The compiled recurrence packs them in half the bytes; the bits of its results stay."""
    batch, steps = 11, 6
    table, b_hh = torch.randn(batch * steps, 3 * hidden), torch.randn(3 * hidden)
    w_hh = (torch.randn(3 * hidden, hidden) * hidden**-0.5).bfloat16()
    h0, dh_n = torch.randn(batch, hidden), torch.randn(batch, hidden)
    dout = torch.randn(batch * steps, hidden)
    results = []
    for w in (w_hh, w_hh.float()):
        out, h_n, gates = cpu_kernels.forward(table, None, None, w, b_hh, h0, batch, True, False)
        args = (dout, dh_n, None, len(table), None, w, h0, out, gates, batch, True, False)
        results.append((out, h_n, gates, *cpu_kernels.backward(*args)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("hidden", (5, 21, 48))
def test_pairs_are_products_of_the_rounded(hidden: int, poisoned: None) -> None:
    """Of packed pairs the kernel takes the products that the reference takes, to float32."""
    batch, steps = 13, 4
    table, b_hh = torch.randn(batch * steps, 3 * hidden), torch.randn(3 * hidden)
    w_hh = (torch.randn(3 * hidden, hidden) * hidden**-0.5).bfloat16()
    h0, dh_n = torch.randn(batch, hidden), torch.randn(batch, hidden)
    dout, dims = torch.randn(batch * steps, hidden), (batch, True, False, True)
    got = cpu_kernels.forward(table, None, None, w_hh, b_hh, h0, *dims)
    want = reference.forward(table, None, None, w_hh.float(), b_hh, h0, *dims)
    torch.testing.assert_close(got[2][::steps], want[2][::steps], rtol=1e-5, atol=1e-5)
    # a state on the edge between two bfloat16 values may round either way
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2**-9)
    saved = (h0, want[0], want[2], *dims)
    found = cpu_kernels.backward(dout, dh_n, None, len(table), None, w_hh, *saved)
    known = reference.backward(dout, dh_n, None, len(table), None, w_hh.float(), *saved)
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-6)
    last = torch.arange(batch) * steps + steps - 1
    torch.testing.assert_close(found[1][last], known[1][last], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
def test_auto_is_bf16_for_weights_in_bfloat16_where_that_is_faster() -> None:
    x, hx = torch.randn(30, 5, 16).bfloat16(), torch.randn(1, 5, 48).bfloat16()
    w = [value.bfloat16() for value in weights(16, 48)]
    with dispatch.use_backend("cpu"):
        auto, ieee, bf16 = (
            fastlm.gru(x, hx, w, precision=precision)[0] for precision in ("auto", "ieee", "bf16")
        )
        assert torch.equal(auto, bf16 if matmul.multiplies_pairs() else ieee)
        assert not torch.equal(ieee, bf16)
        wide = [value.float() for value in w]
        same = (fastlm.gru(x.float(), hx.float(), wide, precision=p)[0] for p in ("auto", "ieee"))
        assert torch.equal(*same)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("precision", ("auto", "ieee", "bf16"))
def test_bfloat16_weights_keep_a_row_and_a_sequence_alone(precision: str) -> None:
    w = [value.bfloat16() for value in weights(16, 70)]
    rows = [torch.randn(n, 16).bfloat16() for n in (9, 2, 5, 5, 1, 7, 3, 8, 6)]
    with dispatch.use_backend("cpu"):
        packed = rnn.pack_sequence(rows, enforce_sorted=False)
        together, h_n = fastlm.gru(packed, None, w, precision=precision)
        outputs, _ = rnn.pad_packed_sequence(together)
        threads = torch.get_num_threads()
        for number, row in enumerate(rows):
            torch.set_num_threads(1 + number % 3)
            alone, last = fastlm.gru(row[:, None], None, w, precision=precision)
            assert torch.equal(outputs[: len(row), number], alone[:, 0])
            assert torch.equal(h_n[:, number], last[:, 0])
        torch.set_num_threads(threads)


@every_backend
@pytest.mark.parametrize("precision", ("auto", "ieee", "bf16"))
def test_bfloat16_weights_are_as_accurate_as_plain(backend: str, precision: str) -> None:
    args = [torch.randn(7, 3, 12), torch.randn(1, 3, 33), *weights(12, 33)]
    with dispatch.use_backend(backend):
        testing.check(
            lambda x, hx, *w: fastlm.gru(x, hx, w, precision=precision),
            plain_gru,
            [value.bfloat16() for value in args],
        )


def test_bf16_backends_agree() -> None:
    x, w = torch.randn(40, 5, 16), weights(16, 48)
    pieces = rnn.pack_sequence([torch.randn(n, 16) for n in (9, 2, 5)], enforce_sorted=False)
    results = []
    for backend in BACKENDS:
        with dispatch.use_backend(backend):
            dense = fastlm.gru(x, None, w, precision="bf16")
            packed = fastlm.gru(pieces, None, w, precision="bf16")
            results.append((*dense, packed[0].data, packed[1]))
    for a, b in zip(*results[:2], strict=True):
        # a state on the edge between two bfloat16 values may round either way
        torch.testing.assert_close(a, b, rtol=0, atol=2**-9)


def test_bf16_embedding() -> None:
    tokens, table = torch.randint(0, 9, (3, 5)), torch.randn(9, 12)
    w = weights(12, 21)
    got, _ = fastlm.embedding_gru(tokens, table, *w, precision="bf16")
    want, _ = fastlm.gru(table[tokens], None, w, batch_first=True, precision="bf16")
    torch.testing.assert_close(got, want, rtol=0, atol=2**-9)
    assert not torch.equal(got, fastlm.embedding_gru(tokens, table, *w)[0])


@pytest.mark.parametrize(
    "backend, dtype",
    [(b, d) for b in BACKENDS for d in testing.FLOATS if (b, d) != ("cpu", torch.float64)],
)
def test_save_hidden(backend: str, dtype: torch.dtype) -> None:
    """Gates computed again: the same results, a fifth of the memory."""
    args = (torch.randn(7, 3, 12), torch.randn(1, 3, 19), *weights(12, 19))
    args = tuple(a.to(dtype) for a in args)
    with dispatch.use_backend(backend):
        testing.check(lambda x, hx, *w: fastlm.gru(x, hx, w, save="hidden"), plain_gru, args)

    kept: dict[str, int] = {}
    for save in ("gates", "hidden"):
        counted: list[int] = []
        leaves = [a.clone().requires_grad_() for a in args]
        own = {leaf.data_ptr() for leaf in leaves}

        def pack(t: Tensor, counted: list[int] = counted, own: set[int] = own) -> Tensor:
            counted.append(0 if t.data_ptr() in own else t.numel() * t.element_size())
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, dispatch.use_backend(backend):
            fastlm.gru(leaves[0], leaves[1], leaves[2:], save=save)
        kept[save] = sum(counted)
    size = args[0].element_size()
    assert kept["hidden"] == 7 * 3 * 19 * size
    assert kept["gates"] == kept["hidden"] + 7 * 3 * 4 * 19 * max(size, 4)


@pytest.mark.skipif("cpu" not in ready("gru"), reason="of the compiled kernel")
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_gates_computed_again_have_the_bits_of_the_forward(precision: str) -> None:
    tokens = torch.randint(0, 11, (50, 101))  # more than are taken at once
    starts = torch.rand(50, 101) < 0.1
    leaves = [torch.randn(11, 6), *weights(6, 9)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = []
    for save in ("gates", "hidden"):
        with dispatch.use_backend("cpu"):
            options = {"save": save, "reset": starts, "precision": precision}
            out = fastlm.embedding_gru(tokens, *leaves, **options)[0]
            found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def zoned(x: Tensor, w: list[Tensor], keep: Any, reset: Tensor | None = None) -> Tensor:
    h, outputs = x.new_zeros(x.shape[1], w[1].shape[1]), []
    for t, step in enumerate(x):
        if reset is not None:
            h = torch.where(reset[t][:, None], 0.0, h)
        new = torch.gru_cell(step, h, *w)
        k = keep[t] if isinstance(keep, Tensor) else keep
        h = k * h + (1 - k) * new
        outputs.append(h)
    return torch.stack(outputs)


def test_zoneout_keeps_old_states() -> None:
    """In training whole units keep their value at about the asked rate; else the expectation."""
    module = fastlm.nn.GRU(6, 50, zoneout=0.3).double()
    x, w = torch.randn(20, 8, 6).double(), [p.detach() for p in module.parameters()]
    out, h_n = module.train()(x)
    same = out[1:] == out[:-1]
    assert 0.27 < same.double().mean() < 0.33
    assert torch.equal(h_n[0], out[-1])
    first = (out[0] == 0).double()
    keep = torch.cat((first[None], same.double()))
    torch.testing.assert_close(out, zoned(x, w, keep))
    torch.testing.assert_close(module.eval()(x)[0], zoned(x, w, 0.3))
    plain = nn.GRU(6, 50).double()
    plain.load_state_dict(module.state_dict())
    module.zoneout = 0.0
    torch.testing.assert_close(module(x)[0], plain(x)[0])


def test_zoneout_is_seeded_and_differentiable() -> None:
    module = fastlm.nn.GRU(3, 4, num_layers=2, bidirectional=True, zoneout=0.4).double()
    x = torch.randn(5, 2, 3).double().requires_grad_()

    def run(x: Tensor, *w: Tensor) -> Any:
        torch.manual_seed(5)
        names = [n for n, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, w, strict=True)), (x,))

    inputs = (x, *module.parameters())
    assert torch.equal(run(*inputs)[0], run(*inputs)[0])
    assert not torch.equal(module(x)[0], module(x)[0])
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_zoneout_of_sequences() -> None:
    """Packed, documents and padded rows: in evaluation each sequence is what it gives alone."""
    module = fastlm.nn.GRU(3, 4, bidirectional=True, zoneout=0.25).double().eval()
    pieces = [torch.randn(n, 3).double() for n in (4, 1, 6)]
    want = [module(p)[0] for p in pieces]
    out, _ = module(rnn.pack_sequence(pieces, enforce_sorted=False))
    by_offsets, _ = module(torch.cat(pieces), cu_seqlens=torch.tensor([0, 4, 5, 11]).int())
    by_length, _ = module(rnn.pad_sequence(pieces), lengths=torch.tensor([4, 1, 6]))
    torch.testing.assert_close(torch.cat(rnn.unpack_sequence(out)), torch.cat(want))
    torch.testing.assert_close(by_offsets, torch.cat(want))
    for row, own in enumerate(want):
        torch.testing.assert_close(by_length[: len(own), row], own)
    trained, _ = module.train()(torch.cat(pieces), cu_seqlens=torch.tensor([0, 4, 5, 11]).int())
    assert (trained[1:4, :4] == trained[:3, :4]).any()


def test_zoneout_mask_is_philox() -> None:
    seed = torch.tensor(123456789)
    unit = torch.arange(24)
    from fastlm.ops.embedding_gru import stack

    options = stack.Options(False, 0.0, True, "gates", "ieee", 0.5)
    kept = stack._kept(options, (2, 3, 4), seed, 7)
    want = philox.uniform(seed.expand(24), unit, torch.full_like(unit, 7)) < 0.5
    assert torch.equal(kept, want.view(2, 3, 4))
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"zoneout must be in \[0, 1\]"):
            fastlm.nn.GRU(3, 4, zoneout=bad)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_is_honoured(dtype: torch.dtype) -> None:
    """Operands and results in the dtype of autocast, gradients in that of the parameters."""
    module = fastlm.nn.GRU(6, 21, num_layers=2, bidirectional=True)
    low = fastlm.nn.GRU(6, 21, num_layers=2, bidirectional=True).to(dtype)
    low.load_state_dict(module.state_dict())
    x, hx = torch.randn(7, 3, 6), torch.randn(4, 3, 21)
    packed = rnn.pack_sequence([torch.randn(n, 6) for n in (2, 4)], enforce_sorted=False)
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype):
            out, h_n = module(given, hx)
        want, want_h = low(x.to(dtype), hx.to(dtype))
        assert out.dtype == h_n.dtype == dtype
        assert torch.equal(out, want) and torch.equal(h_n, want_h)
    with torch.autocast("cpu", dtype):
        assert module(packed)[0].data.dtype == dtype
        out, _ = module(x)
    out.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    double = fastlm.nn.GRU(6, 5).double()
    with torch.autocast("cpu", dtype):
        assert double(x.double())[0].dtype == torch.float64
        cell = fastlm.nn.GRUCell(6, 5)
        assert cell(x[0]).dtype == cell(x[0], hx[0, :, :5]).dtype == dtype


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_of_the_embedding(dtype: torch.dtype) -> None:
    model = fastlm.nn.EmbeddingGRU(9, 4, 6, num_layers=2)
    tokens, h0 = torch.randint(0, 9, (3, 5)), torch.randn(2, 3, 6)
    want, want_h = model(tokens, h0)
    with torch.autocast("cpu", dtype):
        out, h_n = model(tokens, h0)
        model(tokens, h0.to(dtype))[0].float().sum().backward()
    assert out.dtype == h_n.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (out.float() - want).abs().max() <= 4 * eps
    assert (h_n.float() - want_h).abs().max() <= 4 * eps
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("first", (True, False))
def test_differentiable_is_torch(reverse: bool, first: bool) -> None:
    gru = nn.GRU(6, 5, bidirectional=True, batch_first=first).double()
    x, hx = torch.randn(3, 4, 6).double(), torch.randn(2, 3 if first else 4, 5).double()
    w = gru._flat_weights[4:] if reverse else gru._flat_weights[:4]
    want, want_h = gru(x, hx)
    half = slice(5, 10) if reverse else slice(0, 5)
    got, h_n = differentiable.gru(x, *w, hx[int(reverse)], None, first, reverse, "ieee")
    torch.testing.assert_close(got, want[..., half])
    torch.testing.assert_close(h_n, want_h[int(reverse)])


@every_backend
def test_second_derivative_of_the_kernels(backend: str) -> None:
    """create_graph=True: the first derivative is the kernel's, the second is torch's."""
    x, hx, w = torch.randn(5, 3, 6), torch.randn(1, 3, 19), weights(6, 19)

    def penalty(call: Any) -> list[Tensor]:
        leaves = leaves_of(x, hx, *w)
        out, h_n = call(leaves[0], leaves[1], *leaves[2:])
        first = torch.autograd.grad(out.square().sum() + h_n.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    with dispatch.use_backend(backend):
        got = penalty(lambda x, hx, *w: fastlm.gru(x, hx, w))
        with torch.enable_grad():
            leaves = leaves_of(x, hx, *w)
            out, h_n = fastlm.gru(leaves[0], leaves[1], leaves[2:])
            once = torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)
    for a, b in zip(got, penalty(plain_gru), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, once, strict=False):
        assert torch.equal(a, b)


def every_way() -> dict[str, Any]:
    """Calls on (input, hx, w...) in float64 that have a second derivative to check."""
    reset = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0]])
    offsets = torch.tensor([0, 3, 3, 8]).int()
    tokens = torch.tensor([[0, 2], [2, 1], [1, 1], [0, 0]])

    def packed(x: Tensor, hx: Tensor, *w: Tensor) -> Any:
        # sequences of 2 and 4 tokens; pack_padded_sequence itself has no forward mode
        data = x.reshape(8, 3)[torch.tensor([1, 0, 3, 2, 5, 7])]
        order = torch.tensor([1, 0])
        sequence = rnn.PackedSequence(data, torch.tensor([2, 2, 1, 1]), order, order)
        out, h_n = fastlm.gru(sequence, hx, w)
        return out.data, h_n

    def embedded(x: Tensor, hx: Tensor, *w: Tensor) -> Any:
        return fastlm.embedding_gru(tokens, x[:3, 0], *w, h0=hx[0], batch_first=False)

    def documents(x: Tensor, hx: Tensor, *w: Tensor) -> Any:
        return fastlm.gru(x.reshape(8, 3), torch.cat((hx, hx[:, :1]), 1), w, cu_seqlens=offsets)

    return {
        "dense": lambda x, hx, *w: fastlm.gru(x, hx, w),
        "reset": lambda x, hx, *w: fastlm.gru(x, hx, w, reset=reset),
        "hidden": lambda x, hx, *w: fastlm.gru(x, hx, w, save="hidden"),
        "batch_first": lambda x, hx, *w: fastlm.gru(x.mT.mT, hx[:, :1].expand(1, 4, 4), w,
                                                    batch_first=True),
        "lengths": lambda x, hx, *w: fastlm.gru(x, hx, w, lengths=torch.tensor([4, 2])),
        "packed": packed,
        "documents": documents,
        "embedded": embedded,
    }  # fmt: skip


@pytest.mark.parametrize("way", every_way())
def test_gradients_of_every_way(way: str) -> None:
    """gradcheck with forward mode and batched gradients, and gradgradcheck."""
    call = every_way()[way]
    args = leaves_of(
        torch.randn(4, 2, 3).double(), torch.randn(1, 2, 4).double(),
        *weights(3, 4, torch.float64),
    )  # fmt: skip
    assert torch.autograd.gradcheck(
        call, args, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(call, args, fast_mode=True, check_batched_grad=True)


def test_third_derivative() -> None:
    x = torch.randn(3, 1, 2).double().requires_grad_()
    w = weights(2, 3, torch.float64)

    def thrice(call: Any) -> Tensor:
        value = call(x, torch.zeros(1, 1, 3).double(), *w)[0].sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        return value

    got = thrice(lambda x, hx, *w: fastlm.gru(x, hx, w))
    torch.testing.assert_close(got, thrice(plain_gru))


def test_function_transforms() -> None:
    """torch.func: grad, vmap of grad (one gradient for each sample), jvp."""
    module = fastlm.nn.GRU(3, 4, batch_first=True).double()
    theirs = nn.GRU(3, 4, batch_first=True).double()
    theirs.load_state_dict(module.state_dict())
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(5, 2, 3).double()

    def loss(m: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(m, p, (x,))[0].square().sum()

    got = torch.func.grad(lambda p: loss(module, p, x))(parameters)
    want = torch.func.grad(lambda p: loss(theirs, p, x))(parameters)
    for name in parameters:
        torch.testing.assert_close(got[name], want[name])
    each = torch.func.vmap(torch.func.grad(lambda p, x: loss(module, p, x)), in_dims=(None, 0))(
        parameters, x
    )
    for name in parameters:
        own = [torch.func.grad(lambda p, r=r: loss(theirs, p, r))(parameters)[name] for r in x]
        torch.testing.assert_close(each[name], torch.stack(own))
    tangent = {k: torch.randn_like(v) for k, v in parameters.items()}
    ours = torch.func.jvp(lambda p: loss(module, p, x), (parameters,), (tangent,))
    plain = torch.func.jvp(lambda p: loss(theirs, p, x), (parameters,), (tangent,))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("outer", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("inner", ["jacrev", "jacfwd"])
def test_transforms_of_transforms(outer: str, inner: str) -> None:
    """A second derivative by either mode of either mode; none is missing."""
    module, theirs = fastlm.nn.GRU(3, 2).double(), nn.GRU(3, 2).double()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(3, 1, 3).double()

    def twice(m: nn.Module) -> Tensor:
        first = getattr(torch.func, inner)(lambda x: m(x)[0].square().sum())
        return getattr(torch.func, outer)(first)(x)

    with fastlm.use_backend("reference"):
        got = twice(module)
    torch.testing.assert_close(got, twice(theirs))


NESTED = {
    "hessian": lambda f, w, v: func.hessian(f)(w),
    "jvp of grad": lambda f, w, v: func.jvp(func.grad(f), (w,), (v,))[1],
    "grad of jvp": lambda f, w, v: func.grad(lambda w: func.jvp(f, (w,), (v,))[1])(w),
    "jvp of jvp": lambda f, w, v: func.jvp(
        lambda w: func.jvp(f, (w,), (v,))[1], (w,), (v,)
    )[1],
    "backward of dual numbers": lambda f, w, v: backward_of_dual(f, w, v),
}  # fmt: skip


def backward_of_dual(f: Callable, w: Tensor, v: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(w, v))).tangent
        return torch.autograd.grad(tangent, w)[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("how", NESTED)
def test_forward_mode_beside_other_derivatives(how: str, dtype: torch.dtype) -> None:
    module, theirs = (g(3, 4, dtype=dtype) for g in (fastlm.nn.GRU, nn.GRU))
    x, w = torch.randn(6, 2, 3, dtype=dtype), module.weight_hh_l0.detach()
    v = torch.randn_like(w)
    theirs.load_state_dict(module.state_dict())

    def loss(module: nn.Module) -> Callable:
        return lambda w: func.functional_call(module, {"weight_hh_l0": w}, (x,))[0].square().sum()

    got, want = (NESTED[how](loss(m), w, v) for m in (module, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("steps", (2, 6))
def test_vmap_where_torch_would_take_the_call(steps: int, dtype: torch.dtype) -> None:
    """PyTorch's own GRU has no rule for it."""
    dense = fastlm.nn.GRU(3, 4, num_layers=2, dtype=dtype)
    embedded = fastlm.nn.EmbeddingGRU(9, 3, 4, dtype=dtype)
    x, tokens = torch.randn(5, steps, 2, 3, dtype=dtype), torch.randint(9, (5, 2, steps))
    for module, given in ((dense, x), (embedded, tokens)):
        got = func.vmap(lambda x, module=module: module(x)[0])(given)
        torch.testing.assert_close(got, torch.stack([module(one)[0] for one in given]))
    results = [
        torch.autograd.functional.jacobian(lambda x: dense(x)[0], x[0], **how)
        for how in ({}, {"vectorize": True, "strategy": "forward-mode"})
    ]
    torch.testing.assert_close(*results)
