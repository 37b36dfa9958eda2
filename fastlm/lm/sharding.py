"""FSDP2: every rank holds a part of each parameter, and reads and writes whole ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: Any, device: torch.device, world: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Put parts in the place of parameters; returns the loss of the model.

    `state_dict` has parts from now on; `load_state_dict` takes whole tensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device.type, (world,))
    # layers by themselves, so that one at a time is whole; the rest is used outside of any
    # forward, and shared between embedding and head where they are tied
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    model.register_load_state_dict_pre_hook(load_parts)
    return lambda *args, **options: model.loss(*args, **options)


@contextlib.contextmanager
def apart(model: Any) -> Iterator[None]:
    """Gradients of backwards inside stay whole on this rank; the next one shares out the sum."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _in_parts(tensor: Any) -> bool:
    # DTensor is not imported for this: it takes a second
    return hasattr(tensor, "full_tensor")


def _part(value: Any, like: Any) -> Any:
    """A whole tensor cut as the parameter `like` is; anything else as it is."""
    if not _in_parts(like) or _in_parts(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    # every rank has read the same file: nothing is sent
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_parts(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # parameters stay whole after an evaluation
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in state:
        state[name] = _part(state[name], parameters.get(name))


def load_optimizer_parts(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        index: {name: _part(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": parts}


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, such as the norm of gradients that are in parts."""
    together: Any = tensor
    return together.full_tensor() if _in_parts(tensor) else tensor
