"""`gru`: layers, directions, dropout and zoneout over the layer ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ... import checks, dispatch, philox
from . import by_torch, differentiable, sequences
from .arguments import Cell, cells_of, check_options, check_state, check_weights, is_single
from .autograd import DENSE, RAGGED, apply
from .sequences import Layout, Where

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .signatures import Options as Signature


class Options(NamedTuple):
    batch_first: bool
    dropout: float
    training: bool
    save: str
    precision: str
    zoneout: float


def _kept(
    options: Options, shape: tuple[int, ...], seed: Tensor | None, number: int
) -> Tensor | float:
    """Zoneout: which old states stay, [..., H]; in evaluation the fraction that does."""
    if seed is None:
        return options.zoneout
    size = 1
    for length in shape:
        size = size * length
    unit = torch.arange(size, device=seed.device)
    draw = philox.uniform(seed.expand_as(unit), unit, torch.full_like(unit, number))
    return (draw < options.zoneout).view(shape)


def _zoned_out(
    input: Tensor, cell: Cell, h0: Tensor | None, begin: Tensor | None, where: Where | None,
    reverse: bool, options: Options, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    keep = _kept(options, (*input.shape[:-1], cell[1].shape[1]), seed, number)
    if where is not None:
        return differentiable.ragged_gru(
            input,
            *cell,
            h0,
            begin,
            None,
            *where.to(input.device),
            reverse,
            options.precision,
            keep,
        )
    steps = keep.unbind(1 if options.batch_first else 0) if isinstance(keep, Tensor) else keep
    return differentiable.gru(
        input, *cell, h0, begin, options.batch_first, reverse, options.precision, steps
    )


def _layer(
    input: Tensor, cell: Cell, h0: Tensor | None, begin: Tensor | None, where: Where | None,
    reverse: bool, options: Options, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer in one direction; input [N, C] with `where`, else [B, T, C] or [T, B, C]."""
    if where is not None and begin is not None:
        begin = begin.reshape(-1)
    if options.zoneout:
        return _zoned_out(input, cell, h0, begin, where, reverse, options, seed, number)
    if where is not None:
        where = where.to(input.device)
        tensors = (input, *cell, h0, begin, None, where.first, where.lengths, where.offsets)
        return apply(RAGGED, tensors, (where.stride, reverse), options.save, options.precision)
    how = (options.batch_first, reverse)
    return apply(DENSE, (input, *cell, h0, begin), how, options.save, options.precision)


def _padded_layer(
    input: Tensor, cell: Cell, h0: Tensor | None, begin: Tensor | None,
    rows: sequences.Padded, reverse: bool, options: Options, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Whole rows, masked; the reverse direction is the forward one on turned sequences."""
    if reverse:
        input = rows.turned(input)
        begin = rows.turned_starts(begin)
    output, _ = _layer(input, cell, h0, begin, None, False, options, seed, number)
    h_n = rows.last(output, h0)
    output = rows.masked(output)
    return (rows.turned(output) if reverse else output), h_n


def dropped(input: Tensor, p: float, time_first: bool) -> Tensor:
    """Dropout between layers, with the random numbers that torch.nn.GRU draws."""
    if time_first or input.dim() == 2:
        return torch.nn.functional.dropout(input, p)
    # torch draws them in the order of [T, B, H]
    shape = (input.shape[1], input.shape[0], input.shape[2])
    noise = torch.nn.functional.dropout(input.new_ones(shape), p)
    return input * noise.transpose(0, 1)


def _stack(
    input: Tensor, hx: Tensor | None, cells: Sequence[Cell], bidirectional: bool,
    layout: Layout, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All layers."""
    _, where, begin, offsets, lengths = layout
    directions = [(False, begin)]
    if bidirectional:
        other = sequences.reverse_starts(begin, options.batch_first, where)
        directions.append((True, other))
    seed = None
    if options.zoneout and options.training:
        seed = torch.randint(2**62, (), device="cpu").to(input.device)
    states: list[Tensor] = []
    layers = len(cells) // len(directions)
    for number in range(layers):
        outputs = []
        for reverse, start in directions:
            count = len(states)
            cell, state = cells[count], None if hx is None else hx[count]
            check_weights("gru", input.shape[-1], *cell)
            if lengths is not None:
                rows = sequences.Padded(lengths, options.batch_first)
                output, h_n = _padded_layer(
                    input, cell, state, begin, rows, reverse, options, seed, count
                )
            else:
                output, h_n = _layer(
                    input, cell, state, start, where, reverse, options, seed, count
                )
            if offsets is not None:
                h_n = sequences.final_states(output[0], offsets, reverse)
            outputs.append(output)
            states.append(h_n)
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if options.dropout and options.training and number + 1 < layers:
            input = dropped(input, options.dropout, where is not None or not options.batch_first)
    return input, states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


def _torch_takes(input: Tensor, cells: Sequence[Cell], layout: Layout, options: Options) -> bool:
    plain = layout.where is None and layout.begin is None and layout.lengths is None
    plain = plain and not options.zoneout
    plain = plain and options.precision in ("ieee", "auto") and options.save == "gates"
    if not plain or input.shape[0] == 0 or input.shape[1] == 0:
        return False
    forced = dispatch.forced()
    why = None
    if forced is None:
        first, second = input.shape[:2]
        batch, steps = (first, second) if options.batch_first else (second, first)
        why = by_torch.torch_is_faster(input, cells[0], batch, steps, options.precision)
    if why is not None or forced == "torch":
        dispatch.note("gru", "torch", {} if why is None else {"cpu": why})
        return True
    return False


def _by_torch(
    input: Tensor, hx: Tensor | None, cells: Sequence[Cell], bidirectional: bool, options: Options
) -> tuple[Tensor, Tensor]:
    bias = cells[0][2] is not None
    directions = 2 if bidirectional else 1
    for number, cell in enumerate(cells):
        features = cells[0][1].shape[1] * directions
        check_weights("gru", features if number >= directions else input.shape[-1], *cell)
    if hx is None:
        batch = input.shape[0 if options.batch_first else 1]
        hx = input.new_zeros(len(cells), batch, cells[0][1].shape[1])
    flat = [w for cell in cells for w in cell if w is not None]
    # on a GPU autocast makes float16 of whatever arrives; the module has chosen its dtype
    with by_torch.outside_autocast(input.device.type):
        return torch.gru(
            input, hx, flat, bias, len(cells) // directions, options.dropout, options.training,
            bidirectional, options.batch_first,
        )  # fmt: skip


def _packed_by_torch(
    data: Tensor, batch_sizes: Tensor, hx: Tensor | None, cells: Sequence[Cell],
    bidirectional: bool, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if hx is None:
        hx = data.new_zeros(len(cells), int(batch_sizes[0]), cells[0][1].shape[1])
    flat = [w for cell in cells for w in cell if w is not None]
    layers = len(cells) // (2 if bidirectional else 1)
    with by_torch.outside_autocast(data.device.type):  # as in `_by_torch`
        return torch.gru(
            data, batch_sizes, hx, flat, cells[0][2] is not None, layers, options.dropout,
            options.training, bidirectional,
        )  # fmt: skip


def _packed(
    input: PackedSequence, hx: Tensor | None, cells: Sequence[Cell], bidirectional: bool,
    options: Options,
) -> tuple[PackedSequence, Tensor]:  # fmt: skip
    data, batch_sizes, order, inverse = input
    count = int(batch_sizes[0]) if hx is None else hx.shape[1]
    if hx is not None and order is not None:
        hx = hx.index_select(1, order)
    layout = Layout(count, sequences.packed(batch_sizes, count), None, None)
    why = None
    plain = not options.zoneout and options.precision in ("ieee", "auto")
    if dispatch.forced() is None and plain:
        why = by_torch.torch_packs_faster(data, cells[0], len(batch_sizes))
    if why is not None:
        dispatch.note("gru", "torch", {"cpu": why})
        output, h_n = _packed_by_torch(data, batch_sizes, hx, cells, bidirectional, options)
    else:
        output, h_n = _stack(data, hx, cells, bidirectional, layout, options)
    if inverse is not None:
        h_n = h_n.index_select(1, inverse)
    return PackedSequence(output, batch_sizes, order, inverse), h_n


@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    **rest: Unpack[Signature],
) -> tuple[Tensor, Tensor]: ...
@overload
def gru(
    input: PackedSequence,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    **rest: Unpack[Signature],
) -> tuple[PackedSequence, Tensor]: ...
def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    precision: str = "auto",
    save: str = "gates",
    zoneout: float = 0.0,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A GRU over dense input, with the weights of torch.nn.GRU.

    Same as, for gru = torch.nn.GRU(C, H):
        gru(input, hx)        with flat_weights = gru._flat_weights

    Args:
        input: [T, B, C], [B, T, C] with `batch_first`, [T, C] for one sequence, [total, C] with
            `cu_seqlens`, or a PackedSequence; float64, float32, float16 or bfloat16.
        hx: [num_layers * directions, B, H] (without B for one sequence, documents for B with
            `cu_seqlens`) or None for zeros.
        flat_weights: for each layer, for each direction: w_ih [3H, C], w_hh [3H, H], and with
            `bias` b_ih, b_hh [3H].
        dropout: probability, between layers, when `training`.
        reset, segment_ids, cu_seqlens, lengths, precision, save: as in `embedding_gru`; shapes
            without C. The reverse direction starts afresh at the last token of each document.
        zoneout: probability that a unit keeps its old state at a step when `training`, drawn from
            torch's generator; else the expectation, zoneout * old + (1 - zoneout) * new. Runs as
            PyTorch operations, not in a kernel.

    Returns:
        output [T, B, directions * H] in the layout of `input` (a PackedSequence for one), and h_n
        in the shape of `hx`.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.

    Source of zoneout: Krueger et al. 2017 (arXiv:1606.01305).
    """
    op = "gru"
    plain = reset is None and segment_ids is None and cu_seqlens is None and lengths is None
    if plain and not zoneout and save == "gates" and precision in ("auto", "ieee"):
        form = by_torch.Form(num_layers, bias, bidirectional, batch_first)
        found = by_torch.of_few_steps(input, hx, flat_weights, form, dropout, training)
        if found is not None:
            return found
    data = input.data if isinstance(input, PackedSequence) else input
    checks.floating(op, "input", data)
    precision = check_options(op, precision, save)
    if not 0.0 <= zoneout <= 1.0:
        checks.bad_value(op, "zoneout", "in [0, 1]", zoneout)
    cells = cells_of(op, flat_weights, num_layers * (2 if bidirectional else 1), bias)
    checks.same_dtype(op, "input", data, "the weights", cells[0][0])
    options = Options(batch_first, dropout, training, save, precision, float(zoneout))
    hidden = cells[0][1].shape[-1]
    if isinstance(input, PackedSequence):
        given = {"reset": reset, "segment_ids": segment_ids, "cu_seqlens": cu_seqlens,
                 "lengths": lengths}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                checks.bad_value(op, name, "None for a PackedSequence", "a tensor")
        if hx is not None:
            # under torch.compile the number of sequences is read off hx, not off the data
            count = hx.shape[1] if torch.compiler.is_compiling() else int(input.batch_sizes[0])
            check_state(op, "hx", hx, (len(cells), count, hidden), data)
        return _packed(input, hx, cells, bidirectional, options)
    single = is_single(op, "input", input.dim() - 1, cu_seqlens, lengths)
    if single:
        input, options = input.unsqueeze(0), options._replace(batch_first=True)
        reset, segment_ids = (x if x is None else x.unsqueeze(0) for x in (reset, segment_ids))
        if cu_seqlens is None and hx is not None:
            hx = hx.unsqueeze(1)
    leading, batch_first = input.shape[:2], options.batch_first
    begin = sequences.starts(op, leading, batch_first, reset, segment_ids)
    layout = sequences.layout(op, leading, batch_first, cu_seqlens, lengths, hx, begin)
    check_state(op, "hx", hx, (len(cells), layout.batch, hidden), input)
    if _torch_takes(input, cells, layout, options):
        output, h_n = _by_torch(input, hx, cells, bidirectional, options)
    else:
        rows = input if layout.where is None else input.reshape(-1, input.shape[-1])
        output, h_n = _stack(rows, hx, cells, bidirectional, layout, options)
    if layout.where is not None:
        output = output.view(*leading, output.shape[-1])
    if single:
        return output[0], (h_n if cu_seqlens is not None else h_n[:, 0])
    return output, h_n
