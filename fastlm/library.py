"""One way to define a torch op of fastlm: schema, fake, and a kernel that asks dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

from . import dispatch

_LIBRARY = Library("fastlm", "DEF")


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
        args += tuple(argument.default_value for argument in arguments[len(args) :])
        named = dict(zip(names, args, strict=True))
        if check is not None:
            check(named)
        return dispatch.select(op, which, named)(*args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    register_fake(f"fastlm::{name}", fake, lib=_LIBRARY)
    return overload
