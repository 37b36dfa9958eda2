"""GRU modules: a drop-in for torch.nn.GRU, and embedding and GRU in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..library import autocast_on
from ..ops.embedding_gru.arguments import cells_of, check_options
from ..ops.embedding_gru.by_torch import Form, embedded, of_few_steps
from ..ops.embedding_gru.embedding import EmbeddingOptions
from ..ops.embedding_gru.public import embedding_layer
from ..ops.embedding_gru.stack import dropped, gru
from ..ops.embedding_gru.token_plan import TokenPlan
from .decoder import GRUDecoder


def autocast_dtype(device: str, weight: Tensor) -> torch.dtype | None:
    """What autocast asks this module to compute in; float64 it leaves alone, as everywhere."""
    if weight.dtype == torch.float64 or not autocast_on(device):
        return None
    return torch.get_autocast_dtype(device)


class GRU(nn.RNNBase):
    """torch.nn.GRU on fastlm's kernels: same constructor, parameters, state_dict, errors, results.

    A PackedSequence runs in the same kernels, at the cost of its tokens. `forward` takes beside the
    input what `fastlm.gru` does: reset, segment_ids, cu_seqlens, lengths. It is an `nn.RNNBase` and
    no `nn.GRU`, which torch.compile refuses to trace; with it `torch.compile(fullgraph=True)` and
    `torch.export` work (a PackedSequence only with `hx`, which tells how many sequences it holds).

    Under autocast it computes in the dtype of autocast, bfloat16 or float16 with sums and state in
    float32, and returns that dtype. (torch.nn.GRU returns float32 on the CPU and takes float16 on
    a GPU whatever autocast says.)

    Args:
        precision, save, zoneout: see `fastlm.gru`. The rest as in torch.nn.GRU.
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
        precision: str = "auto",
        save: str = "gates",
        zoneout: float = 0.0,
        **unknown: Any,
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unknown:
            raise TypeError(f"GRU got an unexpected keyword argument {next(iter(unknown))!r}")
        check_options("nn.GRU", precision, save)
        if not 0.0 <= zoneout <= 1.0:
            checks.bad_value("nn.GRU", "zoneout", "in [0, 1]", zoneout)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.precision, self.save, self.zoneout = precision, save, zoneout

    def extra_repr(self) -> str:
        defaults = {"precision": "auto", "save": "gates", "zoneout": 0.0}
        own = ((name, getattr(self, name), value) for name, value in defaults.items())
        changed = (f", {name}={value}" for name, value, default in own if value != default)
        return super().extra_repr() + "".join(changed)

    def weights(self) -> list[Tensor]:
        """The parameters in the order of `fastlm.gru`, as they are at this call."""
        own: Any = self._parameters  # getattr of a module takes 0.4 us each
        try:
            return [own[name] for name in self._flat_weights_names]
        except KeyError:  # computed from others
            return [getattr(self, name) for name in self._flat_weights_names]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Any:
        weights = self.weights()
        plain = reset is None and segment_ids is None and cu_seqlens is None and lengths is None
        if plain and self._takes_torchs():
            drops = (self.dropout, self.training)
            found = of_few_steps(input, hx, weights, self._form(), *drops, module=True)
            if found is not None:
                return found
        data = input.data if isinstance(input, PackedSequence) else input
        batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        self._check(data, hx, batch_sizes, cu_seqlens, weights[0])
        cast = autocast_dtype(data.device.type, weights[0])
        if cast is not None:
            weights = [w.to(cast) for w in weights]
            hx = None if hx is None else hx.to(cast)
            data = data.to(cast)
            input = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
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
            lengths=lengths,
            precision=self.precision,
            save=self.save,
            zoneout=self.zoneout,
        )

    def _form(self) -> Form:
        return Form(self.num_layers, self.bias, self.bidirectional, self.batch_first)

    def _takes_torchs(self) -> bool:
        """Whether PyTorch's own GRU does what is asked for."""
        return not self.zoneout and self.save == "gates" and self.precision in ("auto", "ieee")

    def _check(
        self, data: Tensor, hx: Tensor | None, batch_sizes: Tensor | None,
        cu_seqlens: Tensor | None, weight: Tensor,
    ) -> None:  # fmt: skip
        """The checks of torch.nn.GRU, in its order and words."""
        dims = data.dim()
        if batch_sizes is None and dims not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {dims}D instead")
        states = 2 if dims == 2 and batch_sizes is None and cu_seqlens is None else 3
        if hx is not None and hx.dim() != states:
            kind = "unbatched 2-D" if states == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {states}-D but got {hx.dim()}-D tensor"
            )
        cast = autocast_on(data.device.type)
        if data.dtype != weight.dtype and not cast:
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({data.dtype})"
            )
        if batch_sizes is not None and dims != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {dims}")
        if self.input_size != data.shape[-1]:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {data.shape[-1]}"
            )
        if hx is not None:
            self._check_state(data, hx, batch_sizes, cu_seqlens, weight)
        if batch_sizes is None and cu_seqlens is None and data.shape[self._step_dim(dims)] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _step_dim(self, dims: int) -> int:
        return 1 if self.batch_first and dims == 3 else 0

    def _check_state(
        self, data: Tensor, hx: Tensor, batch_sizes: Tensor | None, cu_seqlens: Tensor | None,
        weight: Tensor,
    ) -> None:  # fmt: skip
        layers = self.num_layers * (2 if self.bidirectional else 1)
        batch = 1
        if cu_seqlens is not None:
            batch = cu_seqlens.shape[0] - 1
        elif batch_sizes is None and data.dim() == 3:
            batch = data.shape[1 - self._step_dim(3)]
        elif batch_sizes is not None and not torch.compiler.is_compiling():
            batch = int(batch_sizes[0])
        elif batch_sizes is not None:
            batch = hx.shape[1]
        shape = (layers, *(hx.shape[1:-1] and (batch,)), self.hidden_size)
        if tuple(hx.shape) != shape:
            expected = (layers, batch, self.hidden_size)
            got = [hx.shape[0], 1, *hx.shape[1:]] if hx.dim() == 2 else list(hx.shape)
            raise RuntimeError(f"Expected hidden size {expected}, got {got}")
        if hx.dtype != weight.dtype and not autocast_on(data.device.type):
            raise RuntimeError(
                f"hx must have the same dtype as the weights, {weight.dtype}, got {hx.dtype}"
            )


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
        dedupe, precision, save: see `fastlm.embedding_gru`.

    Under autocast with bfloat16 its products are those of precision="bf16", with float16 those of
    float32; it returns the dtype of autocast. The embedding is not copied for that.
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
        precision: str = "auto",
        save: str = "gates",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, device=device, dtype=dtype,
        )  # fmt: skip
        self.gru = GRU(
            embedding_dim, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, precision=precision, save=save,
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
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, T], h0 [num_layers, B, H] -> output [B, T, H], h_n [num_layers, B, H].

        Bidirectional: output [B, T, 2 * H], states [2 * num_layers, B, H], as torch.nn.GRU.
        [T, B] without `batch_first`; [T] for one sequence, then h0 and h_n have no B.
        """
        if plan is None and reset is None and segment_ids is None:
            if cu_seqlens is None and lengths is None:
                found = self._in_two(tokens, h0)
                if found is not None:
                    return found
        embedding, cells = self.embedding, self.gru
        ways = 2 if cells.bidirectional else 1
        first = ways * (4 if cells.bias else 2)
        weights = cells.weights()
        precision = cells.precision
        cast = autocast_dtype(tokens.device.type, weights[0])
        if h0 is not None:
            layers = (ways * cells.num_layers, *h0.shape[1:])
            checks.shape("nn.EmbeddingGRU", "h0", h0, layers, "layers and directions")
            if autocast_on(tokens.device.type):
                h0 = h0.to(weights[0].dtype)
        if cast == torch.bfloat16 and precision == "auto":
            precision = "bf16"
        common: dict[str, Any] = {
            "reset": reset, "segment_ids": segment_ids, "cu_seqlens": cu_seqlens,
            "lengths": lengths, "batch_first": cells.batch_first, "save": cells.save,
            "precision": precision,
        }  # fmt: skip
        output, states = embedding_layer(
            "nn.EmbeddingGRU",
            tokens,
            embedding.weight,
            cells_of("nn.EmbeddingGRU", weights[:first], ways, cells.bias),
            [None] * ways if h0 is None else list(h0[:ways]),
            EmbeddingOptions(
                embedding.padding_idx, embedding.max_norm, embedding.norm_type,
                embedding.scale_grad_by_freq, embedding.sparse,
                self.embedding_dropout if self.training else 0.0,
            ),
            plan=plan,
            dedupe=self.dedupe,
            **common,
        )  # fmt: skip
        h_n = torch.stack(states)
        if cells.num_layers > 1:
            if cells.dropout and cells.training:
                output = dropped(output, cells.dropout, not cells.batch_first)
            above, h_rest = gru(
                output,
                None if h0 is None else h0[ways:],
                weights[first:],
                num_layers=cells.num_layers - 1,
                bias=cells.bias,
                bidirectional=cells.bidirectional,
                dropout=cells.dropout,
                training=cells.training,
                **common,
            )
            assert isinstance(above, Tensor)  # as the input is
            output, h_n = above, torch.cat((h_n, h_rest))
        return (output, h_n) if cast is None else (output.to(cast), h_n.to(cast))

    def _in_two(self, tokens: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Embedding and then GRU, in a call without options for which that is faster."""
        embedding, cells = self.embedding, self.gru
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            return None
        if self.dedupe != "auto" or (self.embedding_dropout and self.training):
            return None
        weight = embedding.weight
        if not cells._takes_torchs() or (weight.device.type == "cpu" and autocast_on("cpu")):
            return None
        form, weights = cells._form(), cells.weights()
        rows = embedded(tokens, weight, h0, weights, form, embedding.padding_idx, module=True)
        if rows is None:
            return None
        if autocast_on(weight.device.type):
            return cells.forward(rows, h0)
        drops = (cells.dropout, cells.training)
        found = of_few_steps(rows, h0, weights, form, *drops, fits=True)
        output, h_n = found or gru(
            rows, h0, weights, **form._asdict(), dropout=drops[0], training=drops[1]
        )
        assert isinstance(output, Tensor)  # as the input is
        return output, h_n

    @torch.no_grad()
    def decoder(self) -> GRUDecoder:
        """A stepper for generation, from the weights as they are now."""
        if self.gru.bidirectional:
            checks.bad_value("nn.EmbeddingGRU.decoder", "bidirectional", "False", True)
        return GRUDecoder(self)
