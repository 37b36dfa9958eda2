"""embedding_gru and gru: references, kernels, layouts, resets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.embedding_gru import autograd, cpu_kernels

BACKENDS = dispatch.ready("embedding_gru")
# batch, steps, vocabulary, embedding, hidden: one of everything, odd, tails of all vector widths
SHAPES = [(1, 1, 1, 1, 1), (5, 7, 37, 12, 19), (9, 3, 11, 5, 48), (2, 33, 300, 64, 65)]


def weights(d: int, h: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    shapes = [(3 * h, d), (3 * h, h)] + ([(3 * h,), (3 * h,)] if bias else [])
    return [(torch.randn(s) / h**0.5).to(dtype) for s in shapes]


def plain_gru(x: Tensor, h0: Tensor | None, *w: Tensor, batch_first: bool = True) -> tuple:
    """torch's own composite: differentiable in every float dtype."""
    batch = x.shape[0 if batch_first else 1]
    hidden = w[1].shape[1]
    h0 = x.new_zeros(1, batch, hidden) if h0 is None else h0[None]
    out, h_n = torch.gru(x, h0, list(w), len(w) == 4, 1, 0.0, False, False, batch_first)
    return out, h_n[0]


def plain(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple:
    return plain_gru(torch.nn.functional.embedding(tokens, weight), h0, *w)


def ours(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor, **options: object) -> tuple:
    return fastlm.embedding_gru(tokens, weight, *w, h0=h0, **options)


def case(b: int, t: int, v: int, d: int, h: int, dtype: torch.dtype = torch.float32) -> tuple:
    return (
        torch.randint(0, v, (b, t)),
        torch.randn(v, d).to(dtype),
        torch.randn(b, h).to(dtype),
        *weights(d, h, dtype),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_plain(backend: str, dtype: torch.dtype, shape: tuple, poisoned: None) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the cpu backend refuses float64: test_refuses_float64")
    with fastlm.use_backend(backend):
        testing.check(ours, plain, case(*shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"dedupe": d} for d in ("batch", "vocab", "off")]
                         + [{"save": "hidden"}])  # fmt: skip
def test_options_do_not_change_the_result(backend: str, options: dict) -> None:
    with fastlm.use_backend(backend):
        testing.check(lambda *a: ours(*a, **options), plain, case(4, 6, 9, 8, 21))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_any_strides(backend: str, layout: str) -> None:
    args = [testing.strided(a, layout) for a in case(4, 6, 9, 8, 21)]
    with fastlm.use_backend(backend):
        testing.check(ours, plain, args)


@pytest.mark.parametrize("backend", dispatch.ready("gru"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("batch_first", (True, False))
def test_gru_matches_plain(backend: str, dtype: torch.dtype, batch_first: bool) -> None:
    x = torch.randn(5, 7, 12).to(dtype)
    h0 = torch.randn(5 if batch_first else 7, 19).to(dtype)

    def one(x: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        out, h_n = fastlm.gru(x, h0[None], w, batch_first=batch_first)
        return out, h_n[0]

    def other(x: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        return plain_gru(x, h0, *w, batch_first=batch_first)

    with fastlm.use_backend(backend):
        testing.check(one, other, (x, h0, *weights(12, 19, dtype)))


@pytest.mark.parametrize("reverse", (False, True))
def test_reference_is_pytorch(reverse: bool) -> None:
    """The explicit backward against autograd through nn.GRU, in float64."""
    gru = torch.nn.GRU(6, 5, bidirectional=True, batch_first=True).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    w = gru._flat_weights[4:] if reverse else gru._flat_weights[:4]
    want = gru(x)[0][..., 5:] if reverse else gru(x)[0][..., :5]
    with fastlm.use_backend("reference"):
        got, _ = autograd.apply(
            autograd.DENSE, (x, *w, None, None), (True, reverse), "gates", "ieee"
        )
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, [x, *w], upstream),
        torch.autograd.grad(want, [x, *w], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    tokens, *floats = case(2, 3, 5, 3, 4, torch.float64)
    for tensor in floats:
        tensor.requires_grad_()
    reset = torch.tensor([[0, 0, 1], [1, 0, 0]])
    assert torch.autograd.gradcheck(lambda *f: ours(tokens, *f, reset=reset), floats)


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_any_forward_with_any_backward(first: str, second: str) -> None:
    tokens, *floats = case(4, 6, 9, 8, 21)
    leaves = [f.clone().requires_grad_() for f in floats]
    with fastlm.use_backend(first):
        out, h_n = ours(tokens, *leaves)
    with fastlm.use_backend(second):
        got = torch.autograd.grad((out.sum() + h_n.square().sum()), leaves)
    want_out, want_h = plain(tokens, *leaves)
    want = torch.autograd.grad((want_out.sum() + want_h.square().sum()), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_see_each_other(backend: str) -> None:
    """Packed with resets, segment ids or cu_seqlens: bitwise what each document gives alone."""
    _, weight, _, *w = case(1, 1, 50, 8, 21)
    lengths = [3, 1, 6, 0, 4]
    documents = [torch.randint(0, 50, (n,)) for n in lengths]
    packed = torch.cat(documents)
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int()
    starts = torch.zeros(14, dtype=torch.bool)
    starts[offsets[:-1]] = True

    def run(tokens: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
        # one table for all, or the library's product could round differently by its size
        return fastlm.embedding_gru(tokens, weight, *w, dedupe="vocab", **options)

    with fastlm.use_backend(backend):
        alone = [run(d)[0] for d in documents]
        want = torch.cat(alone)
        by_reset, _ = run(packed, reset=starts)
        by_ids, _ = run(packed, segment_ids=ids)
        by_offsets, h_n = run(packed, cu_seqlens=offsets)
    # the reference multiplies by the library, whose rounding depends on the rows side by side
    close = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    for got in (by_reset, by_ids, by_offsets):
        torch.testing.assert_close(got, want, **close)
    for state, own in zip(h_n, alone, strict=True):
        torch.testing.assert_close(state, own[-1] if len(own) else torch.zeros(21), **close)


@pytest.mark.parametrize("bidirectional", (False, True))
def test_packed_gru_is_each_document(bidirectional: bool) -> None:
    gru = fastlm.nn.GRU(6, 5, num_layers=2, bidirectional=bidirectional)
    documents = [torch.randn(n, 6, requires_grad=True) for n in (3, 1, 5)]
    offsets = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    out, h_n = gru(torch.cat(documents), cu_seqlens=offsets)
    alone = [gru(d) for d in documents]
    torch.testing.assert_close(out, torch.cat([a[0] for a in alone]))
    torch.testing.assert_close(h_n, torch.stack([a[1] for a in alone], 1))
    got = torch.autograd.grad(out.square().sum(), documents, retain_graph=True)
    want = torch.autograd.grad(sum(a[0].square().sum() for a in alone), documents)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_reset_gradients_match_reference() -> None:
    tokens, *floats = case(3, 9, 20, 8, 33)
    reset = torch.rand(3, 9) < 0.4
    reset[0, 0] = True

    def run(backend: str) -> tuple:
        leaves = [f.clone().requires_grad_() for f in floats]
        with fastlm.use_backend(backend):
            out, h_n = ours(tokens, *leaves, reset=reset)
            return torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)

    for a, b in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert run("cpu")[1][0].abs().max() == 0  # a reset first token hides h0


def _all_results(threads: int) -> list[Tensor]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for b, h in ((1, 256), (3, 144), (13, 100)):
            gates = torch.randn(b * 11, 3 * h)
            w_hh, b_hh = torch.randn(3 * h, h) / h**0.5, torch.randn(3 * h)
            output, h_n, saved = cpu_kernels.forward(
                gates, None, None, w_hh, b_hh, None, b, True, False
            )
            index = torch.arange(b * 11) % 7
            results += [output, h_n, saved]
            results += cpu_kernels.backward(
                torch.randn_like(output), torch.randn_like(h_n), index, 7, None, w_hh, None,
                output, saved, b, True, False,
            )  # fmt: skip
        return results
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
def test_threads_do_not_change_a_bit() -> None:
    one = _all_results(1)
    for threads in (2, 3, 5):
        for a, b in zip(one, _all_results(threads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
def test_batch_does_not_change_a_row() -> None:
    tokens, weight, h0, *w = case(23, 5, 40, 16, 40)
    together, _ = ours(tokens, weight, h0, *w)
    for row in (0, 7, 22):
        alone, _ = ours(tokens[row : row + 1], weight, h0[row : row + 1], *w, dedupe="vocab")
        both, _ = ours(tokens, weight, h0, *w, dedupe="vocab")
        assert torch.equal(alone[0], both[row])
    assert together.shape == (23, 5, 40)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("isa", ("base", "avx2", "avx512", "avx512_bf16"))
def test_every_instruction_set(isa: str) -> None:
    code = (
        "import torch, fastlm, sys; sys.path.insert(0, 'tests')\n"
        "from fastlm import extension, testing\n"
        "import test_embedding_gru as t\n"
        "try: extension.cpu_isa()\n"
        "except RuntimeError as e: print('absent', e); raise SystemExit\n"
        f"assert extension.cpu_isa() == '{isa}'\n"
        "torch.manual_seed(0)\n"
        "for shape in t.SHAPES: testing.check(t.ours, t.plain, t.case(*shape))\n"
        "print('checked')"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    env = {**os.environ, "FASTLM_CPU_ISA": isa, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("absent"):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "checked"


@pytest.mark.parametrize("b, t", [(0, 5), (3, 0)])
def test_empty(b: int, t: int) -> None:
    tokens, weight, h0, *w = case(b, t, 9, 4, 6)
    leaves = [x.requires_grad_() for x in (weight, h0, *w)]
    out, h_n = ours(tokens, *leaves)
    assert out.shape == (b, t, 6) and torch.equal(h_n, h0)
    grads = torch.autograd.grad(out.sum() + h_n.sum(), leaves)
    assert torch.equal(grads[1], torch.ones(b, 6))
    assert all(g.abs().sum() == 0 for g in (grads[0], *grads[2:]))


def test_second_backward_and_frozen_parts() -> None:
    tokens, weight, h0, *w = case(3, 4, 9, 4, 6)
    w[1].requires_grad_()
    out, _ = ours(tokens, weight, h0, *w)
    one = torch.autograd.grad(out.sum(), w[1], retain_graph=True)[0]
    two = torch.autograd.grad(out.sum(), w[1])[0]
    assert torch.equal(one, two)
    weight.requires_grad_()
    out, _ = ours(tokens, weight, h0, *w)
    (grad,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    embedded = torch.nn.functional.embedding(tokens, weight)
    (plain,) = torch.autograd.grad(plain_gru(embedded, h0, *w)[0].sum(), weight, create_graph=True)
    got, want = (torch.autograd.grad(g.square().sum(), weight)[0] for g in (grad, plain))
    torch.testing.assert_close(got, want)


def test_padding_row_gets_no_gradient() -> None:
    tokens, weight, h0, *w = case(3, 4, 9, 4, 6)
    weight.requires_grad_()
    for dedupe in ("batch", "vocab", "off"):
        out, _ = ours(tokens, weight, h0, *w, padding_idx=-1, dedupe=dedupe)
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert grad[-1].abs().sum() == 0 and grad.abs().sum() > 0


def test_token_plan() -> None:
    ids = torch.tensor([[4, 2, 4], [7, 2, 2]], dtype=torch.int32)
    plan = fastlm.token_plan(ids, 9)
    assert plan.unique.tolist() == [2, 4, 7]
    assert plan.unique[plan.inverse].tolist() == ids.reshape(-1).tolist()
    for i, token in enumerate(plan.unique):
        positions = plan.order[plan.offsets[i] : plan.offsets[i + 1]]
        assert positions.tolist() == (ids.reshape(-1) == token).nonzero()[:, 0].tolist()
    _, weight, h0, *w = case(2, 3, 9, 4, 6)
    with_plan = ours(ids, weight, h0, *w, plan=plan)[0]
    assert torch.equal(with_plan, ours(ids, weight, h0, *w, dedupe="batch")[0])


BAD = [
    (dict(tokens=torch.zeros(2, 3)), TypeError, "tokens must be an integer tensor, got float32"),
    (dict(tokens=torch.tensor([[0, 9]])), IndexError, r"must be in \[0, 9\), got 9 at \[0, 1\]"),
    (dict(tokens=torch.tensor([[0, -1]])), IndexError, r"got -1 at \[0, 1\]"),
    (dict(w_hh=torch.zeros(18, 5)), ValueError, r"w_hh must be \[15, 5\]"),
    (dict(w_ih=torch.zeros(18, 3)), ValueError, r"w_ih must be \[18, 4\]"),
    (dict(b_ih=torch.zeros(17)), ValueError, r"b_ih must be \[18\], got \[17\]"),
    (dict(b_hh=torch.zeros(18).double()), TypeError, r"b_hh must be float32 \(as w_ih\)"),
    (dict(h0=torch.zeros(3, 6)), ValueError, r"h0 must be \[2, 6\], got \[3, 6\]"),
    (dict(h0=torch.zeros(2, 6).double()), TypeError, "h0 must be float32"),
    (dict(precision="fp8"), ValueError, "precision must be one of"),
    (dict(dedupe="yes"), ValueError, "dedupe must be one of"),
    (dict(reset=torch.zeros(2, 4)), ValueError, r"reset must be \[2, 3\]"),
    (dict(tokens=torch.zeros(4, dtype=torch.long), cu_seqlens=torch.tensor([0, 3, 2, 4]).int()),
     ValueError, "ascending from 0 to 4"),
    (dict(cu_seqlens=torch.tensor([0, 3]).int()), ValueError, "tokens with cu_seqlens"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD)
def test_rejects(change: dict, error: type[Exception], message: str) -> None:
    w_ih, w_hh, b_ih, b_hh = weights(4, 6)
    args = dict(tokens=torch.zeros(2, 3, dtype=torch.long), weight=torch.zeros(9, 4),
                w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh)  # fmt: skip
    with pytest.raises(error, match=message):
        fastlm.embedding_gru(**{**args, **change})


def test_refuses_float64() -> None:
    tokens, *rest = case(2, 3, 9, 4, 6, torch.float64)
    if "cpu" in BACKENDS:
        with fastlm.use_backend("cpu"), pytest.raises(RuntimeError, match="dtype float64"):
            ours(tokens, *rest)
    assert chosen(tokens, rest[0], *rest[2:]) == ("gru", "torch")
    assert chosen(tokens, rest[0], *rest[2:], dedupe="batch") == ("embedding_gru", "reference")


def test_opcheck() -> None:
    """The gradient belongs to the autograd.Function around the ops, so inputs need none here."""
    tokens, weight, h0, *w = case(2, 3, 9, 4, 6)
    floats = (weight, *w, h0)
    reset = torch.zeros(2, 3, dtype=torch.uint8)
    call = (tokens, *floats, reset, None, None, "batch", None, True, False)
    torch.library.opcheck(torch.ops.fastlm.embedding_gru.default, (*call, True))
    out, h_n, gates = torch.ops.fastlm.embedding_gru(*call, True)
    grads = (torch.randn_like(out), torch.randn_like(h_n))
    torch.library.opcheck(
        torch.ops.fastlm.embedding_gru_backward.default,
        (*grads, *call[:10], out, gates, *call[10:], True, True, True),
    )
    x = torch.randn(2, 3, 4)
    dense = (x, *w, h0, reset, True, False)
    torch.library.opcheck(torch.ops.fastlm.gru.default, (x, *w, None, reset, True, False, True))
    out, h_n, gates = torch.ops.fastlm.gru(*dense, True)
    torch.library.opcheck(
        torch.ops.fastlm.gru_backward.default,
        (*grads, *dense[:7], out, gates, True, False, True, False, True),
    )


def test_compiles_whole_and_dynamic() -> None:
    model = fastlm.nn.EmbeddingGRU(9, 4, 6, num_layers=2)
    compiled = torch.compile(
        lambda x: model(x)[0].square().sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for b, t in ((2, 3), (4, 5)):
        x = torch.randint(0, 9, (b, t))
        got = torch.autograd.grad(compiled(x), model.parameters())
        want = torch.autograd.grad(model(x)[0].square().sum(), model.parameters())
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, c)
    with pytest.raises(IndexError, match="got 9"):
        compiled(torch.full((2, 3), 9))


def test_an_embedding_of_more_than_2_31_values() -> None:
    """A stride-0 view: the last row stands past 2^31, and little memory is used."""
    rows = 2**31 // 8 + 5
    row = torch.randn(1, 8)
    tokens = torch.tensor([[0, rows - 1, 7, rows - 1]])
    w = weights(8, 6)
    got, _ = fastlm.embedding_gru(tokens, row.expand(rows, 8), *w)
    want, _ = fastlm.embedding_gru(torch.zeros_like(tokens), row, *w)
    torch.testing.assert_close(got, want)
    with pytest.raises(IndexError, match=rf"got {rows} at \[0, 0\]"):
        fastlm.embedding_gru(torch.tensor([[rows]]), row.expand(rows, 8), *w)


def chosen(tokens: Tensor, weight: Tensor, *w: Tensor, **options: object) -> tuple[str, str | None]:
    first = fastlm.explain("embedding_gru", tokens, weight, *w, **options)[0]
    return first.op, first.chosen


@pytest.mark.skipif("cpu" not in BACKENDS, reason="nothing else runs")
def test_few_tokens_are_embedded_first() -> None:
    """Embedding and `gru`, which runs PyTorch's kernel where that is faster; `explain` says so."""
    _, weight, _, *w = case(2, 3, 9, 4, 6)
    few, many = torch.randint(9, (2, 3)), torch.randint(9, (3, 2**17))
    assert chosen(few, weight, *w) == chosen(few.int(), weight, *w) == ("gru", "torch")
    assert chosen(few[0, :1], weight, *w, h0=torch.zeros(6)) == ("gru", "torch")
    assert chosen(few.repeat(1, 3), weight, *w) == ("gru", "cpu")
    large = case(32, 1, 9, 512, 512)
    assert chosen(large[0], large[1], *large[3:]) == ("embedding_gru", "cpu")
    assert chosen(many, weight, *w) == ("embedding_gru", "cpu")
    wide = [x.double() for x in (weight, *w)]
    assert chosen(few.repeat(1, 9), *wide) == ("gru", "torch")
    plan, starts = fastlm.token_plan(few, 9), torch.zeros(2, 3)
    for options in (
        {"dedupe": "batch"}, {"plan": plan}, {"reset": starts}, {"save": "hidden"},
        {"precision": "bf16"}, {"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True},
        {"embedding_dropout": 0.5, "training": True},
    ):  # fmt: skip
        assert chosen(few, weight, *w, **options) == ("embedding_gru", "cpu"), options
    assert chosen(few, weight, *w, lengths=torch.tensor([3, 2]))[1] == "cpu"
    assert chosen(few, *(x.bfloat16() for x in (weight, *w))) == ("embedding_gru", "cpu")
    for backend in BACKENDS:
        with fastlm.use_backend(backend):
            assert chosen(few, weight, *w) == ("embedding_gru", backend)
    with fastlm.use_backend("torch"):
        assert chosen(few.repeat(1, 9), weight, *w) == ("gru", "torch")
        with pytest.raises(RuntimeError, match="no backend takes this forward call"):
            ours(few, weight, torch.zeros(2, 6), *w, reset=starts)


@pytest.mark.parametrize("steps", (1, 3, 9))
def test_the_gradients_of_few_tokens(steps: int) -> None:
    tokens, *floats = case(3, steps, 9, 8, 21)
    testing.check(ours, plain, (tokens, *floats))
    leaves = [x.clone().requires_grad_() for x in floats]
    out, h_n = ours(tokens.t(), *leaves, batch_first=False, padding_idx=int(tokens[0, 0]) - 9)
    want = plain_gru(
        torch.nn.functional.embedding(tokens, leaves[0], int(tokens[0, 0])), *leaves[1:]
    )
    torch.testing.assert_close((out.transpose(0, 1), h_n), want)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(want[0].square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    model = fastlm.nn.EmbeddingGRU(9, 8, 21, 2, bidirectional=True, padding_idx=2)
    states = torch.randn(4, 3, 21)
    with fastlm.use_backend("reference"):
        want = model(tokens, states)
    torch.testing.assert_close(model(tokens, states), want)
    one = model(tokens[0], states[:, 0])
    torch.testing.assert_close(one, (want[0][0], want[1][:, 0]))
    with pytest.raises(IndexError, match=r"nn.EmbeddingGRU|embedding_gru: tokens must be in"):
        model(tokens + 9)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("dedupe", ("auto", "batch"))
def test_dropout_between_layers_draws_what_torch_draws(batch_first: bool, dedupe: str) -> None:
    """The same seed as for nn.Embedding and nn.GRU, whatever runs."""
    model = fastlm.nn.EmbeddingGRU(9, 4, 6, 3, dropout=0.4, batch_first=batch_first, dedupe=dedupe)
    theirs = torch.nn.GRU(4, 6, 3, dropout=0.4, batch_first=batch_first)
    theirs.load_state_dict(model.gru.state_dict())
    for tokens in (torch.randint(9, (3, 2)), torch.randint(9, (3, 11))):
        results = []
        for run in (model, lambda tokens: theirs(model.embedding(tokens))):
            torch.manual_seed(1)
            results.append(run(tokens))
        torch.testing.assert_close(*results)
