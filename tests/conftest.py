"""Fixtures of all tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of few logits take the way of large ones too."""
    from fastlm import dispatch

    monkeypatch.setattr(dispatch, "direct", lambda *_: False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN inside the test: an element that no kernel wrote shows up."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def _peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that `call` holds at a time."""
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    return _peak_bytes
