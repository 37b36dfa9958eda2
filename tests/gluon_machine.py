"""The machine that `gluon_interpreter.py` runs kernels on: partitions, memory, barriers.

A program's partitions are threads that run one at a time; who goes on is drawn at every access to
a barrier or to shared memory. Copies by TMA and matrix products finish at any time between their
issue and what waits for them; the target of a copy holds NaN until then. So a missing wait, a
barrier with the wrong phase, count or bytes, and a buffer that is overwritten too early each show
up in some order, as a wrong result or as a deadlock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

local = threading.local()


class Deadlock(RuntimeError):
    pass


# -- time -----------------------------------------------------------------------------------------


class Machine:
    """One program: its partitions, and the copies under way."""

    current: Machine

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.random = random.Random(seed)
        # how soon copies and products finish, in which order copies do, and who is ahead
        self.copy_rate = self.random.choice((0.02, 0.3, 0.8))
        self.product_rate = self.random.choice((0.0, 0.3, 0.8))
        self.order = self.random.choice((0, -1, None))
        self.copies: list[Callable[[], None]] = []
        self.actors: list[Actor] = []
        self.failure: BaseException | None = None

    def run(self, roles: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        self.actors = [Actor(self, role, args) for role, args in roles]
        for actor in self.actors:
            actor.speed = self.random.choice((1, 20))
            actor.thread.start()
        self.pass_on(None)
        for actor in self.actors:
            actor.thread.join()
        if self.failure is not None:
            raise self.failure
        assert not self.copies, "a block ended before a copy into its memory"

    @torch.no_grad()
    def pass_on(self, me: Actor | None) -> None:
        """Lets somebody go on, after any number of copies have finished."""
        while True:
            able = [a for a in self.actors if not a.done and a.ready()]
            if self.copies and (not able or self.random.random() < self.copy_rate):
                at = self.random.randrange(len(self.copies)) if self.order is None else self.order
                try:
                    self.copies.pop(at)()
                except Exception as error:  # carried over to the caller's thread
                    self.failure = self.failure or error
                continue
            break
        if self.failure is None and not able:
            if all(a.done for a in self.actors):
                return
            waits = [a.waits for a in self.actors if not a.done]
            self.failure = Deadlock(f"all partitions wait: {waits}")
        if self.failure is not None:
            able = [a for a in self.actors if not a.done]
            if not able:
                return
        following = self.random.choices(able, [a.speed for a in able])[0]
        if following is me:
            return
        following.baton.release()
        if me is not None and not me.done:
            me.baton.acquire()


class Actor:
    """A partition, and the matrix products that it has issued."""

    def __init__(self, owner: Machine, role: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.machine, self.done, self.speed = owner, False, 1
        self.baton = threading.Semaphore(0)
        self.waits = ""
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.thread = threading.Thread(target=self._live, args=(role, args), daemon=True)

    def _live(self, role: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.baton.acquire()
        local.actor = self
        try:
            if self.machine.failure is None:
                with torch.no_grad():
                    role(*args)
                assert not self.products, "a product that nobody waits for"
        except BaseException as error:  # carried over to the caller's thread
            self.machine.failure = self.machine.failure or error
        self.done = True
        self.machine.pass_on(self)

    def wait(self, ready: Callable[[], bool] = lambda: True, what: str = "") -> None:
        self.ready, self.waits = ready, what
        self.machine.pass_on(self)
        if self.machine.failure is not None:
            raise self.machine.failure
        self.ready = lambda: True
        while self.products and self.machine.random.random() < self.machine.product_rate:
            self.products.pop(0).finish()


def turn() -> None:
    """Anything may happen before what follows."""
    actor = getattr(local, "actor", None)
    if actor is not None and actor.machine is Machine.current:
        actor.wait()


# -- memory ---------------------------------------------------------------------------------------


class Memory:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: tuple(self.data.shape))

    def index(self, at: int) -> Memory:
        assert 0 <= at < len(self.data)
        return Memory(self.data[at])

    def reshape(self, shape: Any) -> Memory:
        return Memory(self.data.view(*shape))

    def permute(self, order: Any) -> Memory:
        return Memory(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        turn()
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)

    def load(self, layout: Any) -> Tensor:
        turn()
        return self.data.clone()


class Pointer:
    """An element of a tensor, or many."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.base, self.offset + step)

    def reach(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The whole memory behind the tensor, where to, and which of them."""
        flat = self.base.as_strided(
            (self.base.untyped_storage().nbytes() // self.base.element_size(),), (1,), 0
        )
        at = torch.as_tensor(self.offset).long() + self.base.storage_offset()
        keep = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        at, keep = torch.broadcast_tensors(at, keep)
        inside = at[keep]
        assert inside.numel() == 0 or 0 <= int(inside.min()) <= int(inside.max()) < len(flat)
        return flat, at, keep


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    flat, at, keep = pointer.reach(mask)
    found = torch.where(keep, flat[torch.where(keep, at, 0)], torch.tensor(other, dtype=flat.dtype))
    return found if found.dim() else found.item()


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    flat, at, keep = pointer.reach(mask)
    flat[at[keep]] = value.to(flat.dtype).expand(at.shape)[keep]


class TensorDescriptor:
    def __init__(
        self, base: Tensor, shape: Any, strides: Any, block_shape: Any, layout: Any
    ) -> None:
        assert 1 <= len(shape) == len(strides) == len(block_shape) <= 5 and strides[-1] == 1
        assert base.data_ptr() % 16 == 0 and all(0 < n < 2**32 for n in shape)
        size = base.element_size()
        assert all(0 < s * size < 2**40 and s * size % 16 == 0 for s in strides[:-1]), strides
        self.base, self.sizes, self.strides = base, shape, strides
        self.block_shape, self.layout, self.dtype = list(block_shape), layout, base.dtype

    def read(self, place: list[int]) -> Tensor:
        """As the hardware: zeros outside, addresses modulo 2^64."""
        address = np.zeros(self.block_shape, np.uint64)
        inside = np.ones(self.block_shape, bool)
        for dim, (first, count) in enumerate(zip(place, self.block_shape, strict=True)):
            assert -(2**31) <= first < 2**31
            shape = [count if d == dim else 1 for d in range(len(place))]
            index = (np.arange(count, dtype=np.int64) + int(first)).reshape(shape)
            inside &= (index >= 0) & (index < self.sizes[dim])
            address += index.astype(np.uint64) * np.uint64(
                self.strides[dim] * self.base.element_size()
            )
        offset = torch.from_numpy(address.astype(np.int64) // self.base.element_size())
        return load(Pointer(self.base, offset), torch.from_numpy(inside))


# -- barriers, copies, products -------------------------------------------------------------------


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, count: int) -> None:
        assert self.pending >= count > 0, "more arrivals than the barrier counts"
        self.pending -= count
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


def barrier_of(memory: Memory) -> Barrier:
    data = memory.data
    while not isinstance(data, Barrier):
        assert len(data) == 1
        data = data[0]
    return data


def init(memory: Memory, count: int) -> None:
    barrier = barrier_of(memory)
    assert barrier.count == 0
    barrier.count = barrier.pending = count


def expect(memory: Memory, size: int) -> None:
    turn()
    barrier = barrier_of(memory)
    barrier.bytes += size
    barrier.arrive(1)


def arrive(memory: Memory, *, count: int = 1) -> None:
    turn()
    barrier_of(memory).arrive(count)


def wait(memory: Memory, phase: int) -> None:
    barrier = barrier_of(memory)
    assert barrier.count > 0 and phase in (0, 1)
    local.actor.wait(lambda: barrier.phase != phase, f"phase {phase} of count {barrier.count}")


def copy(desc: TensorDescriptor, place: list[int], barrier: Memory, target: Memory) -> None:
    turn()
    assert list(target.shape) == desc.block_shape and target.dtype == desc.dtype
    bar = barrier_of(barrier)
    target.data.fill_(float("nan"))

    def finish() -> None:
        target.data.copy_(desc.read(place))
        bar.bytes -= target.data.numel() * target.data.element_size()
        assert bar.bytes >= 0, "more bytes than the barrier expects"
        bar.settle()

    Machine.current.copies.append(finish)


class Product:
    """a @ b + acc, to be computed; its operands are read when it finishes."""

    def __init__(self, a: Any, b: Memory, acc: Any) -> None:
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def finish(self) -> None:
        a = self.a.data if isinstance(self.a, Memory) else self.a
        value = a.float() @ self.b.data.float()
        before = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = value if before is None else before + value


def product(a: Any, b: Memory, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
    turn()
    assert is_async and a.dtype == b.dtype
    if isinstance(a, Tensor):
        a = a.clone()
    issued = Product(a, b, acc if use_acc else None)
    local.actor.products.append(issued)
    return issued


def product_wait(pending: int, *, deps: list[Any]) -> Any:
    turn()
    products = local.actor.products
    while len(products) > pending:
        products.pop(0).finish()
    found = [d.value if isinstance(d, Product) else d for d in deps]
    assert all(x is not None for x in found), "used before it is waited for"
    return found[0] if len(found) == 1 else tuple(found)
