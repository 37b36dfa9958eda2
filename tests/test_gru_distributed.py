"""A training step of GRU models on two processes equals the step on one: DDP and FSDP2."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlm

STEPS, BATCH = 3, 4


class Model(nn.Module):
    """Both modules, in the way a language model holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = fastlm.nn.EmbeddingGRU(11, 6, 8, num_layers=2)
        self.dense = fastlm.nn.GRU(8, 5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.dense(self.embedded(tokens)[0])
        return self.head(hidden)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (BATCH, 7), generator=generator) for _ in range(STEPS)]


def train(net: nn.Module, share: slice) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for tokens in batches():
        own = tokens[share]
        optimizer.zero_grad()
        logits = net(own[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten()).backward()
        optimizer.step()


def work(rank: int, how: str, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        net: nn.Module = model()
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(net)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            assert isinstance(net, Model)
            for part in (net.embedded, net.dense, net):
                fully_shard(part, mesh=mesh)
            wrapped = net
            assert all(p.to_local().shape[0] < p.shape[0] for p in net.parameters())
        half = BATCH // 2
        train(wrapped, slice(rank * half, (rank + 1) * half))
        state = net.state_dict()
        if how == "fsdp2":
            state = {k: v.full_tensor() for k, v in state.items()}
        torch.save(state, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ("ddp", "fsdp2"))
def test_two_processes_are_one(how: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (how, port, str(tmp_path)), nprocs=2)
    single, start = model(), model().state_dict()
    train(single, slice(0, BATCH))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state.keys() == start.keys()
        for name, value in single.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, start[name])
