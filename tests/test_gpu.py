"""Every public op on a CUDA device against float64; on the CPU too, which keeps the list right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.attention import hopper

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])]
DTYPES = (torch.float32, torch.bfloat16)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def weights(features: int, hidden: int) -> list[Tensor]:
    shapes = ((3 * hidden, features), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    return [torch.empty(*shape).uniform_(-(hidden**-0.5), hidden**-0.5) for shape in shapes]


def torch_gru(x: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
    """Written out, because nn.GRU has no bfloat16 on every device."""
    w_ih, w_hh, b_ih, b_hh = flat
    h, outputs = x.new_zeros(x.shape[0], w_hh.shape[1]), []
    for t in range(x.shape[1]):
        gi, gh = functional.linear(x[:, t], w_ih, b_ih), functional.linear(h, w_hh, b_hh)
        (ir, iz, i_n), (hr, hz, hn) = gi.chunk(3, 1), gh.chunk(3, 1)
        z = (iz + hz).sigmoid()
        n = (i_n + (ir + hr).sigmoid() * hn).tanh()
        h = n + z * (h - n)
        outputs.append(h)
    return torch.stack(outputs, 1), h[None]


# documents of 4, 0, 1 and 4 tokens; read on the host
OFFSETS = (0, 4, 4, 5, 9)


def documents_gru(x: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
    return fastlm.gru(x, None, flat, cu_seqlens=torch.tensor(OFFSETS, dtype=torch.int32))


def torch_documents_gru(x: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
    lengths = [b - a for a, b in zip(OFFSETS[:-1], OFFSETS[1:], strict=True)]
    zero = x.new_zeros(1, 1, flat[1].shape[1])
    done = [torch_gru(d[None], *flat) if len(d) else (zero[:, :0], zero) for d in x.split(lengths)]
    return torch.cat([out[0] for out, _ in done]), torch.cat([h_n for _, h_n in done], 1)


def logprobs(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def entropy(logits: Tensor) -> Tensor:
    scores = logits.log_softmax(-1)
    return -(scores.exp() * scores).sum(-1)


def distillation(x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    log_q = functional.linear(x, weight).log_softmax(-1)
    log_p = functional.linear(teacher, teacher_weight).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def top_distillation(x: Tensor, weight: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    q = functional.linear(x, weight).softmax(-1).gather(-1, ids)
    q, p = (torch.cat((v, 1 - v.sum(-1, keepdim=True)), -1) for v in (q, scores.exp()))
    return functional.kl_div(q.log(), p, reduction="batchmean")


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v)


# two documents of attention, 4 and 5 tokens, and a token behind them
STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
    named = dict(zip(("alibi_slopes", "sink", "bias"), extra, strict=True))
    starts = {f"cu_seqlens_{which}": STARTS.to(q.device) for which in "qk"}
    options = {"layout": "thd", "softcap": 2.0, "window": (3, 0), **starts}
    return fastlm.attention(q, k, v, **named, **options)


def torch_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sink: Tensor, bias: Tensor
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    place = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(place, STARTS.to(q.device)[1:], right=True)
    distance = place[:, None] - place
    x = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    s = 2 * (x / 2).tanh() - slopes[:, None, None] * distance.abs() + bias
    keep = (document[:, None] == document) & (distance >= 0) & (distance <= 3)
    s = s.masked_fill(~keep, float("-inf"))
    s = torch.cat([s, sink[:, None, None].expand(*s.shape[:2], 1)], -1)
    out = torch.einsum("hqk,khd->qhd", s.softmax(-1)[..., :-1], v)
    return out * (document < 2)[:, None, None]


def reinforce(scores: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages.detach()[:, None] * scores).mean()


@dataclass(frozen=True)
class Op:
    """A public function: ours and plain on the same arguments."""

    make: Callable[[], Sequence[Any]]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    registered: tuple[str, ...] = ()  # torch ops beneath, for their backends
    public: str = ""  # the function, where its name is not that of the op


TARGET = torch.tensor([0, 32, 5, 7, 11])

# odd sizes: every kernel has a masked tail
OPS = {
    "cross_entropy": Op(
        lambda: [randn(5, 33), TARGET],
        lambda logits, target: fastlm.cross_entropy(logits, target),
        lambda logits, target: functional.cross_entropy(logits, target),
    ),
    "linear_cross_entropy": Op(
        lambda: [randn(5, 7), randn(33, 7), TARGET],
        lambda x, weight, target: fastlm.linear_cross_entropy(x, weight, target),
        lambda x, weight, target: functional.cross_entropy(functional.linear(x, weight), target),
    ),
    "token_logprobs": Op(
        lambda: [randn(5, 33), TARGET],
        lambda logits, target: fastlm.token_logprobs(logits, target),
        logprobs,
    ),
    "linear_token_logprobs": Op(
        lambda: [randn(5, 7), randn(33, 7), TARGET],
        lambda x, weight, target: fastlm.linear_token_logprobs(x, weight, target),
        lambda x, weight, target: logprobs(functional.linear(x, weight), target),
    ),
    "linear": Op(lambda: [randn(5, 7), randn(33, 7), randn(33)], fastlm.linear, functional.linear),
    "linear_kl_div": Op(
        lambda: [randn(5, 7), randn(33, 7), randn(5, 6), randn(33, 6)],
        lambda x, weight, *teacher: fastlm.linear_kl_div(x, weight, *(t.detach() for t in teacher)),
        lambda x, weight, *teacher: distillation(x, weight, *(t.detach() for t in teacher)),
    ),
    "linear_topk_kl_div": Op(
        lambda: [randn(5, 7), randn(33, 7), *randn(5, 33).log_softmax(-1).topk(4)],
        lambda x, weight, scores, ids: fastlm.linear_topk_kl_div(x, weight, scores.detach(), ids),
        lambda x, weight, scores, ids: top_distillation(x, weight, scores.detach(), ids),
    ),
    "entropy": Op(lambda: [randn(5, 33)], lambda logits: fastlm.entropy(logits), entropy),
    "attention": Op(
        lambda: [randn(2, 9, 3, 16) for _ in range(3)],
        lambda q, k, v: fastlm.attention(q, k, v, mask="causal"),
        causal,
    ),
    "packed_attention": Op(
        lambda: [
            *(randn(10, heads, 16) for heads in (4, 2, 2)),
            *(torch.rand(4), randn(4), randn(4, 10, 1)),
        ],
        packed_attention,
        torch_packed_attention,
        public="attention",
    ),
    "gru": Op(
        lambda: [randn(3, 5, 7), *weights(7, 9)],
        lambda x, *flat: fastlm.gru(x, None, flat, batch_first=True),
        torch_gru,
    ),
    "ragged_gru": Op(
        lambda: [randn(9, 7), *weights(7, 9)], documents_gru, torch_documents_gru, public="gru"
    ),
    "embedding_gru": Op(
        lambda: [TARGET.expand(3, 5), randn(33, 7), *weights(7, 9)],
        lambda tokens, weight, *flat: fastlm.embedding_gru(tokens, weight, *flat)[0],
        lambda tokens, weight, *flat: torch_gru(functional.embedding(tokens, weight), *flat)[0],
    ),
    "linear_policy_loss": Op(
        lambda: [randn(3, 5, 7), randn(33, 7), TARGET.expand(3, 5), randn(3)],
        lambda x, weight, target, advantages: fastlm.linear_policy_loss(
            x, weight, target, advantages.detach()
        ),
        lambda x, weight, target, advantages: reinforce(
            logprobs(functional.linear(x, weight).flatten(0, 1), target.flatten()).view(3, 5),
            advantages,
        ),
    ),
    "policy_loss": Op(
        lambda: [randn(3, 5), randn(3)],
        lambda scores, advantages: fastlm.policy_loss(scores, advantages.detach()),
        reinforce,
    ),
}


def arguments(op: Op, dtype: torch.dtype, device: str) -> list[Any]:
    return [
        a.to(device, dtype if a.is_floating_point() else a.dtype) if isinstance(a, Tensor) else a
        for a in op.make()
    ]


def present(name: str) -> None:
    if name in OPS:
        name = OPS[name].public or name
    if not hasattr(fastlm, name):
        pytest.skip(f"not in this build: fastlm.{name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_op_is_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, device: str) -> None:
    present(name)
    op = OPS[name]
    testing.check(op.ours, op.plain, arguments(op, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
def test_sample_depends_on_seed_row_and_step_alone(device: str) -> None:
    present("sample")
    logits = randn(4, 33).to(device)
    tokens, chosen = fastlm.sample(logits, temperature=0.8, seed=1, step=2)
    again, _ = fastlm.sample(
        logits[2:3], temperature=0.8, seed=1, step=2, rows=2 + TARGET[:1].to(device)
    )
    assert torch.equal(tokens[2:3], again)
    assert bool(((tokens >= 0) & (tokens < 33)).all())
    want = logprobs(logits.double() / 0.8, tokens)
    assert testing.error(chosen.double(), want) < 1e-4
    greedy, _ = fastlm.sample(logits, temperature=0.0)
    assert torch.equal(greedy, logits.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_decoder_is_the_forward(device: str) -> None:
    model = fastlm.nn.EmbeddingGRU(33, 7, 9, num_layers=2).to(device)
    tokens = TARGET.expand(3, 5).to(device)
    decoder = model.decoder()
    h = decoder.start(3)
    for t in range(5):
        _, h = decoder.step(tokens[:, t], h)
    torch.testing.assert_close(h, model(tokens)[1].detach())


@pytest.mark.parametrize("device", DEVICES)
def test_generation(device: str) -> None:
    body = fastlm.nn.EmbeddingGRU(33, 7, 9, num_layers=2).to(device)
    head = torch.nn.Linear(9, 33).to(device)
    decoder = fastlm.nn.GRUDecoder(body, head)
    prompts = torch.tensor([[1, 2], [3, 4]], device=device)
    made = fastlm.generate(decoder, prompts, 6, stop=5, seed=1, save_for_backward=True)
    again = fastlm.generation_logprobs(decoder, prompts, made.tokens)
    live = made.tokens != -100
    read = torch.cat([prompts, made.tokens.clamp(min=0)], 1)
    scores = head(body(read[:, :-1])[0])[:, 1:].log_softmax(-1)
    want = scores.gather(-1, made.tokens.clamp(min=0)[..., None])[..., 0] * live
    parameters = [*body.parameters(), *head.parameters()]
    theirs = torch.autograd.grad(want.sum(), parameters)
    for logprobs in (made.logprobs, again):
        torch.testing.assert_close(logprobs, want)
        for a, b in zip(torch.autograd.grad(logprobs.sum(), parameters), theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_forced_gpu_backends_agree_too(name: str, dtype: torch.dtype) -> None:
    """Kernels that are not yet the default run here, so that a GPU run can prove them."""
    present(name)
    op = OPS[name]
    torch.manual_seed(1)
    args = arguments(op, dtype, "cuda")
    ran = 0
    for backend in ("cuda", "triton"):
        try:
            with fastlm.use_backend(backend):
                testing.check(op.ours, op.plain, args)
            ran += 1
        except RuntimeError as error:
            if "no backend takes this" not in str(error):
                raise
    if not ran:
        pytest.skip(f"no CUDA or Triton kernel takes this call of {name}")


# sizes of attention: batch, queries, keys, heads, key heads, head size; and options
HOPPER = {
    "full": ((2, 384, 1024, 4, 4, 128), {}),
    "causal": ((2, 777, 777, 8, 2, 64), {"mask": "causal"}),
    "more_keys": ((1, 130, 2000, 4, 1, 128), {"mask": "causal", "softcap": 20.0}),
    "rows_without_keys": ((1, 500, 130, 2, 1, 128), {"mask": "causal"}),
    "window": ((1, 1500, 1500, 4, 2, 128), {"window": (200, 0)}),
    "documents": ((1, 900, 900, 4, 4, 64), {"mask": "documents"}),
}


@pytest.fixture
def hopper_used() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    with hopper.use(), fastlm.use_backend("triton"), torch.no_grad():
        yield


def hopper_case(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    (batch, rows, keys, heads, key_heads, size), given = HOPPER[name]
    torch.manual_seed(2)
    sizes = ((rows, heads), (keys, key_heads), (keys, key_heads))
    qkv = [randn(batch, n, h, size).to("cuda", dtype) for n, h in sizes]
    if given.get("mask") == "documents":
        given = {"mask": fastlm.AttnMask.documents(torch.arange(rows, device="cuda") // 70)}
    return qkv, given


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("size", (64, 128))
def test_hopper_attention_of_one_tile(size: int, hopper_used: None) -> None:
    """Row i attends to key size - 1 - i alone: out is V upside down, bit for bit, unless a copy or
    the layout of an operand is wrong. The first test to run on a new GPU."""
    unit = 16 * torch.eye(size, device="cuda", dtype=torch.bfloat16)[None, :, None]
    v = randn(1, size, 1, size).to("cuda", torch.bfloat16)
    out = fastlm.attention(unit.flip(1), unit, v, scale=1.0)
    assert torch.equal(out, v.flip(1))


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", HOPPER)
def test_hopper_attention(name: str, dtype: torch.dtype, hopper_used: None) -> None:
    """The Hopper kernel against the reference, and bit for bit again: a race would differ."""
    qkv, given = hopper_case(name, dtype)
    call = functools.partial(fastlm.attention, **given, return_lse=True)
    assert hopper.refuses(*qkv, **hopper_options(qkv)) is None
    out, lse = call(*qkv)
    with fastlm.use_backend("reference"):
        want, want_lse = call(*(x.double() for x in qkv))
        theirs, _ = call(*qkv)
    allowed = 2 * testing.error(theirs.double(), want) + 8 * torch.finfo(dtype).eps
    assert testing.error(out.double(), want) <= allowed
    assert testing.error(lse.double(), want_lse) < 1e-4
    for _ in range(20):
        again, lse_again = call(*qkv)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("name", [n for n in HOPPER if n not in ("more_keys", "documents")])
def test_hopper_attention_backward(name: str, hopper_used: None) -> None:
    qkv, given = hopper_case(name, torch.bfloat16)
    dout = torch.randn_like(qkv[0])

    def grads(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out, lse = fastlm.attention(*leaves, **given, return_lse=True)
            pairs = (out, lse.masked_fill(lse == -torch.inf, 0.0))
            given_grads = (dout.to(out.dtype), torch.ones_like(pairs[1]))
            return torch.autograd.grad(pairs, leaves, given_grads)

    found = grads(*qkv)
    with fastlm.use_backend("reference"):
        want, theirs = grads(*(x.double() for x in qkv)), grads(*qkv)
    for got, exact, rough in zip(found, want, theirs, strict=True):
        scale = 8 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        allowed = 2 * testing.error(rough.double(), exact) + scale
        assert testing.error(got.double(), exact) <= allowed
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(found, grads(*qkv), strict=True))


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("size", (64, 128))
def test_hopper_attention_packed(size: int, hopper_used: None) -> None:
    """Sequences that end within a tile; NaN in one reaches no other; rows behind the last are 0."""
    starts = torch.tensor([0, 130, 130, 137, 700, 701], dtype=torch.int32, device="cuda")
    q, k, v = (randn(800, h, size).to("cuda", torch.bfloat16) for h in (4, 2, 2))
    call = functools.partial(
        fastlm.attention, layout="thd", mask="causal", cu_seqlens_q=starts, cu_seqlens_k=starts
    )
    out = call(q, k, v)
    with fastlm.use_backend("reference"):
        want = call(*(x.double() for x in (q, k, v)))
    assert testing.error(out.double(), want) < 0.03
    assert not out[701:].any()
    k[130:137], v[130:137] = float("nan"), float("nan")
    poisoned = call(q, k, v)
    assert torch.equal(out[:130], poisoned[:130]) and torch.equal(out[137:], poisoned[137:])


def hopper_options(qkv: list[Tensor]) -> dict[str, Any]:
    absent = ("lo", "hi", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink", "bias", "seed")
    numbers = {"scale": qkv[0].shape[3] ** -0.5, "left": -1, "right": -1, "softcap": 0.0}
    return {**dict.fromkeys(absent), **numbers, "dropout_p": 0.0}


def test_every_op_with_a_torch_op_is_listed_here() -> None:
    """A new op must come with a line above."""
    # tested above by tests of their own; steps of decoding, which have no gradient, by the decoder
    own = {"sample", "sampling", "generation", "generation_logprobs"}
    hidden = {*own, "generation_step", "decode_attention", "decode_attention_append"}
    covered = {*OPS, *hidden}
    for name in dispatch._OPS:
        beneath = name.startswith("library_test") or name.endswith("row_statistics")
        assert beneath or name in covered, f"{name} is not in OPS of tests/test_gpu.py"
