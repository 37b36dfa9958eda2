"""fastlm.nn.GRU and GRUCell where torch.nn.GRU and GRUCell stood: everything around the numbers."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, rnn

import fastlm

SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]


def both(*args: Any, **options: Any) -> tuple[fastlm.nn.GRU, nn.GRU]:
    torch.manual_seed(3)
    mine = fastlm.nn.GRU(*args, **options)
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    theirs = nn.GRU(*args, **options)
    assert torch.equal(after, torch.random.get_rng_state())
    return mine, theirs


@pytest.mark.parametrize("options", SHAPES)
def test_parameters(options: dict) -> None:
    """Names, shapes, order, values from the same seed; state_dict loads strictly both ways."""
    mine, theirs = both(7, 5, **options)
    assert repr(mine) == repr(theirs)
    for (a, x), (b, y) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b and x.shape == y.shape and torch.equal(x, y)
    for x, y in zip(mine._flat_weights, theirs._flat_weights, strict=True):
        assert torch.equal(x, y)
    assert [len(w) for w in mine.all_weights] == [len(w) for w in theirs.all_weights]
    for group, other in zip(mine.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(group, other, strict=True))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mine.flatten_parameters()
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata
    given = [n for n in vars(theirs) if not n.startswith("_")]
    assert {n: getattr(mine, n) for n in given} == {n: getattr(theirs, n) for n in given}
    assert isinstance(mine, nn.RNNBase)


def test_positional_arguments_and_own_ones() -> None:
    mine = fastlm.nn.GRU(7, 5, 2, False, True, 0.1, True, "cpu", torch.float64, zoneout=0.5)
    assert repr(mine) == repr(nn.GRU(7, 5, 2, False, True, 0.1, True))[:-1] + ", zoneout=0.5)"
    assert mine.weight_hh_l1_reverse.dtype == torch.float64
    for name in ("precision", "save"):
        with pytest.raises(ValueError, match=f"nn.GRU: {name} must be one of"):
            fastlm.nn.GRU(7, 5, **{name: "fast"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'relu'"):
        fastlm.nn.GRU(7, 5, relu=True)


def outcome(call: Callable[[], Any]) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return type(None), ""


WRONG: dict[str, Callable[[nn.Module], Any]] = {
    "no dimensions": lambda m: m(torch.zeros(4)),
    "four dimensions": lambda m: m(torch.zeros(1, 2, 3, 4)),
    "input size": lambda m: m(torch.zeros(3, 2, 5)),
    "input size, one sequence": lambda m: m(torch.zeros(3, 5)),
    "input dtype": lambda m: m(torch.zeros(3, 2, 4).double()),
    "integer input": lambda m: m(torch.zeros(3, 2, 4).long()),
    "hx batch": lambda m: m(torch.zeros(3, 2, 4), torch.zeros(1, 3, 6)),
    "hx layers": lambda m: m(torch.zeros(3, 2, 4), torch.zeros(2, 2, 6)),
    "hx size": lambda m: m(torch.zeros(3, 2, 4), torch.zeros(1, 2, 7)),
    "hx 2-D, input 3-D": lambda m: m(torch.zeros(3, 2, 4), torch.zeros(1, 6)),
    "hx 3-D, input 2-D": lambda m: m(torch.zeros(3, 4), torch.zeros(1, 1, 6)),
    "hx, one sequence": lambda m: m(torch.zeros(3, 4), torch.zeros(2, 6)),
    "no steps": lambda m: m(torch.zeros(0, 2, 4)),
    "no steps, one sequence": lambda m: m(torch.zeros(0, 4)),
    "nothing": lambda m: m(torch.zeros(0, 0, 4)),
    "packed hx": lambda m: m(rnn.pack_sequence([torch.zeros(3, 4)]), torch.zeros(1, 2, 6)),
    "packed size": lambda m: m(rnn.pack_sequence([torch.zeros(3, 5)])),
    "packed dtype": lambda m: m(rnn.pack_sequence([torch.zeros(3, 4).double()])),
    "packed 3-D": lambda m: m(rnn.pack_sequence([torch.zeros(3, 4, 4)])),
}
MADE_WRONG: dict[str, Callable[[Any], Any]] = {
    "sizes": lambda cls: cls(4, 0),
    "layers": lambda cls: cls(4, 5, 0),
    "dropout": lambda cls: cls(4, 5, dropout=1.5),
    "dropout type": lambda cls: cls(4, 5, dropout=True),
    "bias": lambda cls: cls(4, 5, bias=1),
    "projection": lambda cls: cls(4, 5, proj_size=2),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_those_of_torch(what: str) -> None:
    mine, theirs = both(4, 6)
    got, want = outcome(lambda: WRONG[what](mine)), outcome(lambda: WRONG[what](theirs))
    assert want[0] is not type(None) and got == want


@pytest.mark.parametrize("what", MADE_WRONG)
def test_construction_errors_are_those_of_torch(what: str) -> None:
    want = outcome(lambda: MADE_WRONG[what](nn.GRU))
    assert want[0] is not type(None) and outcome(lambda: MADE_WRONG[what](fastlm.nn.GRU)) == want
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        fastlm.nn.GRU(4, 5, dropout=0.5)


def test_wrong_hx_dtype_is_a_runtime_error_as_in_torch() -> None:
    for module in both(4, 6):
        with pytest.raises(RuntimeError, match="same dtype"):
            module(torch.zeros(3, 2, 4), torch.zeros(1, 2, 6).double())


@pytest.mark.parametrize("batch_first", (False, True))
def test_no_sequences(batch_first: bool) -> None:
    for module in both(4, 6, num_layers=2, bidirectional=True, batch_first=batch_first):
        x = torch.zeros((0, 3, 4) if batch_first else (3, 0, 4), requires_grad=True)
        out, h_n = module(x, torch.zeros(4, 0, 6))
        assert out.shape == ((0, 3, 12) if batch_first else (3, 0, 12))
        assert h_n.shape == (4, 0, 6)
        out.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in module.parameters())


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("p", (0.4, 1.0))
def test_dropout_draws_what_torch_draws(batch_first: bool, bidirectional: bool, p: float) -> None:
    """The same seed drops the same units, in dense and packed calls, and in eval none."""
    mine, theirs = both(
        4, 6, num_layers=3, dropout=p, batch_first=batch_first, bidirectional=bidirectional
    )
    x = torch.randn(5, 7, 4)
    packed = rnn.pack_padded_sequence(
        x, [3, 7, 1, 2, 2] if batch_first else [3, 5, 1, 2, 2, 1, 4],
        batch_first=batch_first, enforce_sorted=False,
    )  # fmt: skip
    for train in (True, False):
        for given in (x, packed):
            results = []
            for module in (mine.train(train), theirs.train(train)):
                torch.manual_seed(1)
                out, h_n = module(given)
                results.append((out if isinstance(out, Tensor) else out.data, h_n))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_hooks() -> None:
    mine, _ = both(4, 6)
    seen: list[str] = []
    mine.register_forward_pre_hook(lambda m, args: seen.append("before"))
    mine.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    mine.register_full_backward_hook(lambda m, gi, go: seen.append(str(tuple(gi[0].shape))))
    mine.weight_hh_l0.register_hook(lambda grad: grad * 0)
    mine.register_state_dict_post_hook(lambda m, state, *_: seen.append("state"))
    x = torch.randn(3, 2, 4, requires_grad=True)
    out, _ = mine(x)
    torch.testing.assert_close(out, 2 * mine.forward(x)[0])
    out.sum().backward()
    mine.state_dict()
    assert seen == ["before", "(3, 2, 4)", "state"]
    assert mine.weight_hh_l0.grad is not None and mine.weight_hh_l0.grad.abs().sum() == 0


def reparametrized(module: nn.Module, how: str) -> nn.Module:
    if how == "weight_norm":
        return parametrizations.weight_norm(module, "weight_hh_l0")
    if how == "orthogonal":
        return parametrizations.orthogonal(module, "weight_hh_l0")
    if how == "pruned":
        return prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    return nn.utils.weight_norm(module, "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("how", ("weight_norm", "orthogonal", "pruned", "old weight_norm"))
def test_reparametrized_weights(how: str) -> None:
    """The weight in use is the one computed at the call; gradients reach what it is made of."""
    mine, theirs = both(4, 6)
    x = torch.randn(3, 2, 4)
    torch.manual_seed(0)
    reparametrized(mine, how)
    torch.manual_seed(0)
    reparametrized(theirs, how)
    for _ in range(2):
        for a, b in zip(mine(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
        for module in (mine, theirs):
            module.zero_grad()
            module(x)[0].square().sum().backward()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            with torch.no_grad():
                a.add_(0.1)
                b.add_(0.1)


def test_copies_and_conversions() -> None:
    mine, theirs = both(4, 6, num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 4)
    want = mine(x)[0]
    again = [copy.deepcopy(mine), copy.copy(mine), pickle.loads(pickle.dumps(mine))]
    buffer = io.BytesIO()
    torch.save(mine.state_dict(), buffer)
    buffer.seek(0)
    loaded = fastlm.nn.GRU(4, 6, num_layers=2, bidirectional=True)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assigned = fastlm.nn.GRU(4, 6, num_layers=2, bidirectional=True, device="meta")
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    for module in (*again, loaded, assigned):
        assert torch.equal(module(x)[0], want)
    with torch.no_grad():
        again[0].weight_hh_l0.zero_()
    assert torch.equal(mine(x)[0], want)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        mine.to(dtype)
        theirs.to(dtype)
        out, h_n = mine(x.to(dtype))
        assert out.dtype == h_n.dtype == dtype
        assert all(w.dtype == dtype for w in mine._flat_weights)
        torch.testing.assert_close(out, theirs(x.to(dtype))[0], atol=2e-2, rtol=2e-2)
    mine.share_memory()
    assert all(p.is_shared() for p in mine.parameters())
    mine.requires_grad_(False)
    assert not mine(x)[0].requires_grad
    mine.weight_hh_l0 = nn.Parameter(torch.zeros(18, 6))
    theirs.weight_hh_l0 = nn.Parameter(torch.zeros(18, 6))
    torch.testing.assert_close(mine(x)[0], theirs(x)[0], atol=2e-2, rtol=2e-2)
    del mine.weight_hh_l0
    assert len(list(mine.parameters())) == 15


def test_cell_is_the_cell() -> None:
    """The class is torch's: isinstance, parameters, values from the same seed, one GRU step."""
    for bias in (True, False):
        torch.manual_seed(3)
        mine = fastlm.nn.GRUCell(4, 6, bias)
        torch.manual_seed(3)
        theirs = nn.GRUCell(4, 6, bias)
        assert isinstance(mine, nn.GRUCell) and repr(mine) == repr(theirs)
        mine.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        x, h = torch.randn(3, 4), torch.randn(3, 6)
        for args in ((x, h), (x,), (x[0], h[0]), (x[0],), (x[:0], h[:0])):
            assert torch.equal(mine(*args), theirs(*args))
        whole = fastlm.nn.GRU(4, 6, bias=bias)
        for name, value in theirs.state_dict().items():
            getattr(whole, f"{name}_l0").data.copy_(value)
        torch.testing.assert_close(mine(x, h), whole(x[None], h[None])[0][0])
        compiled = torch.compile(mine, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, h), theirs(x, h))


def dense(m: nn.Module, b: int, t: int) -> Any:
    return m(torch.randn(b, t, 4), torch.randn(2, b, 6))


def packed_with_hx(m: nn.Module, b: int, t: int) -> Any:
    x = rnn.pack_padded_sequence(torch.randn(b, t, 4), [t] * (b - 1) + [1], batch_first=True)
    return m(x, torch.randn(2, b, 6))


def documents(m: nn.Module, b: int, t: int) -> Any:
    return m(torch.randn(b * t, 4), cu_seqlens=(torch.arange(b + 1) * t).int())


def with_lengths(m: nn.Module, b: int, t: int) -> Any:
    return m(torch.randn(b, t, 4), lengths=torch.tensor([t] * (b - 1) + [1]))


def with_reset(m: nn.Module, b: int, t: int) -> Any:
    return m(torch.randn(b, t, 4), reset=torch.rand(b, t) < 0.5)


CALLS = (dense, packed_with_hx, documents, with_lengths, with_reset)


@pytest.mark.parametrize(
    # one call is enough for the code generator: it sees the same opaque ops
    "call, backend",
    [*((call, "aot_eager") for call in CALLS), (dense, "inductor")],
)
def test_compiles_whole(call: Any, backend: str) -> None:
    """fullgraph, sizes unknown: outputs and gradients of the eager module at two sizes."""
    module = fastlm.nn.GRU(4, 6, batch_first=True, num_layers=2)

    def values(out: Any) -> list[Tensor]:
        return [out[0] if isinstance(out[0], Tensor) else out[0].data, out[1]]

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for b, t in ((3, 5), (4, 7)):
        args, kwargs = call(lambda *a, **k: (a, k), b, t)
        results = []
        for m in (compiled, module):
            outputs = values(m(*args, **kwargs))
            loss = sum(o.square().sum() for o in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
        for a, c in zip(*results, strict=True):
            torch.testing.assert_close(a, c)


def test_exports_with_dynamic_shapes() -> None:
    module = fastlm.nn.GRU(4, 6, num_layers=2, bidirectional=True).eval()
    b, t = torch.export.Dim("b", min=2, max=64), torch.export.Dim("t", min=2, max=512)
    args = (torch.randn(5, 3, 4), torch.randn(4, 3, 6))
    program = torch.export.export(module, args, dynamic_shapes=({0: t, 1: b}, {1: b}))
    for steps, batch in ((5, 3), (9, 2)):
        other = (torch.randn(steps, batch, 4), torch.randn(4, batch, 6))
        for a, c in zip(program.module()(*other), module(*other), strict=True):
            torch.testing.assert_close(a, c)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    for a, c in zip(again(*args), module(*args), strict=True):
        torch.testing.assert_close(a, c)
    ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "fastlm.gru.default" in ops


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("steps", (2, 6))
def test_traces(steps: int) -> None:
    """A trace holds PyTorch's own GRU, takes other sizes, and is saved."""
    dense = fastlm.nn.GRU(4, 6, num_layers=2, bidirectional=True)
    embedded = fastlm.nn.EmbeddingGRU(9, 4, 6, batch_first=False)
    for module, make in (
        (dense, lambda t, b: torch.randn(t, b, 4)),
        (embedded, lambda t, b: torch.randint(9, (t, b))),
    ):
        traced, buffer = torch.jit.trace(module, (make(steps, 2),)), io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        x = make(9, 5)
        for run in (traced, torch.jit.load(buffer)):
            for a, b in zip(run(x), module(x), strict=True):
                torch.testing.assert_close(a, b)


def test_runs_in_a_forked_process() -> None:
    """After the parent has used its threads, a child can still run both passes."""
    module = fastlm.nn.GRU(64, 256)
    x = torch.randn(12, 9, 64)

    def result() -> Tensor:
        return torch.autograd.grad(module(x)[0].square().sum(), module.weight_hh_l0)[0]

    with torch.no_grad():
        want = module(x)[0]
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # OpenMP starts no threads in a forked process; torch's data loaders do the same
            torch.set_num_threads(1)
            with torch.no_grad():
                same = torch.equal(module(x)[0], want)
            code = 0 if same else 2
            os.write(send, b"done")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(send)
    assert os.read(receive, 4) == b"done" and os.waitstatus_to_exitcode(status) == 0
    assert result().shape == module.weight_hh_l0.shape


def test_short_sequences_go_to_torch() -> None:
    """Where PyTorch's own kernel is faster it runs, and `explain` says so; forcing is obeyed."""
    w = [p.detach() for p in nn.GRU(4, 6).parameters()]

    def chosen(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> str | None:
        x = torch.randn(steps, options.pop("batch", 2), 4).to(dtype)
        return fastlm.explain("gru", x, None, [p.to(dtype) for p in w], **options)[0].chosen

    cpu = fastlm.dispatch.ready("gru")[0]
    with pytest.raises(ValueError, match="flat_weights must be 4 tensors, got 0"):
        fastlm.gru(torch.randn(3, 2, 4), None, [])
    with pytest.raises(ValueError, match=r"fastlm.gru: b_hh must be \[18\], got \[1\]"):
        fastlm.gru(torch.randn(3, 2, 4), None, [*w[:3], torch.zeros(1)])
    if cpu == "cpu":
        assert chosen(3) == "torch" and chosen(4) == "cpu"
        assert chosen(4, batch=1) == "torch" and chosen(5, batch=1) == "cpu"
        assert chosen(1, batch=1400) == "cpu"
        assert chosen(3, save="hidden") == "cpu" and chosen(1, torch.bfloat16) == "cpu"
    assert chosen(20, torch.float64) == "torch"
    assert chosen(3, reset=torch.zeros(3, 2)) == cpu
    with fastlm.use_backend("reference"):
        assert chosen(3) == "reference"
    with fastlm.use_backend("torch"):
        assert chosen(20) == "torch"
        with pytest.raises(RuntimeError, match="no backend takes this forward call"):
            fastlm.gru(torch.randn(7, 2, 4), None, w, reset=torch.zeros(7, 2))
    packed = rnn.pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    assert fastlm.explain("gru", packed, None, w)[0].chosen == cpu
    with torch.no_grad():
        assert fastlm.explain("gru", packed, None, w)[0].chosen == "torch"
    big = [p.detach() for p in nn.GRU(4, 512).parameters()]
    assert fastlm.explain("gru", packed, None, big)[0].chosen == cpu


@pytest.mark.skipif("cpu" not in fastlm.dispatch.ready("gru"), reason="the extension is not built")
def test_large_batches_in_bfloat16_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AVX512_BF16, where PyTorch's own products are of pairs too."""
    from fastlm import extension, matmul

    matmul.multiplies_pairs()  # remembered of the processor, not of what is put in its place

    def chosen(batch: int, hidden: int, **options: Any) -> str | None:
        """Of a call without gradient."""
        w = [p.detach().bfloat16() for p in nn.GRU(4, hidden).parameters()]
        x = torch.randn(2, batch, 4).bfloat16()
        return fastlm.explain("gru", x, None, w, **options)[0].chosen

    def is_torchs(batch: int, hidden: int, steps: int = 2) -> bool:
        """Of a call with one."""
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(fastlm.dispatch, "note", lambda op, name, why: taken.append(name))
            module = fastlm.nn.GRU(4, hidden, dtype=torch.bfloat16)
            module(torch.randn(steps, batch, 4).bfloat16())[0].float().sum().backward()
        return taken == ["torch"]

    monkeypatch.setattr(extension, "cpu_isa", lambda: "avx512")
    assert chosen(64, 1024) == "cpu" and not is_torchs(64, 512)
    monkeypatch.setattr(extension, "cpu_isa", lambda: "avx512_bf16")
    assert is_torchs(64, 512) and is_torchs(128, 256) and is_torchs(64, 128, steps=512)
    assert not is_torchs(64, 496) and not is_torchs(63, 600) and not is_torchs(512, 64)
    assert chosen(64, 1024) == "torch" and chosen(64, 512) == "cpu"
    assert chosen(64, 1024, precision="ieee") == chosen(64, 1024, precision="bf16") == "cpu"
    assert chosen(64, 1024, save="hidden") == "cpu"
    assert chosen(64, 1024, reset=torch.zeros(2, 64)) == "cpu"
    with fastlm.use_backend("cpu"):
        assert chosen(64, 1024) == "cpu"


def test_sizes_beyond_2_31() -> None:
    """Shapes of a call whose gates have more than 2^31 values, and positions beyond it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = fastlm.nn.GRU(8, 1024)
        out, h_n = module(torch.empty(1024, 600, 8))
        assert out.shape == (1024, 600, 1024) and h_n.shape == (1, 600, 1024)
        out.sum().backward()
        assert module.weight_hh_l0.grad.shape == (3072, 1024)
    meta = fastlm.nn.GRU(8, 1024, device="meta")
    assert meta(torch.empty(1024, 600, 8, device="meta"))[0].numel() * 4 > 2**31


def test_positions_beyond_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of five tokens at the far end of buffers that hold no other page of memory."""
    from fastlm import extension
    from fastlm.ops.embedding_gru import cpu_kernels, ragged

    if extension.unavailable:
        pytest.skip("the extension is not built")
    hidden, length = 64, 5
    tokens = 2**31 // (4 * hidden) + 100
    first = tokens - length
    x, w_hh = torch.randn(length, 3 * hidden), torch.randn(3 * hidden, hidden) / 8
    plan = ragged.make_plan(torch.tensor([first]), torch.tensor([length]), None, 1)
    # memory that nobody touches costs nothing; new_zeros would touch it
    monkeypatch.setattr(Tensor, "new_zeros", Tensor.new_empty)
    index = torch.empty(tokens, dtype=torch.int64)
    index[first:] = torch.arange(length)
    output, h_n, gates = cpu_kernels.forward(
        x, index, None, w_hh, None, None, 1, True, False, False, plan
    )
    monkeypatch.undo()
    assert gates.numel() > 2**31
    want, want_h, want_gates = cpu_kernels.forward(x, None, None, w_hh, None, None, 1, True, False)
    assert torch.equal(output[first:], want) and torch.equal(h_n, want_h)
    assert torch.equal(gates[first:], want_gates)


@pytest.mark.parametrize("options", SHAPES)
def test_the_module_gives_short_calls_to_torch_at_once(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checks of `gru` on the way; but for what PyTorch's kernel would not do."""
    from fastlm.nn import gru as module

    calls: list[int] = []
    whole = module.gru
    monkeypatch.setattr(module, "gru", lambda *a, **k: calls.append(1) or whole(*a, **k))
    mine, theirs = both(4, 6, **options)
    x = torch.randn(3, 2, 4) if not mine.batch_first else torch.randn(2, 3, 4)
    states = mine.num_layers * (2 if mine.bidirectional else 1)
    if fastlm.extension.unavailable is None:
        for hx in (None, torch.randn(states, 2, 6)):
            with torch.no_grad():
                torch.manual_seed(1)
                got = mine(x, hx)
                torch.manual_seed(1)
                want = theirs(x, hx)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not calls
        assert fastlm.nn.GRU(4, 6)(x[:2]) and not calls
    with fastlm.use_backend("reference"):
        mine(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert mine(x)[0].dtype == torch.bfloat16
    mine(x, reset=torch.zeros(x.shape[:2]))
    mine.zoneout = 0.5
    mine(x)
    mine.zoneout, mine.save = 0.0, "hidden"
    mine(x)
    mine.double()(x.double())
    assert len(calls) == 6
    for wrong in (torch.randn(states, 3, 6), torch.randn(states, 2, 6)):
        with pytest.raises(RuntimeError, match="hidden size|dtype"):
            mine(x.double(), wrong)
