"""What torch.nn.Embedding can do, under the GRU: every option, schedule and direction."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_embedding_gru import BACKENDS, case, plain_gru, weights
from torch import Tensor, nn
from torch.nn import functional

import fastlm
from fastlm import testing
from fastlm.ops.embedding_gru import cpu_kernels, sequences

V = 11  # of 24 tokens, so that some rows are absent and most occur more than once
OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1, "scale_grad_by_freq": True},
    {"max_norm": 1.5},
    {"max_norm": 1.5, "norm_type": 1.0, "scale_grad_by_freq": True},
    {"scale_grad_by_freq": True},
    {"sparse": True},
    {"sparse": True, "padding_idx": 3, "scale_grad_by_freq": True},
    {"embedding_dropout": 0.4},
    {"embedding_dropout": 1.0},
    {"embedding_dropout": 0.3, "sparse": True, "padding_idx": 3, "max_norm": 1.5},
]
DEDUPE = ("auto", "vocab", "batch", "off")


def tokens_of(count: int = 24) -> Tensor:
    ids = torch.randint(0, V - 2, (4, count // 4))
    ids[0, :2], ids[1, 1] = torch.tensor([3, 3]), V - 1
    return ids


class Densify(torch.autograd.Function):
    """Lets a check compare a sparse gradient; it must arrive coalesced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert not grad.is_sparse or grad.is_coalesced()
        return grad.to_dense() if grad.is_sparse else grad


def embed(tokens: Tensor, weight: Tensor, embedding_dropout: float = 0.0, **options: Any) -> Tensor:
    """nn.Embedding, behind a mask of whole words drawn from torch's generator."""
    weight = weight.clone()
    if (max_norm := options.pop("max_norm", None)) is not None:
        with torch.no_grad():
            functional.embedding(tokens, weight, None, max_norm, options.pop("norm_type", 2.0))
    if embedding_dropout:
        torch.manual_seed(5)
        mask = torch.empty(weight.shape[0], 1).bernoulli_(1 - embedding_dropout)
        scale = 0.0 if embedding_dropout == 1 else 1 / (1 - embedding_dropout)
        weight = weight * (mask * scale).to(weight.dtype)
    options.pop("sparse", None)
    return functional.embedding(tokens, weight, **options)


@pytest.mark.parametrize("planned", (False, True))
@pytest.mark.parametrize("dedupe", DEDUPE)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_options(dtype: torch.dtype, options: dict, dedupe: str, planned: bool) -> None:
    tokens = tokens_of()
    plan = fastlm.token_plan(tokens, V) if planned else None

    def ours(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        torch.manual_seed(5)
        return fastlm.embedding_gru(
            tokens, Densify.apply(weight), *w, h0=h0, plan=plan, dedupe=dedupe, training=True,
            **options,
        )  # fmt: skip

    def plain(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        return plain_gru(embed(tokens, weight, **options), h0, *w)

    _, *floats = case(4, 6, V, 12, 19, dtype)
    testing.check(ours, plain, (tokens, *floats))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dedupe", DEDUPE)
@pytest.mark.parametrize("options", OPTIONS[::3], ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("layers, batch_first", [(1, True), (2, True), (2, False)])
def test_both_directions(
    backend: str, dedupe: str, options: dict, layers: int, batch_first: bool
) -> None:
    tokens, dtype = tokens_of(), torch.float64 if backend == "reference" else torch.float32
    batch = tokens.shape[0 if batch_first else 1]
    model = fastlm.nn.EmbeddingGRU(
        V, 8, 9, layers, batch_first=batch_first, bidirectional=True, dedupe=dedupe, **options
    ).to(dtype)
    names, floats = zip(*model.named_parameters(), strict=True)
    own = nn.GRU(8, 9, layers, batch_first=batch_first, bidirectional=True)
    assert [n.removeprefix("gru.") for n in names[1:]] == [n for n, _ in own.named_parameters()]

    def ours(tokens: Tensor, h0: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        torch.manual_seed(5)
        values = dict(zip(names, (Densify.apply(weight), *w), strict=True))
        return torch.func.functional_call(model, values, (tokens, h0))

    def plain(tokens: Tensor, h0: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        x = embed(tokens, weight, **options)
        return torch.gru(x, h0, list(w), True, layers, 0.0, False, True, batch_first)

    h0 = torch.randn(2 * layers, batch, 9, dtype=dtype)
    with fastlm.use_backend(backend):
        testing.check(ours, plain, (tokens, h0, *(f.detach() for f in floats)))


LENGTHS = (4, 0, 6, 1)


def alone(
    x: Tensor, h0: Tensor, reset: Tensor | None, batch_first: bool, *w: Tensor
) -> tuple[Tensor, Tensor]:
    """Both directions of torch's GRU over the first LENGTHS steps of each row, zero behind them;
    a reset cuts a row in two, of which only the outer ends know the state that was given."""
    rows = x if batch_first else x.transpose(0, 1)
    outs, lasts = [], []
    for row, length, h in zip(rows, LENGTHS, h0.unbind(1), strict=True):
        cuts = [] if reset is None else [n for n in range(1, length) if reset[len(outs), n]]
        bounds = [0, *cuts, length] if length else []
        parts, ends = [], []
        for a, b in itertools.pairwise(bounds):
            state = torch.stack((h[0] * (a == 0), h[1] * (b == length)))[:, None]
            part, end = torch.gru(row[None, a:b], state, list(w), True, 1, 0.0, False, True, True)
            parts.append(part[0])
            ends.append(end[:, 0])
        pad = row.new_zeros(row.shape[0] - length, 2 * h.shape[-1])
        outs.append(torch.cat((*parts, pad)))
        lasts.append(torch.stack((ends[-1][0], ends[0][1])) if ends else h)
    out = torch.stack(outs)
    return out if batch_first else out.transpose(0, 1), torch.stack(lasts, 1)


@pytest.mark.parametrize("on_gpu", (False, True))
@pytest.mark.parametrize("planned, with_reset", [(False, False), (True, True)])
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("dedupe", DEDUPE)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_options_with_lengths(
    options: dict, dedupe: str, batch_first: bool, planned: bool, with_reset: bool, on_gpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In both directions, and in the layout that a GPU gets, where no length is read."""
    tokens = tokens_of() if batch_first else tokens_of().t()
    model = fastlm.nn.EmbeddingGRU(
        V, 8, 9, batch_first=batch_first, bidirectional=True, dedupe=dedupe, **options
    )
    names, floats = zip(*model.named_parameters(), strict=True)
    plan = fastlm.token_plan(tokens, V) if planned else None
    rows = torch.zeros(4, 6, dtype=torch.bool)
    rows[0, 2] = rows[2, 0] = rows[2, 3] = rows[3, 1] = True
    # a start at the first token of a row forgets the state that was given: not in `alone`
    rows[2, 0] = False
    reset = (rows if batch_first else rows.t()) if with_reset else None
    lengths = torch.tensor(LENGTHS)
    if on_gpu:
        whole = sequences.Layout(4, None, None if reset is None else reset.byte(), None, lengths)
        monkeypatch.setattr(sequences, "layout", lambda *_: whole)

    def ours(tokens: Tensor, h0: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        torch.manual_seed(5)
        values = dict(zip(names, (Densify.apply(weight), *w), strict=True))
        how = {"lengths": lengths, "plan": plan, "reset": reset}
        return torch.func.functional_call(model, values, (tokens, h0), how)

    def plain(tokens: Tensor, h0: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        x = embed(tokens, weight, **options)
        return alone(x, h0, rows if with_reset else None, batch_first, *w)

    h0 = torch.randn(2, 4, 9)
    testing.check(ours, plain, (tokens, h0, *(f.detach() for f in floats)))


@pytest.mark.parametrize("on_gpu", (False, True))
@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("dedupe", DEDUPE)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_options_with_documents(
    options: dict, dedupe: str, bidirectional: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens_of().flatten()
    offsets = torch.tensor([0, 3, 3, 20, 24]).int()
    ends = offsets.tolist()
    model = fastlm.nn.EmbeddingGRU(V, 8, 9, bidirectional=bidirectional, dedupe=dedupe, **options)
    names, floats = zip(*model.named_parameters(), strict=True)
    if on_gpu:
        whole = sequences.Layout(4, None, sequences.one_row(offsets, 24), offsets)
        monkeypatch.setattr(sequences, "layout", lambda *_: whole)

    def ours(ids: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        torch.manual_seed(5)
        values = dict(zip(names, (Densify.apply(weight), *w), strict=True))
        return torch.func.functional_call(model, values, (ids,), {"cu_seqlens": offsets})

    def plain(ids: Tensor, weight: Tensor, *w: Tensor) -> tuple:
        x = embed(ids, weight, **options)
        h0 = x.new_zeros(2 if bidirectional else 1, 9)
        outs, lasts = [], []
        for a, b in itertools.pairwise(ends):
            out, last = x.new_zeros(0, 9 * len(h0)), h0
            if b > a:
                out, last = torch.gru(
                    x[None, a:b], h0[:, None], list(w), True, 1, 0.0, False, bidirectional, True
                )
                out, last = out[0], last[:, 0]
            outs.append(out)
            lasts.append(last)
        return torch.cat(outs), torch.stack(lasts, 1)

    testing.check(ours, plain, (ids, *(f.detach() for f in floats)))


def test_both_directions_without_batch_bias_or_state() -> None:
    for bias in (True, False):
        model = fastlm.nn.EmbeddingGRU(V, 8, 9, 2, bias, bidirectional=True)
        gru = nn.GRU(8, 9, 2, bias, batch_first=True, bidirectional=True)
        gru.load_state_dict(model.gru.state_dict())
        ids = tokens_of()[0]
        for a, b in zip(model(ids), gru(model.embedding(ids)), strict=True):
            torch.testing.assert_close(a, b)
        documents = [torch.randint(0, V, (n,)) for n in (3, 1, 5)]
        out, h_n = model(torch.cat(documents), cu_seqlens=torch.tensor([0, 3, 4, 9]).int())
        alone = [model(d) for d in documents]
        torch.testing.assert_close(out, torch.cat([a[0] for a in alone]))
        torch.testing.assert_close(h_n, torch.stack([a[1] for a in alone], 1))
    with pytest.raises(ValueError, match="bidirectional must be False"):
        model.decoder()
    with pytest.raises(ValueError, match=r"h0 must be \[4, 1, 9\] \(layers and directions\)"):
        model(ids[None], torch.zeros(2, 1, 9))


@pytest.mark.parametrize("dedupe", DEDUPE)
def test_tied_output_weights(dedupe: str) -> None:
    """One parameter embeds the tokens and scores them: its gradient is the sum of both."""

    def tied(layer: Any) -> Any:
        def run(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> Tensor:
            out, _ = layer(tokens, weight, h0, *w)
            return functional.linear(out, weight)

        return run

    def ours(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        return fastlm.embedding_gru(tokens, weight, *w, h0=h0, dedupe=dedupe)

    def plain(tokens: Tensor, weight: Tensor, h0: Tensor, *w: Tensor) -> tuple:
        return plain_gru(functional.embedding(tokens, weight), h0, *w)

    _, *floats = case(4, 6, V, 19, 19)
    testing.check(tied(ours), tied(plain), (tokens_of(), *floats))


def test_tied_modules() -> None:
    grads = []
    model = fastlm.nn.EmbeddingGRU(V, 9, 9, sparse=True).double()
    head = nn.Linear(9, V, bias=False).double()
    head.weight = model.embedding.weight
    assert len({*model.parameters(), *head.parameters()}) == 5
    tokens = tokens_of()
    for layer in (model, lambda t: model.gru(functional.embedding(t, head.weight))):
        head.zero_grad()
        head(layer(tokens)[0]).square().sum().backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("dedupe", DEDUPE)
def test_frozen_embedding(options: dict, dedupe: str) -> None:
    _, weight, h0, *w = case(4, 6, V, 12, 19)
    w = [x.requires_grad_() for x in w]
    tokens = tokens_of()
    torch.manual_seed(5)
    ours, _ = fastlm.embedding_gru(
        tokens, weight.clone(), *w, h0=h0, dedupe=dedupe, training=True, **options
    )
    want, _ = plain_gru(embed(tokens, weight, **options), h0, *w)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), w), torch.autograd.grad(want.sum(), w), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sparse_gradient_and_its_optimizer() -> None:
    """Coalesced, without the padding row; three steps of SparseAdam are those of nn.Embedding."""
    options: dict[str, Any] = {"padding_idx": 3, "sparse": True}
    model = fastlm.nn.EmbeddingGRU(V, 8, 9, **options).double()
    plain = nn.Embedding(V, 8, **options).double()
    plain.load_state_dict(model.embedding.state_dict())
    optimizers = [
        torch.optim.SparseAdam([e.weight], lr=0.1) for e in (model.embedding, plain)
    ]  # fmt: skip
    for step in range(3):
        tokens = tokens_of() if step else torch.full((4, 6), 3)  # nothing but padding at first
        for optimizer, run in zip(optimizers, (model, lambda t: model.gru(plain(t))), strict=True):
            optimizer.zero_grad()
            run(tokens)[0].square().sum().backward()
            optimizer.step()
        grad = model.embedding.weight.grad
        assert grad is not None and grad.is_sparse
        rows = tokens.unique()
        assert grad._indices()[0].tolist() == rows[rows != 3].tolist()
        torch.testing.assert_close(model.embedding.weight, plain.weight)


def test_dropout_is_of_words_and_follows_the_generator() -> None:
    model = fastlm.nn.EmbeddingGRU(V, 8, 9, embedding_dropout=0.5)
    tokens = torch.arange(V)[None].expand(3, -1)
    results = {}
    for seed, dedupe in itertools.product((1, 1, 2), ("batch", "vocab", "off")):
        model.dedupe = dedupe
        torch.manual_seed(seed)
        results.setdefault(seed, []).append(model(tokens)[0])
    assert all(r.equal(results[1][0]) or torch.allclose(r, results[1][0]) for r in results[1])
    assert not torch.allclose(results[1][0], results[2][0])
    (grad,) = torch.autograd.grad(results[1][0].sum(), model.embedding.weight)
    torch.manual_seed(1)
    kept = torch.empty(V).bernoulli_(0.5) > 0
    assert 0 < kept.sum() < V
    assert torch.equal(grad.abs().sum(1) > 0, kept)
    model.eval()
    gru = nn.GRU(8, 9, batch_first=True)
    gru.load_state_dict(model.gru.state_dict())
    torch.testing.assert_close(model(tokens)[0], gru(model.embedding(tokens))[0])


def gradients(options: dict, dedupe: str, threads: int, bidirectional: bool) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(3)
        model = fastlm.nn.EmbeddingGRU(
            70, 64, 96, dedupe=dedupe, bidirectional=bidirectional, **options
        )
        tokens = (torch.rand(13, 40) ** 4 * 70).long()  # a few tokens make up most of it
        model(tokens)[0].square().sum().backward()
        grad = model.embedding.weight.grad
        assert grad is not None
        return [grad._values(), grad._indices()] if grad.is_sparse else [grad]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("dedupe", DEDUPE)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: "-".join(o) or "none")
def test_the_same_bits_on_any_threads(options: dict, dedupe: str, bidirectional: bool) -> None:
    first = gradients(options, dedupe, 1, bidirectional)
    for threads in (1, 2, 3, 5):
        for a, b in zip(gradients(options, dedupe, threads, bidirectional), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("reverse", (False, True))
def test_the_order_of_a_rows_sum(batch_first: bool, reverse: bool) -> None:
    """A row's gradient adds its tokens in float32 by step, the last processed first, then by
    sequence: exactly, not to a tolerance."""
    b, t, h, rows = 5, 17, 40, 4
    index = (torch.rand(b * t) ** 3 * rows).long()
    table, w_hh = torch.randn(rows, 3 * h), weights(h, h)[1]
    call = (b, batch_first, reverse)
    saved = cpu_kernels.forward(table, index, None, w_hh, None, None, *call)
    output, h_n, gates = saved
    upstream = (torch.randn_like(output), torch.randn_like(h_n))
    common = (None, w_hh, None, output, gates, *call)
    summed = cpu_kernels.backward(*upstream, index, rows, *common)[0]
    each = cpu_kernels.backward(*upstream, None, b * t, *common)[0]
    want = torch.zeros(rows, 3 * h)
    for step in range(t) if reverse else reversed(range(t)):
        for sequence in range(b):
            n = sequence * t + step if batch_first else step * b + sequence
            want[index[n]] += each[n]
    assert torch.equal(summed, want)
    backwards = torch.zeros(rows, 3 * h)
    for n in reversed(range(b * t)):
        backwards[index[n]] += each[n]
    assert not torch.equal(backwards, want)  # the order can be seen


def test_a_wrong_plan() -> None:
    tokens = tokens_of()
    _, weight, h0, *w = case(4, 6, V, 8, 9)
    plan = fastlm.token_plan(tokens, V)

    def run(change: dict, **options: Any) -> None:
        fastlm.embedding_gru(tokens, weight, *w, plan=plan._replace(**change), **options)

    with pytest.raises(ValueError, match=r"plan.inverse must be \[24\] \(tokens of the batch\)"):
        run({"inverse": plan.inverse[:-1]})
    with pytest.raises(IndexError, match=r"plan.unique must be in \[0, 11\), got 31 at \[0\]"):
        run({"unique": plan.unique + 31 - plan.unique[0]})
    with pytest.raises(IndexError, match=rf"plan.inverse must be in \[0, {len(plan.unique)}\)"):
        run({"inverse": plan.inverse + 8})
    for name in ("unique", "inverse"):
        with pytest.raises(TypeError, match=rf"plan.{name} must be int64 .*, got int32"):
            run({name: getattr(plan, name).int()})
        with pytest.raises(ValueError, match=rf"plan.{name} must be on cpu .*meta"):
            run({name: getattr(plan, name).to("meta")})
    with pytest.raises(IndexError):
        run({"inverse": plan.inverse + 8}, scale_grad_by_freq=True)
    with pytest.raises(IndexError):
        run({"unique": plan.unique + 31}, sparse=True)


def test_a_strided_plan() -> None:
    tokens = tokens_of()
    _, weight, h0, *w = case(4, 6, V, 8, 9)
    plan = fastlm.TokenPlan(
        *(testing.strided(x, "sliced") for x in fastlm.token_plan(tokens, V))
    )  # fmt: skip
    assert not plan.inverse.is_contiguous()
    want, _ = fastlm.embedding_gru(tokens, weight, *w)
    for options in ({}, {"sparse": True}):
        got, _ = fastlm.embedding_gru(tokens, weight, *w, plan=plan, **options)
        assert torch.equal(got, want)


def test_refused_options() -> None:
    _, weight, h0, *w = case(4, 6, V, 8, 9)
    for change, message in [
        ({"embedding_dropout": 1.5, "training": True}, r"embedding_dropout must be in \[0, 1\]"),
        ({"padding_idx": V}, r"padding_idx must be in \[-11, 11\), got 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastlm.embedding_gru(tokens_of(), weight, *w, **change)
    for options in OPTIONS:
        with pytest.raises(IndexError, match=r"tokens must be in \[0, 11\), got 11 at \[3, 5\]"):
            bad = tokens_of()
            bad[3, 5] = V
            fastlm.embedding_gru(bad, weight, *w, training=True, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("b, t", [(0, 5), (3, 0)])
def test_empty(options: dict, b: int, t: int) -> None:
    for dedupe in DEDUPE:
        weight, *w = (x.requires_grad_() for x in (torch.randn(V, 4), *weights(4, 6)))
        out, h_n = fastlm.embedding_gru(
            torch.zeros(b, t, dtype=torch.long), Densify.apply(weight), *w, dedupe=dedupe,
            training=True, **options,
        )  # fmt: skip
        assert out.shape == (b, t, 6) and h_n.shape == (b, 6)
        (grad,) = torch.autograd.grad(out.sum() + h_n.sum(), weight)
        assert grad.shape == weight.shape and grad.abs().sum() == 0


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "none")
def test_compiles_whole(options: dict, bidirectional: bool) -> None:
    torch._dynamo.reset()
    model = fastlm.nn.EmbeddingGRU(V, 8, 9, bidirectional=bidirectional, **options)
    compiled = torch.compile(
        lambda x, p: model(x, plan=p)[0], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    if options.get("sparse"):
        with pytest.raises(Exception, match="sparse must be False under torch.compile"):
            compiled(tokens_of(), None)
        return
    for count, planned in ((24, False), (40, False), (24, True)):
        tokens = tokens_of(count)
        plan = fastlm.token_plan(tokens, V) if planned else None
        results = []
        for call in (compiled, lambda x, p: model(x, plan=p)[0]):
            torch.manual_seed(1)
            out = call(tokens, plan)
            results.append((out, *torch.autograd.grad(out.square().sum(), model.parameters())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
