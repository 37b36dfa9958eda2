"""GRU modules: a drop-in for torch.nn.GRU, and embedding and GRU in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..ops.embedding_gru import op as gru_op
from ..ops.embedding_gru.embedding import EmbeddingOptions
from ..ops.embedding_gru.public import embedding_layer, gru
from ..ops.embedding_gru.token_plan import TokenPlan


class GRU(nn.RNNBase):
    """torch.nn.GRU on fastlm's kernels: same constructor, parameters, state_dict and results.

    `forward` takes what `fastlm.gru` takes beside the input: reset, segment_ids, cu_seqlens. A
    PackedSequence goes to torch's own kernel. Under autocast it computes in the dtype of its
    weights, as torch.nn.GRU does on the CPU. It is an `nn.RNNBase` and no `nn.GRU`, which
    torch.compile refuses to trace.

    Args:
        save: "gates" or "hidden", see `fastlm.embedding_gru`. The rest as in torch.nn.GRU.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        save: str = "gates",
    ) -> None:
        checks.one_of("nn.GRU", "save", save, ("gates", "hidden"))
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.save = save

    def weights(self) -> list[Tensor]:
        """The parameters in the order of `fastlm.gru`, as they are at this call."""
        return [getattr(self, name) for name in self._flat_weights_names]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        weights = self.weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(weights[0].dtype)
            hx = None if hx is None else hx.to(weights[0].dtype)
        return gru(
            input,
            hx,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            reset=reset,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            save=self.save,
        )

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None, weights: list[Tensor]
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            layers = self.num_layers * (2 if self.bidirectional else 1)
            hx = data.new_zeros(layers, int(batch_sizes[0]), self.hidden_size)
        elif sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        output, h_n = torch.gru(
            data, batch_sizes, hx, weights, self.bias, self.num_layers, self.dropout,
            self.training, self.bidirectional,
        )  # fmt: skip
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n


class EmbeddingGRU(nn.Module):
    """torch.nn.Embedding followed by torch.nn.GRU, without building the embedded sequence.

    Parameters stand in the submodules `embedding` and `gru`, named as in torch.nn; both are plain
    modules whose weights may be tied or loaded as usual.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse:
            as in torch.nn.Embedding. A sparse gradient holds each row once.
        hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in torch.nn.GRU;
            batch_first is True by default.
        embedding_dropout: in training, the probability that a token is zero wherever it occurs.
        dedupe, save: see `fastlm.embedding_gru`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        embedding_dropout: float = 0.0,
        dedupe: str = "auto",
        save: str = "gates",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, device=device, dtype=dtype,
        )  # fmt: skip
        self.gru = GRU(
            embedding_dim, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, save=save,
        )  # fmt: skip
        self.embedding_dropout = embedding_dropout
        self.dedupe = dedupe

    def forward(
        self,
        tokens: Tensor,
        h0: Tensor | None = None,
        *,
        plan: TokenPlan | None = None,
        reset: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, T], h0 [num_layers, B, H] -> output [B, T, H], h_n [num_layers, B, H].

        Bidirectional: output [B, T, 2 * H], states [2 * num_layers, B, H], as torch.nn.GRU.
        [T, B] without `batch_first`; [T] for one sequence, then h0 and h_n have no B.
        """
        embedding, cells = self.embedding, self.gru
        ways, per_cell = 2 if cells.bidirectional else 1, 4 if cells.bias else 2
        weights = cells.weights()
        if h0 is not None:
            layers = (ways * cells.num_layers, *h0.shape[1:])
            checks.shape("nn.EmbeddingGRU", "h0", h0, layers, "layers and directions")
            if torch.is_autocast_enabled(h0.device.type):
                h0 = h0.to(weights[0].dtype)
        documents: dict[str, Any] = {
            "reset": reset,
            "segment_ids": segment_ids,
            "cu_seqlens": cu_seqlens,
        }
        output, states = embedding_layer(
            "nn.EmbeddingGRU",
            tokens,
            embedding.weight,
            _cells(weights[: ways * per_cell], per_cell),
            [None] * ways if h0 is None else list(h0[:ways]),
            EmbeddingOptions(
                embedding.padding_idx, embedding.max_norm, embedding.norm_type,
                embedding.scale_grad_by_freq, embedding.sparse,
                self.embedding_dropout if self.training else 0.0,
            ),
            batch_first=cells.batch_first,
            plan=plan,
            dedupe=self.dedupe,
            save=cells.save,
            **documents,
        )  # fmt: skip
        h_first = torch.stack(states)
        if cells.num_layers == 1:
            return output, h_first
        if cells.dropout and self.training:
            output = nn.functional.dropout(output, cells.dropout)
        output, h_rest = gru(
            output,
            None if h0 is None else h0[ways:],
            weights[ways * per_cell :],
            num_layers=cells.num_layers - 1,
            bias=cells.bias,
            bidirectional=cells.bidirectional,
            batch_first=cells.batch_first,
            dropout=cells.dropout,
            training=self.training,
            save=cells.save,
            **documents,
        )
        return output, torch.cat((h_first, h_rest))

    @torch.no_grad()
    def decoder(self) -> GRUDecoder:
        """A stepper for generation, from the weights as they are now."""
        if self.gru.bidirectional:
            checks.bad_value("nn.EmbeddingGRU.decoder", "bidirectional", "False", True)
        return GRUDecoder(self)


def _cells(weights: list[Tensor], per_cell: int) -> list[Any]:
    """(w_ih, w_hh, b_ih, b_hh) of each cell."""
    groups = (weights[i : i + per_cell] for i in range(0, len(weights), per_cell))
    return [(*group, None, None)[:4] for group in groups]


class GRUDecoder:
    """One token at a time: the whole vocabulary projected once, weights packed once.

    It holds V x 3H extra values and does not follow later changes of the weights.
    """

    def __init__(self, model: EmbeddingGRU) -> None:
        cells = model.gru
        per_cell = 4 if cells.bias else 2
        weights = [w.detach() for w in cells.weights()]
        self._cells = [weights[i : i + per_cell] for i in range(0, len(weights), per_cell)]
        self._hidden = cells.hidden_size
        embedding = model.embedding.weight.detach()
        first = self._cells[0]
        self._table = nn.functional.linear(embedding, first[0], *first[2:3])
        self._packed = [gru_op.pack(cell[1], cell[3] if len(cell) > 2 else None)
                        for cell in self._cells]  # fmt: skip

    def start(self, batch: int) -> Tensor:
        """The zero state [num_layers, batch, H]."""
        return self._table.new_zeros(len(self._cells), batch, self._hidden)

    @torch.no_grad()
    def step(self, tokens: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """tokens [B], h [num_layers, B, H] or None -> output [B, H] of the last layer, next h."""
        if h is None:
            h = self.start(tokens.shape[0])
        checks.index_range("nn.GRUDecoder", "tokens", tokens, self._table.shape[0], None)
        states: list[Tensor] = []
        index: Tensor | None
        table, index = self._table, tokens.long().contiguous()
        for number, cell in enumerate(self._cells):
            bias = cell[3] if len(cell) > 2 else None
            if number:
                table, index = nn.functional.linear(states[-1], cell[0], *cell[2:3]), None
            states.append(gru_op.step(table, index, cell[1], bias, self._packed[number], h[number]))
        return states[-1], torch.stack(states)
