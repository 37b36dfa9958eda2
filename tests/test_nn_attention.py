"""fastlm.nn.MultiheadAttention: PyTorch's own samples and checks of its module, and what is added.

The samples are those of torch.testing._internal; the other cases are those that PyTorch's own
tests of the module make, in a form that compares with torch.nn.MultiheadAttention itself.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from backends import on_backends
from torch import Tensor, nn
from torch_samples import gradcheck, strided_variants, torch_modules

import fastlm
from fastlm import AttnMask, dispatch, testing

BACKENDS = (None, *dispatch.ready("attention"))
every_backend = on_backends(*BACKENDS)
both = pytest.mark.parametrize


def pair(*args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Ours and PyTorch's with the same parameters, none of them zero."""
    ours = fastlm.nn.MultiheadAttention(*args, **options).to(dtype)
    theirs = nn.MultiheadAttention(*args, **options).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.4)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(
    ours: Any, rows: int = 5, keys: int = 7, batch: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    sizes = ((rows, ours.embed_dim), (keys, ours.kdim), (keys, ours.vdim))
    if not batch:
        return [torch.randn(s, dtype=dtype) for s in sizes]
    first = ours.batch_first
    return [torch.randn(*((batch, n) if first else (n, batch)), c, dtype=dtype) for n, c in sizes]


def same(ours: Any, theirs: Any, args: list[Any], **options: Any) -> None:
    """Outputs, weights and all gradients, the parameters' too, as accurate as PyTorch's."""
    names = [name for name, _ in ours.named_parameters()]
    count = len(args)

    def call(module: nn.Module) -> Any:
        def run(*values: Tensor) -> Any:
            dtype = values[0].dtype
            module.to(dtype)
            given = {
                k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in options.items()
            }
            # functional_call leaves forward in charge, with these tensors as parameters
            parameters = dict(zip(names, values[count:], strict=True))
            out = torch.func.functional_call(module, parameters, values[:count], given)
            return [x for x in out if x is not None]

        return run

    values = [*args, *(p.detach().clone() for p in ours.parameters())]
    testing.check(call(ours), call(theirs), values)


def equal(ours: Any, theirs: Any, args: list[Tensor], **options: Any) -> None:
    """Outputs, weights and all gradients, in float64, or float32 on a backend without it."""
    found, dtype = [], torch.float64 if dispatch.forced() in (None, "reference") else torch.float32
    for module in (ours.to(dtype), theirs.to(dtype)):
        leaves = [x.to(dtype).requires_grad_() for x in args]
        given = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in options.items()
        }
        out = [x for x in module(*leaves, **given) if x is not None]
        every = [*leaves, *module.parameters()]
        upstream = [x.detach().cos() for x in out]
        found.append([*out, *torch.autograd.grad(out, every, upstream, allow_unused=True)])
    torch.testing.assert_close(*found)


INFO = torch_modules.ModuleInfo(
    fastlm.nn.MultiheadAttention,
    train_and_eval_differ=True,
    module_inputs_func=torch_modules.module_inputs_torch_nn_MultiheadAttention,
)


def samples(dtype: torch.dtype, training: bool, grad: bool = False) -> list[Any]:
    return INFO.module_inputs_func(
        INFO, device="cpu", dtype=dtype, requires_grad=grad, training=training
    )


@both("dtype", [torch.float32, torch.float64])
@both("training", [True, False])
@both("need_weights", [True, False])
def test_samples_of_pytorch(dtype: torch.dtype, training: bool, need_weights: bool) -> None:
    """Each sample: its reference, torch's module, a copy, pickled, saved, empty and loaded."""
    count = 0
    for sample in samples(dtype, training):
        given, call = sample.constructor_input, sample.forward_input
        module = fastlm.nn.MultiheadAttention(*given.args, **given.kwargs)
        module = module.to(dtype).train(training)
        options = call.kwargs | {"need_weights": need_weights}
        got = module(*call.args, **options)
        other = nn.MultiheadAttention(*given.args, **given.kwargs).to(dtype).train(training)
        other.load_state_dict(module.state_dict(), strict=True)
        torch.testing.assert_close(got, other(*call.args, **options))
        if need_weights:
            want = sample.reference_fn(module, *call.args, **call.kwargs)
            torch.testing.assert_close(got, want)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for again in (loaded, copy.deepcopy(module)):
            torch.testing.assert_close(again(*call.args, **options), got, rtol=0, atol=0)
            assert again.state_dict().keys() == other.state_dict().keys()
        for device in ("cpu", "meta"):
            empty = fastlm.nn.MultiheadAttention(
                *given.args, **given.kwargs, device=device, dtype=dtype
            )
            assert all(p.dtype == dtype and p.device.type == device for p in empty.parameters())
        assert repr(module) == repr(other)
        count += 1
    assert count == 64


@both("need_weights", [True, False])
def test_samples_in_any_stride_and_gradcheck(need_weights: bool) -> None:
    for position, sample in enumerate(samples(torch.float64, True, True)):
        given, call = sample.constructor_input, sample.forward_input
        module = fastlm.nn.MultiheadAttention(*given.args, **given.kwargs).double()
        options = call.kwargs | {"need_weights": need_weights}

        def run(*args: Tensor, module: Any = module, options: Any = options) -> Tensor:
            return module(*args, **options)[0]

        want = run(*call.args)
        for index, value in enumerate(call.args):
            for other in strided_variants(value):
                changed = [*call.args[:index], other, *call.args[index + 1 :]]
                torch.testing.assert_close(run(*changed), want)
        if position % 7 == 0:  # the fused kernel of PyTorch behind it has no batched gradient
            assert gradcheck(run, call.args, check_batched_grad=False)


def test_initialisation_is_that_of_pytorch() -> None:
    for options in ({}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True}, {"bias": False}):
        torch.manual_seed(3)
        ours = fastlm.nn.MultiheadAttention(8, 2, **options).state_dict()
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(8, 2, **options).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@every_backend
@both("batch_first", [True, False])
@both("batch", [3, 0])
@both("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_without_weights(
    backend: str | None, batch_first: bool, batch: int, options: Any, poisoned: None
) -> None:
    ours, theirs = pair(8, 2, batch_first=batch_first, **options)
    with fastlm.use_backend(backend):
        same(ours, theirs, inputs(ours, batch=batch), need_weights=False)


def masks_of(rows: int, keys: int, batch: int, heads: int) -> list[dict[str, Tensor]]:
    padding = torch.arange(keys) >= torch.tensor([keys, keys - 2, 1])[:batch, None]
    scattered = torch.rand(batch, keys) < 0.4
    scattered[:, 0] = False
    upper = torch.ones(rows, keys, dtype=torch.bool).triu(1)
    each = torch.rand(batch * heads, rows, keys) < 0.4
    each[..., 0] = False
    floats = torch.randn(batch * heads, rows, keys)
    return [
        {"key_padding_mask": padding},
        {"key_padding_mask": scattered},
        {"attn_mask": upper},
        {"attn_mask": each},
        {"attn_mask": upper, "key_padding_mask": padding},
        {"attn_mask": each, "key_padding_mask": scattered},
        {"attn_mask": floats},
        {"attn_mask": torch.randn(rows, keys), "key_padding_mask": torch.randn(batch, keys)},
        {"attn_mask": torch.zeros(rows, keys).masked_fill(upper, -math.inf)},
    ]


@both("backend", [None, "reference", *(b for b in BACKENDS if b in ("cpu", "cuda", "triton"))])
@both("which", range(9))
@both("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_masks(backend: str | None, which: int, extra: Any) -> None:
    ours, theirs = pair(8, 2, batch_first=True, **extra)
    with fastlm.use_backend(backend):
        masks = masks_of(5, 7, 3, 2)[which]
        equal(ours, theirs, inputs(ours), need_weights=False, **masks)
        equal(ours, theirs, inputs(ours), average_attn_weights=which % 2 == 0, **masks)


@both("backend", [None, "reference"])
@both("padded", [False, True])
def test_causal_hint(backend: str | None, padded: bool) -> None:
    """The hint stands for the mask, and the mask counts where there is padding or weights."""
    ours, theirs = pair(8, 4, batch_first=True)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(3, 6).masked_fill(torch.arange(6) > 3, -math.inf) if padded else None
    with fastlm.use_backend(backend):
        for weights in (False, True):
            options = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}
            equal(ours, theirs, [x, x, x], need_weights=weights, **options)
            with pytest.raises(
                RuntimeError, match="Need attn_mask if specifying the is_causal hint"
            ):
                ours(x, x, x, need_weights=weights, is_causal=True)


@both("shared", ["all", "kv", "none"])
def test_shared_inputs_give_one_product(shared: str) -> None:
    ours, theirs = pair(12, 3, batch_first=True)
    x, y, z = (torch.randn(2, 6, 12, requires_grad=True) for _ in range(3))
    given = {"all": (x, x, x), "kv": (x, y, y), "none": (x, y, z)}[shared]
    got, want = (m(*given, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    leaves = [*ours.parameters(), x], [*theirs.parameters(), x]
    grads = (
        torch.autograd.grad(o.sin().sum(), p) for o, p in zip((got, want), leaves, strict=True)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@both("backend", [None, "reference"])
def test_queries_without_keys(backend: str | None) -> None:
    """The output bias without weights and NaN with them, both as in PyTorch."""
    ours, theirs = pair(8, 2, batch_first=True)
    args = inputs(ours)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1] = True
    with fastlm.use_backend(backend):
        for weights in (False, True):
            got, want = (m(*args, padding, need_weights=weights)[0] for m in (ours, theirs))
            torch.testing.assert_close(got, want, equal_nan=True)
            assert bool(got[1].isnan().all()) is weights
            if not weights:
                assert torch.equal(got[1], ours.out_proj.bias.expand(5, 8))
                grads = torch.autograd.grad(got.sum(), list(ours.parameters()))
                assert all(bool(g.isfinite().all()) for g in grads)


@both("empty", ["rows", "batch"])
def test_empty(empty: str) -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    args = inputs(ours, rows=0 if empty == "rows" else 5)
    args = [x[:0] for x in args] if empty == "batch" else args
    got, want = (m(*args, need_weights=False)[0] for m in (ours, theirs))
    assert got.shape == want.shape and got.numel() == 0


def test_dropout_only_in_training() -> None:
    ours, theirs = pair(8, 2, 0.5, batch_first=True)
    args = inputs(ours)
    torch.testing.assert_close(
        ours.eval()(*args, need_weights=False)[0], theirs.eval()(*args, need_weights=False)[0]
    )
    ours.train()
    torch.manual_seed(1)
    first = ours(*args, need_weights=False)[0]
    assert not torch.equal(first, ours(*args, need_weights=False)[0])
    torch.manual_seed(1)
    assert torch.equal(first, ours(*args, need_weights=False)[0])


@both("dtype", [torch.bfloat16, torch.float16])
@both("backend", [None, "reference"])
def test_half_and_autocast(dtype: torch.dtype, backend: str | None) -> None:
    ours, theirs = pair(16, 4, batch_first=True, add_bias_kv=True)
    args = inputs(ours)
    with fastlm.use_backend(backend):
        with torch.autocast("cpu", dtype=dtype):
            got, want = (m(*args, need_weights=False)[0] for m in (ours, theirs))
        assert got.dtype == want.dtype == dtype
        exact = theirs(*args, need_weights=False)[0].detach().double()
        allowed = 2 * testing.error(want.detach().double(), exact) + 8 * torch.finfo(dtype).eps
        assert testing.error(got.detach().double(), exact) <= allowed
        ours, theirs = (m.to(dtype) for m in (ours, theirs))
        same(ours, theirs, [x.to(dtype) for x in args], need_weights=False)


def wrong_calls() -> list[tuple[list[Tensor], dict[str, Any]]]:
    a, b = torch.randn(4, 4, 4), torch.randn(4, 4)
    ones = torch.tensor([False, False, True, True])
    return [
        ([a, b, a], {}),
        ([a, a, b], {}),
        ([a, a, a], {"key_padding_mask": ones}),
        ([a, a, a], {"attn_mask": ones}),
        ([b, a, b], {}),
        ([b, b, a], {}),
        ([b, b, b], {"key_padding_mask": ones[None]}),
        ([b, b, b], {"attn_mask": ones}),
        ([b, b, b], {"attn_mask": torch.ones(5, 4, 4).bool()}),
        ([a, a, a], {"attn_mask": torch.ones(4, 5).bool()}),
        ([a, a, a], {"attn_mask": torch.ones(3, 4, 4).bool()}),
        ([a, a, a], {"attn_mask": torch.ones(4, 4).int()}),
        ([a, a, a[:3]], {}),
        ([torch.randn(4), b, b], {}),
        ([a[..., :3], a, a], {}),
        ([a, a, a], {"key_padding_mask": torch.zeros(4, 3).bool()}),
    ]


@both("case", range(len(wrong_calls())))
@both("training", [True, False])
@both("need_weights", [True, False])
def test_errors_are_those_of_pytorch(case: int, training: bool, need_weights: bool) -> None:
    ours, theirs = (m.train(training) for m in pair(4, 4, batch_first=True))
    args, options = wrong_calls()[case]
    options["need_weights"] = need_weights
    with pytest.raises(Exception) as want:  # noqa: B017
        theirs(*args, **options)
    with pytest.raises(type(want.value)) as got:
        ours(*args, **options)
    assert str(got.value) == str(want.value)


def test_constructor_errors() -> None:
    with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
        fastlm.nn.MultiheadAttention(0, 2)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        fastlm.nn.MultiheadAttention(7, 2)
    with pytest.raises(ValueError, match="num_kv_heads must be a divisor of num_heads = 4, got 3"):
        fastlm.nn.MultiheadAttention(8, 4, num_kv_heads=3)


@both("need_weights", [True, False])
def test_nested_and_transformed_calls_go_to_pytorch(need_weights: bool) -> None:
    ours, theirs = (m.eval() for m in pair(10, 2, batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(4, 10), torch.randn(6, 10)])
    with torch.no_grad():
        got, want = (
            m(nested, nested, nested, need_weights=need_weights)[0] for m in (ours, theirs)
        )
    for a, b in zip(got.unbind(), want.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    x = torch.randn(4, 3, 5, 10)
    got, want = (
        torch.func.vmap(lambda x, m=m: m(x, x, x, need_weights=need_weights)[0])(x)
        for m in (ours, theirs)
    )
    torch.testing.assert_close(got, want)


def test_small_inference_is_the_fused_call_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faster without masks and gradient; the rest is ours."""
    ours, theirs = (m.eval() for m in pair(8, 2, batch_first=True))
    x, seen = torch.randn(2, 5, 8), []
    fused = torch._native_multi_head_attention
    monkeypatch.setattr(
        torch, "_native_multi_head_attention", lambda *a, **o: (seen.append(1), fused(*a, **o))[1]
    )
    want = theirs(x, x, x, need_weights=False)[0]
    for options in ({}, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}):
        torch.testing.assert_close(ours(x, x, x, need_weights=False, **options)[0], want)
        assert not seen
        with torch.no_grad():
            got = ours(x, x, x, need_weights=False, **options)[0]
        torch.testing.assert_close(got, want)
        assert len(seen) == (not options)
        seen.clear()


@both("norm_first", [True, False])
@both("training", [True, False])
def test_inside_transformer_layers(norm_first: bool, training: bool) -> None:
    """Encoder and decoder give what they give with torch's module, on the fused path too."""
    encoder = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
    decoder = nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(7)

    def run() -> list[Tensor]:
        encoder.train(training), decoder.train(training)
        memory = encoder(x, src_key_padding_mask=padding)[:, :3]
        return [memory, decoder(y, memory, tgt_mask=causal, tgt_is_causal=True)]

    with torch.set_grad_enabled(training):
        want = run()
        for layer, names in ((encoder, ["self_attn"]), (decoder, ["self_attn", "multihead_attn"])):
            for name in names:
                ours = fastlm.nn.MultiheadAttention(16, 4, batch_first=True)
                ours.load_state_dict(getattr(layer, name).state_dict(), strict=True)
                setattr(layer, name, ours)
        for a, b in zip(run(), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_script() -> None:
    """torch.jit.script takes PyTorch's module on the same parameters, in a model too."""
    ours, theirs = (m.eval() for m in pair(8, 2, batch_first=True, kdim=6))
    q, k, v = inputs(ours)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(q, k, v), theirs(q, k, v))
    assert {p.data_ptr() for p in scripted.parameters()} == {
        p.data_ptr() for p in ours.parameters()
    }
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    want = layer(x)
    with fastlm.swap(layer):
        torch.testing.assert_close(torch.jit.script(layer)(x), want)
    torch.testing.assert_close(layer(x), want)


@both("options", [{"num_kv_heads": 2}, {"window": (2, 0)}], ids=str)
def test_fused_encoder_layer_does_not_bypass_what_is_added(options: Any) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    layer.self_attn = fastlm.nn.MultiheadAttention(16, 4, batch_first=True, **options)
    x = torch.randn(2, 9, 16)
    want = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), want)
        stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
        padding = torch.arange(9) >= torch.tensor([9, 4])[:, None]
        got = stack(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[1, :4], stack(x[1:, :4])[0])


# ---- what is added -------------------------------------------------------------------------------


@both("need_weights", [True, False])
@both("options", [{}, {"kdim": 6, "add_bias_kv": True}, {"bias": False, "add_zero_attn": True}])
def test_shared_key_heads(need_weights: bool, options: Any) -> None:
    """As PyTorch's module whose key and value projections repeat those of a group."""
    ours = fastlm.nn.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, **options)
    state = ours.state_dict()
    assert state["k_proj_weight"].shape == (8, ours.kdim) and "in_proj_weight" not in state
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, **(options | {"vdim": 16, "kdim": 6}))
    if "kdim" not in options:
        theirs = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def repeated(x: Tensor, dim: int) -> Tensor:
        return x.unflatten(dim, (2, 4)).repeat_interleave(2, dim).flatten(dim, dim + 1)

    q, k, v = (state[f"{n}_proj_weight"] for n in "qkv")
    parts = [q, repeated(k, 0), repeated(v, 0)]
    whole = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True))
    if "kdim" not in options:
        whole = {"in_proj_weight": torch.cat(parts)}
    whole |= {n: state[n] for n in state if n.startswith("out_proj")}
    if "in_proj_bias" in state:
        torch.nn.init.normal_(ours.in_proj_bias)
        b = [*state["in_proj_bias"].split([16, 8, 8])]
        whole["in_proj_bias"] = torch.cat([b[0], repeated(b[1], 0), repeated(b[2], 0)])
    whole |= {n: repeated(state[n], 2) for n in ("bias_k", "bias_v") if n in state}
    theirs.load_state_dict(whole, strict=True)
    args = inputs(ours)
    for masks in ({}, masks_of(5, 7, 3, 4)[5]):
        got, want = (m(*args, need_weights=need_weights, **masks) for m in (ours, theirs))
        torch.testing.assert_close(got, want)


@both("need_weights", [True, False])
def test_window_and_mask(need_weights: bool) -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    ours.window = (2, 1)
    x = torch.randn(2, 9, 8)
    ids = torch.tensor([0] * 4 + [1] * 5)
    place = torch.arange(9)
    near = (place[:, None] - place <= 2) & (place - place[:, None] <= 1)
    dense = near & (ids[:, None] == ids) & (place <= place[:, None])
    for options, keep in (
        ({}, near),
        ({"mask": AttnMask.documents(ids), "is_causal": True}, dense),
        ({"mask": AttnMask.documents(ids), "attn_mask": place > place[:, None]}, dense),
    ):
        got = ours(x, x, x, need_weights=need_weights, **options)
        want = theirs(x, x, x, need_weights=need_weights, attn_mask=~keep)
        torch.testing.assert_close(got, want)


def test_packed_sequences() -> None:
    ours, theirs = pair(8, 2)
    x = torch.randn(11, 8)
    starts = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    for causal in (False, True):
        got = ours(x, x, x, need_weights=False, cu_seqlens=starts, is_causal=causal)[0]
        for a, b in itertools.pairwise([0, 4, 11]):
            mask = torch.ones(b - a, b - a, dtype=torch.bool).triu(1) if causal else None
            want = theirs(x[a:b], x[a:b], x[a:b], need_weights=False, attn_mask=mask)[0]
            torch.testing.assert_close(got[a:b], want)
    with pytest.raises(ValueError, match="need_weights must be False"):
        ours(x, x, x, cu_seqlens=starts)
    with pytest.raises(ValueError, match=r"query must be \[\*, 8\] \(\[T, E\]\), got \[1, 11, 8\]"):
        ours(x[None], x, x, need_weights=False, cu_seqlens=starts)


# ---- compilation ---------------------------------------------------------------------------------


@both("need_weights", [True, False])
@both("options", [{}, {"num_kv_heads": 2, "window": (3, 0)}], ids=str)
def test_compile_and_export(need_weights: bool, options: Any) -> None:
    module = fastlm.nn.MultiheadAttention(8, 4, batch_first=True, **options)
    padding = torch.arange(6) >= torch.tensor([6, 3])[:, None]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    given = {"key_padding_mask": padding, "need_weights": need_weights}
    x = torch.randn(2, 6, 8)
    got, want = compiled(x, x, x, **given), module(x, x, x, **given)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got[0].sin().sum(), list(module.parameters())),
        torch.autograd.grad(want[0].sin().sum(), list(module.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(module, (x, x, x), given)
    torch.testing.assert_close(exported.module()(x, x, x, **given), want)
