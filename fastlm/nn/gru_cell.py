"""A drop-in for torch.nn.GRUCell."""

from __future__ import annotations

from torch import Tensor, nn

from .gru import autocast_dtype


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell: the same class, parameters, checks and kernel.

    One step is two matrix products, and PyTorch's cell spends 85% to 95% of its time in them
    (B=1 to 256, H=512, CPU): there is nothing to gain by another kernel. For many steps use `GRU`;
    for generation `EmbeddingGRU.decoder`, which packs the weights once.

    Under autocast it computes in and returns the dtype of autocast, as `GRU` does; torch's returns
    float32 on the CPU.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        cast = autocast_dtype(input.device.type, self.weight_ih)
        if cast is None:
            return super().forward(input, hx)
        hx = None if hx is None else hx.to(cast)
        return super().forward(input.to(cast), hx).to(cast)
