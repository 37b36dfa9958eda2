"""Where PyTorch's own GRU runs, alone or over its own embedding: which calls, and short ways."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import dispatch, extension, library
from .arguments import Cell


def least_steps(batch: int, hidden: int, differentiable: bool) -> int:
    """Of a float32 call on a CPU that the compiled kernel takes: PyTorch's own GRU has nothing to
    set up, and no gain over many steps. LOG: "gru: short sequences"."""
    units = batch * hidden
    if differentiable:
        return 1 if units >= 1 << 14 else 2 if units * hidden >= 1 << 17 else 3
    return 1 if units >= 1 << 13 else 2 if units >= 1 << 10 else 4 if batch > 1 else 5


#: no size has more `least_steps`
MOST_LEAST_STEPS = 5


def _differentiable(input: Tensor, w_hh: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or w_hh.requires_grad)


def _large_in_bfloat16(batch: int, hidden: int, steps: int, differentiable: bool) -> bool:
    """Whether PyTorch's own GRU, whose gates are of 16 bits, is the faster one in bfloat16, on a
    processor that multiplies pairs. LOG: "gru: large batches in bfloat16"."""
    units = batch * hidden
    large = units >= 1 << 16
    if differentiable:
        large = units >= 1 << 15 or units * steps >= 1 << 22
    return batch >= 64 and hidden >= 128 and large and extension.cpu_isa() == "avx512_bf16"


def _may_run() -> bool:
    """A compiled graph must not depend on sizes; PyTorch's GRU has no rule for vmap, whether it is
    of torch.func or of tangents."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (transformed or torch.compiler.is_compiling())


def torch_is_faster(
    input: Tensor, cell: Cell, batch: int, steps: int, precision: str
) -> str | None:
    """Why PyTorch's own GRU takes a dense call, or None."""
    if not _may_run():
        return None
    if torch.jit.is_tracing():
        return "a trace holds none of our Functions"
    w_hh, device = cell[1], input.device.type
    differentiable = _differentiable(input, w_hh)
    if device == "cpu" and w_hh.dtype == torch.float32 and steps < MOST_LEAST_STEPS:
        least = least_steps(batch, w_hh.shape[1], differentiable)
        if steps < least:
            return f"fewer than {least} steps"
    if device == "cpu" and w_hh.dtype == torch.float32 and not extension.unavailable:
        return None
    if device == "cpu" and w_hh.dtype == torch.bfloat16 and precision == "auto":
        if _large_in_bfloat16(batch, w_hh.shape[1], steps, differentiable):
            return "a large batch in bfloat16"
    if _no_kernel(cell[0], w_hh):
        # in 16 bits the loop of the CPU is slower, and carries its state in 16 bits
        slow = device == "cpu" and w_hh.dtype not in (torch.float32, torch.float64)
        return None if slow else "no kernel takes this call"
    return None


def _no_kernel(w_ih: Tensor, w_hh: Tensor) -> bool:
    """Whether a dense call with "auto" would run the reference."""
    named = {"input": w_ih, "w_ih": w_ih, "w_hh": w_hh, "precision": "auto"}
    return dispatch.preferred("gru", "forward", named) == "reference"


#: of a PackedSequence on a CPU; fewer have nothing to gain from a plan and packed weights
LEAST_PACKED_STEPS = 3


def torch_packs_faster(data: Tensor, cell: Cell, steps: int) -> str | None:
    """As `torch_is_faster`, for a PackedSequence. LOG: "gru: a PackedSequence", "small calls"."""
    if not _may_run():
        return None
    if torch.jit.is_tracing():
        return "a trace holds none of our Functions"
    if data.device.type != "cpu":
        return "no kernel there takes sequences of different lengths"
    if cell[1].dtype == torch.float64:
        return "dtype float64"
    if steps < LEAST_PACKED_STEPS and cell[1].dtype == torch.float32:
        return f"fewer than {LEAST_PACKED_STEPS} steps"
    products = data.shape[0] * cell[1].numel()
    if cell[1].dtype == torch.float32 and products < 2e6 and not torch.is_grad_enabled():
        return "fewer than 2 million products, and no gradient"
    return None


def outside_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if not library.autocast_on(device):  # entering it costs 5 us
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class Form(NamedTuple):
    """Of a stack of layers."""

    num_layers: int
    bias: bool
    bidirectional: bool
    batch_first: bool

    def fits(
        self, weights: Sequence[Tensor], hx: Tensor | None, batch: tuple[int, ...], input: Tensor,
        module: bool = False,
    ) -> bool:  # fmt: skip
        """Whether these are its weights and states for an `input` [..., C]; those of a module fit
        each other."""
        ways, dtype, device = 2 if self.bidirectional else 1, input.dtype, input.device
        if not module and not self._fit(weights, ways):
            return False
        w_ih, w_hh = weights[:2]
        if w_ih.shape[-1] != input.shape[-1] or w_ih.dtype is not dtype or w_ih.device != device:
            return False
        if hx is None:
            return True
        shape = (self.num_layers * ways, *batch, w_hh.shape[-1])
        return hx.shape == shape and hx.dtype is dtype and hx.device == device

    def _fit(self, weights: Sequence[Tensor], ways: int) -> bool:
        size = 4 if self.bias else 2
        if len(weights) != self.num_layers * ways * size:
            return False
        if not all(isinstance(weight, Tensor) for weight in weights) or weights[1].numel() == 0:
            return False
        w_ih, w_hh = weights[:2]
        hidden, dtype, device = w_hh.shape[-1], w_ih.dtype, w_ih.device
        width = 3 * hidden
        shapes = [(width, w_ih.shape[-1]), (width, hidden), (width,), (width,)]
        for number, weight in enumerate(weights):
            if number == ways * size:
                shapes[0] = (width, ways * hidden)
            if weight.shape != shapes[number % size] or weight.dtype is not dtype:
                return False
            if weight.device != device:
                return False
        return True


def of_few_steps(
    input: Any, hx: Tensor | None, weights: Sequence[Tensor], form: Form, dropout: float = 0.0,
    training: bool = False, *, module: bool = False, fits: bool = False,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """What `gru` gives to a float32 call without options, where PyTorch's kernel takes it because
    it has few steps: `gru` comes to the same, and what it checks takes longer than such a call.
    None for any other call, and where something is wrong, which with `fits` has been looked at."""
    if not _may_run() or not isinstance(input, Tensor) or input.dim() != 3:
        return None
    first, second = input.shape[:2]
    batch, steps = (first, second) if form.batch_first else (second, first)
    if not 0 < steps < MOST_LEAST_STEPS or batch == 0 or input.dtype is not torch.float32:
        return None
    if not dispatch.undisturbed() or library.autocast_on("cpu"):
        return None
    if input.device.type != "cpu" or not (fits or form.fits(weights, hx, (batch,), input, module)):
        return None
    w_hh = weights[1]
    hidden = w_hh.shape[1]
    if steps >= least_steps(batch, hidden, _differentiable(input, w_hh)):
        return None
    if hx is None:
        hx = input.new_zeros(form.num_layers * (2 if form.bidirectional else 1), batch, hidden)
    return torch.gru(
        input, hx, list(weights), form.bias, form.num_layers, dropout, training, form.bidirectional,
        form.batch_first,
    )  # fmt: skip


#: multiply-adds of an input projection that takes no longer than finding its distinct tokens
_FEW_PRODUCTS = 1 << 23


def _embeds_first(tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor, form: Form) -> bool:
    forced = dispatch.forced()
    if forced is not None:
        return forced == "torch"
    if torch.jit.is_tracing():
        return True
    if weight.device.type == "cpu" and weight.dtype is not torch.float64:
        if weight.dtype is not torch.float32:
            return False  # PyTorch sums the gradient of a row in 16 bits
        if extension.unavailable is None:
            if tokens.numel() * w_ih.numel() < _FEW_PRODUCTS:
                return True
            steps = tokens.shape[1 if form.batch_first and tokens.dim() == 2 else 0]
            batch = tokens.numel() // steps
            return steps < least_steps(batch, w_hh.shape[1], _differentiable(weight, w_hh))
    return _no_kernel(w_ih, w_hh)


def embedded(
    tokens: Tensor, weight: Tensor, h0: Tensor | None, weights: Sequence[Tensor], form: Form,
    padding_idx: int | None, *, module: bool = False,
) -> Tensor | None:  # fmt: skip
    """The embedded sequence, where a call without options is faster in two, embedding and `gru`:
    what is distinct in few tokens takes longer to find than it saves, and PyTorch's GRU takes its
    input embedded. None for any other call, and where something is wrong. LOG: "embedding_gru: few
    tokens". h0: [layers and directions, B, H]."""
    if not _may_run() or not isinstance(tokens, Tensor) or weight.dim() != 2:
        return None
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.numel() == 0:
        return None
    if tokens.dim() not in (1, 2) or tokens.device != weight.device:
        return None
    batch = () if tokens.dim() == 1 else tokens.shape[:1] if form.batch_first else tokens.shape[1:]
    if not form.fits(weights, h0, tuple(batch), weight, module):
        return None
    if not _embeds_first(tokens, weight, weights[0], weights[1], form):
        return None
    size = weight.shape[0]
    if padding_idx is not None and not -size <= padding_idx < size:
        return None
    try:
        return torch.embedding(weight, tokens, -1 if padding_idx is None else padding_idx % size)
    except IndexError:  # whoever is asked next says where
        return None
