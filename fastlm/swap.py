"""Drop-in replacement inside an existing model, and its undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import nn as ours


def _gru(old: nn.GRU) -> nn.Module:
    return ours.GRU(old.input_size, old.hidden_size, old.num_layers, device="meta")


def _attention(old: nn.MultiheadAttention) -> nn.Module:
    return ours.MultiheadAttention(old.embed_dim, old.num_heads, device="meta")


def _cross_entropy(old: nn.CrossEntropyLoss) -> nn.Module:
    return ours.CrossEntropyLoss()


_REPLACED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.GRU: _gru,
    nn.MultiheadAttention: _attention,
    nn.CrossEntropyLoss: _cross_entropy,
}


# bound to the old module
_OWN = ("_compiled_call_impl",)


def _catch_up(old: nn.Module, new: nn.Module) -> None:
    # a conversion makes new lists of weights, and only in the module that it converts
    now = new.__dict__
    old.__dict__.update({k: now[k] for k in old.__dict__ if k in now and k not in _OWN})


class Swapped:
    """What `swap` did: `model`, the names of the modules replaced, `undo()`; a context manager."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: list[str] = []
        self._before: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._root = model

    def undo(self) -> nn.Module:
        """The modules as they were before; with the parameters and attributes that they have now,
        whatever was loaded, converted or set in between."""
        for parent, name, old, new in reversed(self._before):
            _catch_up(old, new)
            parent._modules[name] = old
        self._before.clear()
        if self.model is not self._root:
            _catch_up(self._root, self.model)
        self.model = self._root
        return self.model

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()


def swap(model: nn.Module, *, kinds: tuple[type[nn.Module], ...] | None = None) -> Swapped:
    """Replace modules of torch.nn inside a model by those of fastlm with the same parameters.

    Same as, for every nn.GRU, nn.MultiheadAttention and nn.CrossEntropyLoss in the model:
        parent.name = fastlm.nn.GRU(...); parent.name.load_state_dict(old.state_dict())

    The Parameters are the same objects, so an optimizer goes on with them; hooks, buffers, names
    and training mode stay. A subclass of one of these stays what it is, and so does a module whose
    `forward` was replaced by hand; one that was compiled by itself is compiled no more.

    Args:
        model: changed in place; where it is itself such a module, `.model` is its replacement.
        kinds: which of the three classes to replace; all by default.

    Returns:
        Swapped, with `model`, `names` and `undo()`; as a context manager it undoes itself.

    Raises:
        ValueError: a kind is not one of the three.
    """
    kinds = tuple(_REPLACED) if kinds is None else kinds
    for kind in kinds:
        if kind not in _REPLACED:
            known = ", ".join(k.__name__ for k in _REPLACED)
            raise ValueError(f"fastlm.swap: kinds must be among {known}, got {kind!r}")
    found = Swapped(model)
    made: dict[nn.Module, nn.Module] = {}

    def replacement(old: nn.Module) -> nn.Module | None:
        if type(old) not in kinds or "forward" in old.__dict__:
            return None
        if old not in made:
            with torch.no_grad():
                new = _REPLACED[type(old)](old)
            # the same dictionaries of parameters, buffers and hooks, beside what only ours has
            new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in _OWN})
            made[old] = new
        return made[old]

    for path, parent in list(model.named_modules()):
        for name, old in list(parent._modules.items()):
            new = None if old is None else replacement(old)
            if old is not None and new is not None:
                parent._modules[name] = new
                found._before.append((parent, name, old, new))
                found.names.append(f"{path}.{name}" if path else name)
    top = replacement(model)
    if top is not None:
        found.model = top
        found.names.append("")
    return found
