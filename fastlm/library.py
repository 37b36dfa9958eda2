"""One way to define a torch op of fastlm: schema, fake, and a kernel that asks dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from . import dispatch

_LIBRARY = Library("fastlm", "DEF")


def autocast_on(device: str) -> bool:
    """Of a device type; some, as meta, have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """torch.compile takes no tensor twice in one autograd.Function: a view where it comes again."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again and tensor is not None else tensor)
    return tuple(found)


def define(
    op: str,
    which: str,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Define `torch.ops.fastlm.<op>` ("forward") or `<op>_backward` and return its overload.

    `schema` is the part from the first parenthesis on. `fake` gives the outputs' metadata under
    torch.compile. `check` reads values (index ranges) before any backend runs, compiled or not.
    The op is functional: no output may alias an input or another output.
    """
    name = op if which == "forward" else f"{op}_{which}"
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.fastlm, name).default
    arguments = overload._schema.arguments
    names = tuple(argument.name for argument in arguments)

    def kernel(*args: Any) -> Any:
        # the dispatcher leaves out trailing arguments that have their default value
        if len(args) < len(names):
            args += tuple(argument.default_value for argument in arguments[len(args) :])
        named = dict(zip(names, args, strict=True))
        if check is not None:
            check(named)
        implementation = dispatch.select(op, which, named)
        if torch.is_autocast_enabled(device := dispatch.device_type(named)):
            # an op chooses its own precision; the products inside must not be cast again
            with torch.autocast(device, enabled=False):
                return implementation(*args)
        return implementation(*args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    # the gradient belongs to the autograd.Function around the op, not to the op
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    register_fake(f"fastlm::{name}", fake, lib=_LIBRARY)
    return overload


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.clone() for grad in tensors[sources:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "fastlm: this op is once_differentiable; for a second derivative use plain PyTorch"
        )


class _Unpacked:
    """The context of a backward with its saved tensors, which a checkpoint hands out once."""

    def __init__(self, ctx: Any, saved: tuple[Tensor | None, ...]) -> None:
        self.__dict__.update(ctx=ctx, saved_tensors=saved)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function: a second derivative raises, it is never missing.

    torch's own decorator raises only when the upstream gradient requires grad; after
    `out.sum()` it does not, and the second derivative would be silently zero. The gradients here
    are functions of what was saved too: autograd runs no node that does not lead to the tensors
    it is asked about.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> Any:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *upstream)
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = backward(_Unpacked(ctx, saved), *upstream)
        if not torch.is_grad_enabled():
            return grads
        grads = grads if isinstance(grads, tuple) else (grads,)
        sources = [t for t in (*saved, *upstream) if t is not None and t.requires_grad]
        sources = sources or [torch.zeros((), requires_grad=True)]
        given = (g for g in grads if g is not None)
        marked = iter(_NoSecondDerivative.apply(len(sources), *sources, *given))
        return tuple(None if g is None else next(marked) for g in grads)

    return wrapper
