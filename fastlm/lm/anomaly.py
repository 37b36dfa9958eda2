"""What was not finite, and where it came from: for a training step that had to be skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .store import Lanes, LoadedLanes
from .tokenizer import Tokenizer


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _wrong(value: Any) -> str:
    """ "NaN", "Inf" or nothing."""
    for tensor in _tensors(value):
        if not bool(tensor.isfinite().all()):
            return "NaN" if bool(tensor.isnan().any()) else "Inf"
    return ""


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [name for name, p in model.named_parameters() if p.grad is not None and _wrong(p.grad)]


@torch.no_grad()
def first_bad(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Where the forward first goes wrong, innermost module first; "" where it does not.

    `forward` runs again, with the random numbers left as they were found.
    """
    for name, parameter in model.named_parameters():
        if wrong := _wrong(parameter):
            return f"parameter {name} holds {wrong}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and (wrong := _wrong(output)):
                came = " from its input" if _wrong(inputs) else ""
                found.append(f"{wrong} in the output of {name}{came} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.random.fork_rng():
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    wrong = _wrong(result)
    return f"{wrong} in the loss; the output of every module is finite" if wrong else ""


def where(model: nn.Module, forward: Callable[[], Any]) -> str:
    """`first_bad`; where the forward is right, the gradients that are not, from the loss back."""
    names = bad_gradients(model)[::-1]
    if found := first_bad(model, forward):
        return found
    return f"the gradient of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def rows(batches: Any, store: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Document, token and byte of cleaned text at which each row of the last batch begins; nothing
    for batches that are not made of running text."""
    if not isinstance(batches, Lanes | LoadedLanes):
        return []
    lengths, found = tokenizer.byte_lengths(), []
    for index in batches.places():
        entry = store.document_at(index)
        size = int(lengths[store.ids[entry.start : index]].sum())
        found.append({"document": entry.name, "token": index - entry.start, "byte": size})
    return found
