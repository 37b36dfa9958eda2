"""Training on several processes: each computes its rows of a batch, and all take the same step.

    torchrun --nproc-per-node 2 -m fastlm.lm train ...

Batches, their order and the loss are those of one process, whatever the number of ranks: a rank
has a block of the rows, and its loss counts by the targets in them. Gradients are summed by DDP,
or by FSDP2, which also shares out parameters and optimizer. Rank 0 alone decides when to stop,
prints and writes; a checkpoint is that of one process.

Sources: Li et al. 2020 (arXiv:2006.15704) for DDP, Zhao et al. 2023 (arXiv:2304.11277) for FSDP.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checkpoint, files, machine, sharding
from .errors import LMError, OtherRank, UsageError
from .pairs import IGNORED

WAYS = ("ddp", "fsdp2")
# a rank that died is noticed at once, by its closed connection; this is for one that hangs, and for
# the others while rank 0 prepares a large text
TIMEOUT = datetime.timedelta(minutes=30)
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Loss = Callable[..., tuple[Tensor, Tensor]]
T = TypeVar("T")


class Ranks:
    """One process; `Group` answers the same questions for one of several."""

    rank = local_rank = 0
    world = 1
    way: str | None = None
    device = torch.device("cpu")

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def in_parts(self) -> bool:
        """Whether no rank can compute the model without the others."""
        return self.way == "fsdp2"

    def described(self) -> dict[str, Any]:
        return {"ranks": self.world, "parallel": self.way or "none"}

    # ---- the model ----------------------------------------------------------------------------

    def wrap(self, model: Any) -> Loss:
        """`model.loss` over the rows of all ranks, for the backward of each. To be called before
        the optimizer is made: FSDP2 puts parts in the place of parameters."""
        return lambda *args, **options: model.loss(*args, **options)

    def apart(self, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Where `wanted`, the losses and backwards inside add to the gradient of this rank alone;
        the next backward outside sums all of it over the ranks."""
        return contextlib.nullcontext()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Let its `load_state_dict` take whole tensors."""

    def whole(self, tensors: checkpoint.Tensors, everywhere: bool = False) -> checkpoint.Tensors:
        """Parts put together; unless `everywhere`, for rank 0 alone."""
        return tensors

    # ---- rows ---------------------------------------------------------------------------------

    def rows_of(self, batches: Any, batch: int) -> Any:
        """Batches as this rank reads them.

        Raises:
            UsageError: `batch` rows cannot be shared out evenly.
        """
        return batches

    def share(self, rows: Tensor) -> tuple[Tensor, bool]:
        """(this rank's part of the rows, True), or (a row, False) where there is none for it: all
        ranks make the same calls."""
        return rows, True

    def own(self, state: Tensor | None) -> Tensor | None:
        """This rank's rows of a carried state [L, B, H]."""
        return state

    def together(self, state: Tensor | None) -> Tensor | None:
        """The carried state of all rows."""
        return state

    # ---- agreement ----------------------------------------------------------------------------

    def total(self, value: float) -> float:
        return value

    def totals(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def agreed(self, value: T) -> T:
        """Rank 0's."""
        return value

    def decide(self, seconds: float, stop: bool, save: bool) -> tuple[float, bool, bool]:
        """Rank 0's clock, whether any rank was asked to stop, whether rank 0 wants to save."""
        return seconds, stop, save

    def require_same(self, what: Any) -> None:
        """Raises UsageError unless all ranks have the same configuration and checkpoint."""

    def first(self, work: Callable[[], T]) -> T:
        """`work` by one rank of each machine, then by the others, which find it done."""
        return work()

    # ---- random numbers -----------------------------------------------------------------------

    def seed(self, seed: int, steps: int = 0) -> int:
        """Of this rank's dropout."""
        return seed

    def random_state(self) -> tuple[checkpoint.Tensors, dict[str, Any]]:
        return checkpoint.random_state()

    def restore_random_state(self, tensors: checkpoint.Tensors, state: dict[str, Any]) -> bool:
        """False when the checkpoint has nothing for this rank."""
        checkpoint.restore_random_state(tensors, state)
        return True


class _Mean(torch.autograd.Function):
    """The loss of all ranks, with `share` of this one's own gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: float, mean: float) -> Tensor:
        ctx.share = share
        return own.new_full((), mean)

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor, None, None]:
        return dloss[0] * ctx.share, None, None


class _LossModule(nn.Module):
    """The loss as `forward`, which is where DDP has its hooks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.model.loss(*args, **options)


class _OwnRows:
    """Batches of all ranks, read by each as far as its own rows go."""

    def __init__(self, batches: Any, ranks: Group) -> None:
        self._batches, self._ranks = batches, ranks

    def next(self) -> tuple[Tensor, Tensor, bool]:
        """As many rows on every rank: where they run out, one that does not count."""
        tokens, targets, fresh = self._batches.next()
        count = -(-len(tokens) // self._ranks.world)
        rows = torch.arange(count) + self._ranks.rank * count
        # where a last, smaller batch has too few, rows that do not count: all ranks compute alike
        missing = rows >= len(tokens)
        rows = rows.clamp(max=len(tokens) - 1)
        return tokens[rows], targets[rows].masked_fill(missing[:, None], IGNORED), fresh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


class Group(Ranks):
    """This process among those of the default process group."""

    def __init__(self, way: str, device: torch.device, local_rank: int | None = None) -> None:
        if way not in WAYS:
            raise UsageError(f"parallel must be one of {', '.join(WAYS)}, got {way!r}")
        self.way, self.device = way, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_rank = self.rank if local_rank is None else local_rank
        self._apart: Callable[[], contextlib.AbstractContextManager[Any]]  # made by `wrap`

    def _gathered(self, values: Sequence[float]) -> Tensor:
        """[world, n]: the same on all ranks, to the bit."""
        own = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own)
        return torch.stack(every)

    def _objects(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    # ---- the model ----------------------------------------------------------------------------

    def wrap(self, model: Any) -> Loss:
        run: Loss
        if self.way == "fsdp2":
            run = sharding.shard(model, self.device, self.world)
            self._apart = functools.partial(sharding.apart, model)
        else:
            run = whole = nn.parallel.DistributedDataParallel(_LossModule(model))
            self._apart = whole.no_sync

        def loss(
            tokens: Tensor, targets: Tensor, *rest: Any, **options: Any
        ) -> tuple[Tensor, Tensor]:
            count = int((targets != IGNORED).sum())
            # the mean of nothing would be NaN, and every parameter needs a gradient
            chosen = targets if count else torch.zeros_like(targets)
            own, state = run(tokens, chosen, *rest, **options)
            every = self._gathered([float(own.detach()) * count, count])
            sums, counts = every.sum(0)
            # gradients are averaged, hence `world`
            share = self.world * count / counts
            return _Mean.apply(own, float(share), float(sums / counts)), state

        return loss

    def apart(self, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
        return self._apart() if wanted else contextlib.nullcontext()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_load_state_dict_pre_hook(sharding.load_optimizer_parts)

    def whole(self, tensors: checkpoint.Tensors, everywhere: bool = False) -> checkpoint.Tensors:
        found = {}
        for name, value in tensors.items():
            together = sharding.whole(value.detach())
            if self.chief or everywhere:
                found[name] = together.cpu()
        return found

    # ---- rows ---------------------------------------------------------------------------------

    def rows_of(self, batches: Any, batch: int) -> Any:
        if batch % self.world:
            raise UsageError(
                f"batch must be a multiple of the number of ranks ({self.world}), got {batch}"
            )
        return _OwnRows(batches, self)

    def share(self, rows: Tensor) -> tuple[Tensor, bool]:
        own = rows.tensor_split(self.world)[self.rank]
        return (own, True) if len(own) else (rows[:1], False)

    def own(self, state: Tensor | None) -> Tensor | None:
        return None if state is None else state.chunk(self.world, 1)[self.rank].contiguous()

    def together(self, state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        parts = [torch.empty_like(state) for _ in range(self.world)]
        dist.all_gather(parts, state.contiguous())
        return torch.cat(parts, 1)

    # ---- agreement ----------------------------------------------------------------------------

    def total(self, value: float) -> float:
        return float(self._gathered([value]).sum())

    def totals(self, values: Sequence[float]) -> list[float]:
        return self._gathered(values).sum(0).tolist()

    def agreed(self, value: T) -> T:
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def decide(self, seconds: float, stop: bool, save: bool) -> tuple[float, bool, bool]:
        every = self._gathered([seconds, stop, save])
        return float(every[0, 0]), bool(every[:, 1].any()), bool(every[0, 2])

    def require_same(self, what: Any) -> None:
        for rank, other in enumerate(self._objects(files.digest(what))):
            if other != self.agreed(files.digest(what)):
                raise UsageError(
                    f"rank {rank} has other data, options or another checkpoint than rank 0; give "
                    "all ranks the same command, and --out and --data that all of them can see"
                )

    def first(self, work: Callable[[], T]) -> T:
        result, error = None, None
        if self.local_rank == 0:
            try:
                result = work()
            except LMError as caught:
                error = caught
        told = self._objects(None if error is None else (error.exit_code, str(error)))
        if error is not None:
            raise error
        for rank, problem in enumerate(told):
            if problem is not None:
                raise OtherRank(f"rank {rank} stopped: {problem[1]}", problem[0])
        return work() if result is None else result

    # ---- random numbers -----------------------------------------------------------------------

    def seed(self, seed: int, steps: int = 0) -> int:
        if self.chief and not steps:
            return seed
        text = f"{seed}/{self.rank}/{steps}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def random_state(self) -> tuple[checkpoint.Tensors, dict[str, Any]]:
        every = self._objects(checkpoint.random_state())
        tensors, state = every[0]
        for rank, (others, _) in enumerate(every[1:], 1):
            tensors |= {f"rank{rank}.{name}": value for name, value in others.items()}
        return tensors, {**state, "ranks": [values for _, values in every[1:]]}

    def restore_random_state(self, tensors: checkpoint.Tensors, state: dict[str, Any]) -> bool:
        if not self.chief:
            prefix, states = f"rank{self.rank}.", state.get("ranks", [])
            if len(states) < self.rank:
                return False
            state = states[self.rank - 1]
            tensors = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
        return super().restore_random_state(tensors, state)


# ---- the process group --------------------------------------------------------------------------


def started() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return all(name in os.environ for name in _ENVIRONMENT)


def _device(local_rank: int, asked: torch.device) -> torch.device:
    if asked.type == "cpu":
        return asked
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(f"rank {local_rank} of this machine has no GPU: there are {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _lost(error: RuntimeError) -> bool:
    """The connection to another rank failed; gloo says so in a plain RuntimeError."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def connected(way: str | None = None, device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun started, for as long as they work together; without it one process.

    gloo on a CPU, nccl on GPUs, of which rank r of a machine takes number r.

    Args:
        way: "ddp" (the default) or "fsdp2".
        device: "auto", "cpu" or "cuda", as `machine.device_of`.

    Raises:
        UsageError: `way` is given and there is no torchrun.
        OtherRank: the connection to another rank was lost.
    """
    if not started():
        if way is not None:
            raise UsageError(
                f"--parallel {way} is for several processes: torchrun --nproc-per-node 2 "
                "-m fastlm.lm train ..."
            )
        alone = Ranks()
        alone.device = machine.device_of(device)
        yield alone
        return
    try:
        local_rank = int(os.environ["LOCAL_RANK"])
    except ValueError:
        raise UsageError("LOCAL_RANK must be a number, as torchrun sets it") from None
    place = _device(local_rank, machine.device_of(device))
    whole = True
    try:
        backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield Group(way or "ddp", place, local_rank)
        dist.barrier()  # torchrun ends all when one has ended badly: not before rank 0 has written
    except RuntimeError as error:
        if not _lost(error):
            raise
        whole = False
        raise OtherRank(
            "another rank ended or cannot be reached; what was saved is whole, the same command "
            f"goes on from there ({' '.join(str(error).split()).split('. ')[0][:160]})",
            lost=True,
        ) from error
    finally:
        # without all its members it aborts, or waits for them
        if whole and dist.is_initialized():
            dist.destroy_process_group()
