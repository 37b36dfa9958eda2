"""The CUDA kernels of the GRU on a GPU, each way of exchanging the state, against float64.

`make gpu` runs these. Without a GPU the same kernels run in test_emulated_gru.py.
"""

from __future__ import annotations

import pytest
import torch
from gru_cases import case, check_close, run, truth
from torch import Tensor

from fastlm.ops.embedding_gru import cuda_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda_kernels.unavailable is not None,
        reason=f"no CUDA device, or: {cuda_kernels.unavailable}",
    ),
]
KERNELS = [(1, "grid"), (2, "grid"), (3, "grid"), (1, "clusters"), (3, "clusters")]
each_kernel = pytest.mark.parametrize("parts, exchange", KERNELS)


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Clusters where the test says so, and not elsewhere; a size that the device refuses skips."""
    exchange = request.getfixturevalue("exchange")
    real = cuda_kernels._objection

    def objection(hidden: int, parts: int, clusters: bool, device: torch.device) -> str | None:
        reason = real(hidden, parts, exchange == "clusters", device)
        if reason:
            pytest.skip(reason)
        return None if exchange == "clusters" else "not wanted here"

    monkeypatch.setattr(cuda_kernels, "_objection", objection)


@each_kernel
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("b, t, h", [(1, 1, 1), (11, 37, 21), (64, 50, 256)])
def test_matches_float64(
    parts: int, exchange: str, reverse: bool, batch_first: bool, b: int, t: int, h: int
) -> None:
    args = case(b, t, h, parts=parts, device="cuda")
    got = run(args, parts, batch_first, reverse)
    check_close(got, truth(args, batch_first, reverse, got), parts)


@each_kernel
@pytest.mark.parametrize("h", (250, 300, 512, 520, 768, 1024, 1030, 2048))
def test_every_tiling(parts: int, exchange: str, h: int) -> None:
    args = case(24, 12, h, parts=parts, device="cuda")
    got = run(args, parts)
    check_close(got, truth(args, like=got), parts)


@each_kernel
def test_a_batch_larger_than_the_device(parts: int, exchange: str) -> None:
    """Bitwise what each part of the batch gives alone."""
    args = case(3000, 3, 64, parts=parts, device="cuda")
    output = run(args, parts)[0].view(3000, 3, -1)
    few = slice(1490, 1501)
    alone = {**args, "batch": 11, "h0": args["h0"][few]}
    for name in ("index", "reset"):
        alone[name] = args[name].view(3000, 3)[few].reshape(-1)
    assert torch.equal(run(alone, parts)[0].view(11, 3, -1), output[few])


@each_kernel
def test_again_and_on_another_stream_to_the_bit(parts: int, exchange: str) -> None:
    args = case(40, 200, 320, parts=parts, device="cuda")
    first = run(args, parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(args, parts)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@each_kernel
def test_a_nan_stays_in_its_sequence(parts: int, exchange: str) -> None:
    clean = case(9, 20, 40, parts=parts, rows=180, resets=False, device="cuda")
    clean["index"] = torch.arange(180, device="cuda")
    dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in clean.items()}
    dirty["h0"][1, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    dirty["table"][20 * 5 + 1] = float("nan")
    a, b = run(clean, parts), run(dirty, parts)
    kept = [0, 2, 3, 4, 6, 7, 8]
    for x, y in zip(a[:6], b[:6], strict=True):
        assert torch.equal(x.view(9, -1)[kept], y.view(9, -1)[kept])
    assert bool(b[0].view(9, 20, -1)[1].isnan().all())
