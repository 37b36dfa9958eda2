"""token_plan and pack_documents: arrays and tensors, workers, with and without what is compiled."""

from __future__ import annotations

import threading
import time
from typing import Any

import loaders
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm import extension, packing
from fastlm.ops.embedding_gru import cpu_kernels
from fastlm.ops.embedding_gru import token_plan as module

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
built = pytest.mark.skipif(
    extension.tokens is None, reason=f"no module for loaders: {extension.tokens_unavailable}"
)


def check(plan: fastlm.TokenPlan, ids: np.ndarray) -> None:
    """Against numpy, every field."""
    unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    want = (unique, inverse, np.cumsum([0, *counts]), np.argsort(ids, axis=None, kind="stable"))
    for got, expected in zip(plan, want, strict=True):
        assert got.dtype == torch.int64
        assert got.tolist() == expected.reshape(-1).tolist()
    assert plan.counts().tolist() == counts.tolist()


@pytest.fixture(params=["module", "op", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the three ways to make a plan."""
    if request.param == "module" and extension.tokens is None:
        pytest.skip(str(extension.tokens_unavailable))
    if request.param != "module":
        monkeypatch.setattr(extension, "tokens", None)
    if request.param == "torch":
        monkeypatch.setattr(extension, "unavailable", "taken away")
    return request.param


@pytest.mark.parametrize("size", (1, 64, 65, 127, 2000, 10**6))  # marks, their edges, sorting
@pytest.mark.parametrize("count", (0, 1, 7, 500))
def test_plan(path: str, size: int, count: int) -> None:
    ids = np.random.default_rng(count).zipf(1.3, count) % size
    ids = np.minimum(ids, size - 1).astype(np.int64)
    if count:
        ids[0] = size - 1
    check(fastlm.token_plan(ids, size), ids)
    check(fastlm.token_plan(torch.from_numpy(ids), size), ids)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_and_layout(path: str, dtype: str) -> None:
    ids = np.random.default_rng(1).integers(0, 90, (6, 8)).astype(dtype)
    swapped = ids.astype(np.dtype(dtype).newbyteorder(">"))
    for array in (
        ids,
        ids[:, ::-2],
        ids.T,
        swapped,
        ids[2:3, 3].reshape(()),
        ids[:0],
        np.asfortranarray(ids),
    ):
        check(fastlm.token_plan(array, 90), np.asarray(array, dtype))
    if ids.dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8):
        check(fastlm.token_plan(torch.from_numpy(ids).t(), 90), ids.T)


BAD = [
    (np.array([[0, 5], [9, 9]]), r"ids must be in \[0, 9\), got 9 at \[1, 0\]"),
    (np.array([3, -1, 12]), r"got -1 at \[1\]"),
    (np.array([[[8, 200]]], np.uint8), r"got 200 at \[0, 0, 1\]"),
    (np.array(9), r"got 9 at \[\]"),
]


@pytest.mark.parametrize("ids, message", BAD)
def test_an_id_out_of_range(path: str, ids: np.ndarray, message: str) -> None:
    for value in (ids, torch.from_numpy(ids)):
        with pytest.raises(IndexError, match="fastlm.token_plan: .*" + message):
            fastlm.token_plan(value, 9)


def test_what_is_refused(path: str) -> None:
    for dtype in (np.float32, bool, np.complex64, "m8[s]"):
        with pytest.raises(TypeError, match="ids must be an integer array, got"):
            fastlm.token_plan(np.zeros(3, dtype), 9)
    with pytest.raises(TypeError, match="ids must be an integer tensor, got float32"):
        fastlm.token_plan(torch.zeros(3), 9)
    with pytest.raises(TypeError, match="ids must be a tensor, got list"):
        fastlm.token_plan([1, 2], 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_embeddings must be at least 0, got -1"):
        fastlm.token_plan(np.zeros(0, np.int64), -1)
    with pytest.raises(IndexError, match=r"got \S+ at \[1\]"):
        fastlm.token_plan(np.array([0, 2**63 + 1], np.uint64), 9)


@built
def test_the_module_alone_checks_as_well() -> None:
    with pytest.raises(ValueError, match="num_embeddings must be at least 0"):
        extension.tokens.plan(np.zeros(2, np.int64), -1)
    with pytest.raises(ValueError, match="above the capacity"):
        extension.tokens.first_fit(np.array([2, 4]), 3)


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(41, 9000))
@settings(max_examples=60, deadline=None)
def test_every_way_gives_the_same(ids: list[int], size: int) -> None:
    array = np.array(ids, np.int32)
    flat = torch.from_numpy(array).long()
    others = [module._plain(flat)]
    if extension.unavailable is None:
        others.append(cpu_kernels.whole_plan(flat, size))
    for other in others:
        for a, b in zip(fastlm.token_plan(array, size), other, strict=True):
            assert torch.equal(a, b)


def test_it_moves_like_a_tensor() -> None:
    plan = fastlm.token_plan(torch.tensor([3, 1, 3]), 5)
    moved = plan.to("meta", non_blocking=True)
    assert isinstance(moved, fastlm.TokenPlan) and moved.order.device.type == "meta"
    assert plan.to("cpu").inverse is plan.inverse
    if torch.cuda.is_available():
        assert all(x.is_pinned() for x in plan.pin_memory())


@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_in_the_workers_of_a_loader(start: str) -> None:
    loader = torch.utils.data.DataLoader(
        loaders.Documents(), 3, collate_fn=loaders.collate, num_workers=2,
        multiprocessing_context=start,
    )  # fmt: skip
    workers = set()
    weight, w_ih, w_hh = torch.randn(loaders.VOCAB, 4), torch.randn(18, 4), torch.randn(18, 6)
    for batch in loader:
        workers.add(batch["worker"])
        assert batch["compiled"] == (extension.tokens is not None)
        assert isinstance(batch["plan"], fastlm.TokenPlan)
        check(batch["plan"], batch["tokens"].numpy())
        planned, _ = fastlm.embedding_gru(batch["tokens"], weight, w_ih, w_hh, plan=batch["plan"])
        own, _ = fastlm.embedding_gru(batch["tokens"], weight, w_ih, w_hh)
        assert torch.equal(planned, own)
    assert workers == {0, 1}


def test_a_worker_names_the_id() -> None:
    loader = torch.utils.data.DataLoader(
        loaders.Documents(), 3, collate_fn=loaders.collate_out_of_range, num_workers=1
    )
    with pytest.raises(IndexError, match=r"ids must be in \[0, 50\), got \d+ at \[0, 0\]"):
        next(iter(loader))


@built
def test_the_gil_is_free_meanwhile() -> None:
    ids = np.random.default_rng(0).integers(0, 50000, 1 << 22)
    span: list[float] = []

    def plan() -> None:
        span.append(time.perf_counter())
        extension.tokens.plan(ids, 50000)
        span.append(time.perf_counter())

    thread = threading.Thread(target=plan)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(1e-4)
    begin, end = span
    quarter = (end - begin) / 4
    assert any(begin + quarter < tick < end - quarter for tick in ticks)


# ---- documents to rows


def pieces(lengths: list[int]) -> list[np.ndarray]:
    return [np.arange(n) + 10 * i + 1 for i, n in enumerate(lengths)]


@given(st.lists(st.integers(0, 12), max_size=40))
@settings(max_examples=40, deadline=None)
def test_first_fit(lengths: list[int]) -> None:
    array = np.array(lengths, np.int64)
    want = packing.first_fit(array, 12)
    if extension.tokens is not None:
        for a, b in zip(extension.tokens.first_fit(array, 12), want, strict=True):
            assert np.array_equal(a, b)
    packed = fastlm.pack_documents(pieces(lengths), 12, pad=-1)
    for i, document in enumerate(pieces(lengths)):
        r, s = int(packed.row[i]), int(packed.start[i])
        assert packed.tokens[r, s : s + len(document)].tolist() == document.tolist()
        assert packed.segment_ids[r, s : s + len(document)].unique().numel() == (len(document) > 0)
    assert int((packed.segment_ids > 0).sum()) == sum(lengths)
    assert torch.equal(packed.segment_ids == 0, packed.tokens == -1)
    # no document would have fitted into an earlier row than its own
    room = [12] * len(packed.tokens)
    for length, r in zip(lengths, packed.row.tolist(), strict=True):
        assert all(free < length for free in room[:r])
        room[r] -= length


def test_packed_documents_are_each_alone() -> None:
    documents = pieces([3, 7, 2, 9, 1])
    packed = fastlm.pack_documents(documents, 10)
    weight, w_ih, w_hh = torch.randn(60, 4), torch.randn(18, 4), torch.randn(18, 6)
    out, _ = fastlm.embedding_gru(
        packed.tokens, weight, w_ih, w_hh, segment_ids=packed.segment_ids, dedupe="vocab"
    )
    for document, r, s in zip(documents, packed.row, packed.start, strict=True):
        ids = torch.from_numpy(document)
        alone, _ = fastlm.embedding_gru(ids, weight, w_ih, w_hh, dedupe="vocab")
        assert torch.equal(out[r, s : s + len(document)], alone)


def test_packing_takes_and_refuses() -> None:
    mixed: list[Any] = [torch.tensor([1, 2], dtype=torch.int32), np.array([3], np.uint16)]
    assert fastlm.pack_documents(mixed, 4).tokens.tolist() == [[1, 2, 3, 0]]
    assert fastlm.pack_documents([], 4).tokens.shape == (0, 4)
    with pytest.raises(ValueError, match=r"documents\[1\] must be at most 2 long, got 3; split it"):
        fastlm.pack_documents(pieces([2, 3]), 2)
    with pytest.raises(TypeError, match=r"documents\[0\] must be of integers, got float64"):
        fastlm.pack_documents([np.zeros(2)], 2)
    with pytest.raises(ValueError, match=r"documents\[0\] must be \[\*\], got \[1, 2\]"):
        fastlm.pack_documents([np.zeros((1, 2), int)], 2)
