"""PyTorch's own samples of GRU and GRUCell, with the checks it makes of every module, on ours.

Samples, error samples and reference functions are those of torch.testing._internal.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch_samples import gradcheck, gradgradcheck, strided_variants, torch_modules

import fastlm

INFOS = {
    "GRU": torch_modules.ModuleInfo(
        fastlm.nn.GRU,
        train_and_eval_differ=True,
        module_inputs_func=partial(torch_modules.module_inputs_torch_nn_RNN_GRU, is_rnn=False),
        module_error_inputs_func=torch_modules.module_error_inputs_torch_nn_RNN_GRU,
    ),
    "GRUCell": torch_modules.ModuleInfo(
        fastlm.nn.GRUCell,
        module_inputs_func=torch_modules.module_inputs_torch_nn_RNN_GRU_Cell,
        module_error_inputs_func=torch_modules.module_error_inputs_torch_nn_RNN_GRU_Cell,
    ),
}
DTYPES = (torch.float32, torch.float64)
every_module = pytest.mark.parametrize("name", INFOS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
both_modes = pytest.mark.parametrize("training", (True, False))


def samples(name: str, dtype: torch.dtype, training: bool, grad: bool, **more: Any) -> list[Any]:
    info = INFOS[name]
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=grad, training=training, **more
    )


def built(name: str, sample: Any, dtype: torch.dtype, training: bool, cls: Any = None) -> nn.Module:
    given = sample.constructor_input
    module = (cls or INFOS[name].module_cls)(*given.args, **given.kwargs)
    return module.to("cpu").to(dtype).train(training)


def called(module: nn.Module, sample: Any) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


@every_module
@every_dtype
@both_modes
def test_forward(name: str, dtype: torch.dtype, training: bool) -> None:
    """The reference of each sample, torch's own module, and `float` or `double` after it."""
    theirs = {"GRU": nn.GRU, "GRUCell": nn.GRUCell}[name]
    count = 0
    for sample in samples(name, dtype, training, False):
        module = built(name, sample, dtype, training)
        got = called(module, sample)
        want = sample.reference_fn(module, *sample.forward_input.args)
        torch.testing.assert_close(got, want)
        other = built(name, sample, dtype, training, theirs)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(got, called(other, sample))
        module.float() if dtype == torch.float32 else module.double()
        torch.testing.assert_close(called(module, sample), got)
        assert all(p.dtype == dtype for p in module.parameters())
        count += 1
    assert count == {"GRU": 16, "GRUCell": 2}[name]


@every_dtype
@both_modes
def test_packed_samples(dtype: torch.dtype, training: bool) -> None:
    packed = 0
    for sample in samples("GRU", dtype, training, False, with_packed_sequence=True):
        if not isinstance(sample.forward_input.args[0], PackedSequence):
            continue
        module = built("GRU", sample, dtype, training)
        other = built("GRU", sample, dtype, training, nn.GRU)
        other.load_state_dict(module.state_dict())
        got, want = called(module, sample), called(other, sample)
        torch.testing.assert_close(got[0].data, want[0].data)
        torch.testing.assert_close(got[1], want[1])
        packed += 1
    assert packed == 16


@every_module
@every_dtype
def test_factory_kwargs(name: str, dtype: torch.dtype) -> None:
    for sample in samples(name, dtype, True, False):
        given = sample.constructor_input
        for device in ("cpu", "meta"):
            module = INFOS[name].module_cls(*given.args, **given.kwargs, device=device, dtype=dtype)
            for parameter in module.parameters():
                assert parameter.dtype == dtype and parameter.device.type == device


@every_module
def test_repr(name: str) -> None:
    theirs = {"GRU": nn.GRU, "GRUCell": nn.GRUCell}[name]
    for sample in samples(name, torch.float32, True, False):
        module = built(name, sample, torch.float32, True)
        other = built(name, sample, torch.float32, True, theirs)
        assert repr(module) == repr(other) == str(module)


@every_module
@both_modes
def test_pickle_and_save(name: str, training: bool) -> None:
    for sample in samples(name, torch.float32, training, False):
        module = built(name, sample, torch.float32, training)
        want = called(module, sample)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        torch.testing.assert_close(called(again, sample), want, rtol=0, atol=0)
        torch.testing.assert_close(called(copy.deepcopy(module), sample), want, rtol=0, atol=0)
        assert module.state_dict().keys() == again.state_dict().keys()


@every_module
@both_modes
def test_non_contiguous(name: str, training: bool) -> None:
    """Inputs, hidden states and upstream gradients in any layout: same outputs and gradients."""
    for sample in samples(name, torch.float64, training, True):
        module = built(name, sample, torch.float64, training)
        args = sample.forward_input.args

        def run(args: Any, module: nn.Module, turn: bool = False) -> list[torch.Tensor]:
            outputs = list(tensors(module(*args)))
            upstream = [torch.arange(o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
            if turn:
                upstream = [next(strided_variants(u)).detach() for u in upstream]
            leaves = [*args, *module.parameters()]
            return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

        want = run(args, module)
        for position, value in enumerate(args):
            for other in strided_variants(value):
                assert not other.is_contiguous() or 1 in other.shape
                changed = [*args[:position], other, *args[position + 1 :]]
                for turn in (False, True):
                    for a, b in zip(run(changed, module, turn), want, strict=True):
                        torch.testing.assert_close(a, b)


@every_module
@both_modes
@pytest.mark.parametrize("check", (gradcheck, gradgradcheck))
def test_gradients(name: str, training: bool, check: Any) -> None:
    """Inputs and parameters together, batched gradients included (the default of torch's check)."""
    for sample in samples(name, torch.float64, training, True):
        module = built(name, sample, torch.float64, training)
        names = [n for n, _ in module.named_parameters()]
        inputs = sample.forward_input.args

        def function(*values: torch.Tensor, module: nn.Module = module, names: Any = names,
                     count: int = len(inputs)) -> Any:  # fmt: skip
            parameters = dict(zip(names, values[count:], strict=True))
            return torch.func.functional_call(module, parameters, values[:count])

        assert check(function, (*inputs, *module.parameters()))


@every_module
@every_dtype
def test_errors(name: str, dtype: torch.dtype) -> None:
    """torch's wrong calls give torch's exception, with torch's words."""
    info, count = INFOS[name], 0
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    ):
        given, inputs = error.module_error_input.constructor_input, error.module_error_input
        kind = torch_modules.ModuleErrorEnum
        if error.error_on == kind.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.module_cls(*given.args, **given.kwargs)
        else:
            if name == "GRUCell" and isinstance(given.args[-1], str):
                given.args = given.args[:2]  # "relu" and "tanh" are for RNNCell
            module = info.module_cls(*given.args, **given.kwargs)
            if name == "GRUCell":
                module = module.to(dtype)
                if dtype == torch.float64 and not inputs.forward_input:
                    continue
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*inputs.forward_input.args, **inputs.forward_input.kwargs)
        count += 1
    assert count >= 6


@every_module
def test_train_and_eval(name: str) -> None:
    """They differ for dropout between layers, and only then."""
    x = torch.randn(5, 3, 8) if name == "GRU" else torch.randn(3, 8)
    cls = INFOS[name].module_cls
    plain = cls(8, 6)
    torch.testing.assert_close(plain.train()(x), plain.eval()(x), rtol=0, atol=0)
    if name == "GRU":
        dropped = cls(8, 6, num_layers=2, dropout=0.5)
        assert not torch.equal(dropped.train()(x)[0], dropped.eval()(x)[0])


@every_module
def test_to_empty_and_memory_format(name: str) -> None:
    module = INFOS[name].module_cls(8, 6, device="meta")
    module.to_empty(device="cpu")
    module.reset_parameters()
    x = torch.randn(5, 3, 8) if name == "GRU" else torch.randn(3, 8)
    want = module(x)
    module.to(memory_format=torch.preserve_format)
    torch.testing.assert_close(module(x), want, rtol=0, atol=0)
    assert module.to(torch.float64)(x.double())[0].dtype == torch.float64
