"""Every public op in PyTorch's modes: checkpointing, other default devices and dtypes, meta."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_gpu import OPS, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlm

Call = Callable[..., Any]
DECODE = "decode_attention"
# the call of the other one makes a tensor of its own
NAMES = [name for name in OPS if name != "ragged_gru"]


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    table = torch.zeros_like(length)[:, None]
    return fastlm.decode_attention(q.detach(), k.detach(), v.detach(), length, block_table=table)


def op_of(name: str) -> tuple[Call, list[Any]]:
    torch.manual_seed(0)
    if name == DECODE:
        q, k, v = torch.randn(1, 1, 4, 8), *torch.randn(2, 1, 6, 2, 8)
        return decode, [q, k, v, torch.tensor([5], dtype=torch.int32)]
    return OPS[name].ours, arguments(OPS[name], torch.float32, "cpu")


def leaves(args: list[Any], device: str | None = None) -> list[Any]:
    """Tensors of their own, all floats with a gradient."""
    moved = [a.detach().to(device) if isinstance(a, Tensor) else a for a in args]
    return [
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in moved
    ]


def both_passes(call: Call, args: list[Any]) -> list[Tensor | None]:
    """Outputs, then gradients."""
    outputs = call(*args)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ends = [o for o in outputs if o.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.ones_like(o) for o in ends])
    floats = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return [*(o.detach() for o in outputs), *(a.grad for a in floats)]


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_checkpointing_of_either_kind(name: str) -> None:
    """The kind without re-entrance lets a backward read its saved tensors once."""
    call, args = op_of(name)
    want = both_passes(call, leaves(args))
    for reentrant in (False, True):
        again = functools.partial(checkpoint, call, use_reentrant=reentrant)
        assert_same(both_passes(again, leaves(args)), want)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """New tensors in float64 and, where nobody says a device, without data."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [*NAMES, DECODE])
def test_defaults_of_new_tensors_do_not_matter(name: str, elsewhere: None) -> None:
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        call, args = op_of(name)
        want = both_passes(call, leaves(args))
        args = leaves(args)
        torch.set_default_dtype(torch.float64)
    assert_same(both_passes(call, args), want)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_have_the_right_shapes(name: str) -> None:
    call, args = op_of(name)
    want = both_passes(call, leaves(args))
    got = both_passes(call, leaves(args, "meta"))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


@pytest.mark.parametrize("name", [*NAMES, "ragged_gru"])
def test_fake_tensors_have_the_right_shapes(name: str) -> None:
    """Outside torch.compile too, as tools that estimate memory use them."""
    call, args = op_of(name)
    want = both_passes(call, leaves(args))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in leaves(args)]
    with mode:
        got = both_passes(call, fakes)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_tensor_given_twice_compiles() -> None:
    """As the starts of packed sequences are, for queries and keys."""

    def call(x: Tensor, starts: Tensor) -> Tensor:
        packed = {"layout": "thd", "cu_seqlens_q": starts, "cu_seqlens_k": starts}
        return fastlm.attention(x, x, x, **packed)

    args = [torch.randn(9, 2, 16), torch.tensor([0, 4, 9], dtype=torch.int32)]
    want = both_passes(call, leaves(args))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(both_passes(compiled, leaves(args)), want)
