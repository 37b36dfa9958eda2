"""Processes of a gloo group on loopback, each with its part of a vocabulary.

A test file that runs cases on them is also their program: `run_world(CASES, ...)`, once for each
world size.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

WORLDS = (2, 4)


class Collectives(TorchDispatchMode):
    """How often each collective runs, and the bytes that this rank gives to them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function._schema.name.removeprefix("c10d::")] += 1
            sent = args[1] if function._schema.name == "c10d::allgather_" else args[0]
            self.bytes += sum(tensor.nbytes for tensor in sent)
        return function(*args, **(kwargs or {}))


class SumOfGradients(torch.autograd.Function):
    """Identity; every rank gets the gradient of all parts."""

    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Part:
    """This rank's part of a vocabulary."""

    def __init__(self, classes, kind):
        rank, world = dist.get_rank(), dist.get_world_size()
        place = world - 1 - rank if kind == "reversed" else rank
        if kind == "equal":
            assert classes % world == 0
            ends = [classes // world * i for i in range(world + 1)]
        else:  # the sizes are as 1 : 2 : 3 ...
            whole = world * (world + 1) // 2
            ends = [classes * i * (i + 1) // 2 // whole for i in range(world + 1)]
        self.start, self.end = ends[place], ends[place + 1]
        start = None if kind == "equal" else self.start
        self.options = {"group": dist.group.WORLD, "vocab_start_index": start}

    def of(self, value, dim=-1):
        """The part of a whole tensor, or None of None, whose gradient comes back whole."""
        if value is None:
            return None
        if value.requires_grad:
            value = SumOfGradients.apply(value)
        return value.narrow(dim, self.start, self.end - self.start)


def gathered(value):
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return parts


def _run_rank(cases, rank, world, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for name, function in cases.items():
        torch.manual_seed(0)
        try:
            function()
            dist.barrier()
            results[name] = ""
        except BaseException:
            # the others are told by the lost connection
            results[name] = traceback.format_exc()
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # a group that failed may wait for its members when it is taken down


def run_world(cases, world, folder):
    """In a process of its own; the results are what `results_of` reads."""
    # once, and not in each rank
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401

    torch.set_num_threads(1)
    # nothing has run yet, so no thread is lost by the fork
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=_run_rank, args=(cases, rank, world, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode) for process in ranks)


def results_of(program, world, folder):
    """Of each rank, case -> traceback or "", up to the first that failed."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, program, str(world), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
