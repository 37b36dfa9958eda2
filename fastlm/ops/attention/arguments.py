"""Checks of the arguments of `attention`, and their form in the torch op."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, library
from ...philox import signed
from .mask import AttnMask, Limits, coordinates, side

LAYOUTS = {"bshd": "[B, S, H, D]", "bhsd": "[B, H, S, D]", "thd": "[T, H, D]"}


def last_contiguous(x: Tensor) -> Tensor:
    """Kernels read the elements of a head one after another; all other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def floats(x: Tensor | None) -> Tensor | None:
    """An option of one number a head, as kernels read it."""
    return None if x is None else x.float().contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not library.autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[Tensor, ...]:
    """q, k and v, in an autocast region in its dtype, as PyTorch's own attention has it."""
    checks.one_of("attention", "layout", layout, tuple(LAYOUTS))
    dims = 3 if layout == "thd" else 4
    for what, value in (("q", q), ("k", k), ("v", v)):
        checks.floating("attention", what, value)
        checks.same_device("attention", what, value, "q", q)
        checks.shape("attention", what, value, (None,) * dims, LAYOUTS[layout])
    q, k, v = _autocast(q, k, v)
    checks.same_dtype("attention", "k", k, "q", q)
    checks.same_dtype("attention", "v", v, "q", q)
    return q, k, v


def check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """q, k and v as [B, S, H, D]; `layout` is for the message."""
    batch, _, heads, size = q.shape
    for what, value in (("q", q), ("k", k), ("v", v)):
        if value.shape[2] == 0 or value.shape[3] == 0:
            checks.bad_value(
                "attention", what, f"{LAYOUTS[layout]} with H, D >= 1", list(value.shape)
            )
    for what, want, have in (
        ("k.shape[0]", batch, k.shape[0]),
        ("v.shape[0]", batch, v.shape[0]),
        ("k.shape[-1]", size, k.shape[3]),
    ):
        if want != have:
            checks.bad_value("attention", what, f"{want} (as q)", have)
    if k.shape[1:3] != v.shape[1:3]:
        expected = f"{list(k.shape[1:3])} (as k)"
        checks.bad_value("attention", "length and heads of v", expected, list(v.shape[1:3]))
    if heads % k.shape[2]:
        checks.bad_value("attention", "heads of q", f"a multiple of {k.shape[2]} (as k)", heads)


def check_starts(layout: str, starts: dict[str, Tensor | None], q: Tensor) -> None:
    for what, value in starts.items():
        if layout != "thd":
            if value is not None:
                checks.bad_value("attention", what, f"None in layout {layout!r}", "a tensor")
            continue
        checks.tensor("attention", what, value)
        assert value is not None
        if value.dtype != torch.int32:
            got, remedy = checks.short(value.dtype), "call .int() once per batch"
            checks.bad_type("attention", what, "int32", got, remedy)
        checks.same_device("attention", what, value, "q", q)
        if value.dim() != 1 or value.shape[0] < 2:
            checks.bad_value("attention", what, "[sequences + 1]", list(value.shape))
    # compared, never hashed: that would make a constant of a dynamic size
    lengths = [list(value.shape) for value in starts.values() if value is not None]
    if any(n != lengths[0] for n in lengths):
        got = " and ".join(map(str, sorted(lengths)))
        checks.bad_value("attention", "cu_seqlens_q and cu_seqlens_k", "equally long", got)


def check_per_head(what: str, value: Tensor | None, q: Tensor, batched: bool) -> None:
    if value is None:
        return
    checks.floating("attention", what, value)
    checks.same_device("attention", what, value, "q", q)
    batch, _, heads, _ = q.shape
    shapes = [(heads,), (batch, heads)] if batched else [(heads,)]
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        checks.bad_value("attention", what, expected, list(value.shape))


def four_dims(bias: Tensor, q: Tensor, keys: int) -> Tensor:
    checks.floating("attention", "bias", bias)
    checks.same_device("attention", "bias", bias, "q", q)
    full = (q.shape[0], q.shape[2], q.shape[1], keys)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=False)):
        got = list(bias.shape)
        checks.bad_value("attention", "bias", f"{list(full)} or broadcast to it", got)
    return bias.view(shape) if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def resolve_mask(
    mask: str | AttnMask | None,
    window: tuple[int | None, int | None] | None,
    q: Tensor,
    k: Tensor,
    starts: tuple[Tensor | None, Tensor | None],
) -> Limits:
    found = Limits()
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            checks.bad_value("attention", "window", "(left, right)", window)
        left, right = window
        found = found.band(side("window[0]", left), side("window[1]", right))
    if isinstance(mask, str) and mask == "causal":
        return found.band(-1, 0)
    if mask is None:
        return found
    if not isinstance(mask, AttnMask):
        remedy = "a tensor goes through AttnMask.from_dense or bias"
        got = repr(mask) if isinstance(mask, str) else type(mask).__name__
        checks.bad_value("attention", "mask", "None, 'causal' or an AttnMask", got, remedy)
    found = mask.limits(coordinates(q.shape[1], k.shape[1], *starts, q.device), found)
    if found.lo is not None and found.hi is not None:
        want = (q.shape[0], q.shape[2], q.shape[1])
        spread = torch.broadcast_shapes(found.lo.shape, found.hi.shape)
        if any(n not in (1, m) for n, m in zip(spread[:2], want[:2], strict=True)):
            checks.bad_value("attention", "mask", f"for [B, H, Sq] = {list(want)}", list(spread))
        checks.same_device("attention", "mask", found.lo, "q", q)
    return found


def seed_tensor(seed: int | Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:
    if not 0 <= dropout_p <= 1:
        checks.bad_value("attention", "dropout_p", "in [0, 1]", dropout_p)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), device=q.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            got = f"{checks.short(seed.dtype)} {list(seed.shape)}"
            checks.bad_value("attention", "seed", "an int or an int64 tensor []", got)
        checks.same_device("attention", "seed", seed, "q", q)
        return seed
    return torch.full((), signed(seed), dtype=torch.int64, device=q.device)
