"""One place decides which backend runs, and can say why."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlm
from fastlm import dispatch

ROOT = Path(__file__).resolve().parent.parent
X = torch.zeros(3)


@pytest.fixture
def op() -> Iterator[str]:
    """The name of an op that no one has registered yet."""
    name = "an_op_of_this_test"
    yield name
    dispatch._OPS.pop(name, None)
    dispatch._usual.clear()


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    """These tests hold whatever FASTLM_BACKEND the suite runs under."""
    with fastlm.use_backend(None):
        yield


def returns(name: str) -> Any:
    return lambda *args: name


def chosen(op: str, which: str = "forward", **named: Any) -> str:
    return dispatch.select(op, which, named or {"x": X})()


def test_first_in_the_order_runs_whatever_the_order_of_registration(op: str) -> None:
    for name in reversed(dispatch.BACKENDS):
        dispatch.register(op, name, returns(name))
        assert chosen(op) == name


def test_unavailable_and_refusing_backends_are_passed_over(op: str) -> None:
    def small_only(x: torch.Tensor) -> str | None:
        return "takes at most 2 elements" if x.numel() > 2 else None

    dispatch.register(op, "cuda", returns("cuda"), unavailable="no GPU")
    dispatch.register(op, "cpu", returns("cpu"), refuses=small_only)
    dispatch.register(op, "reference", returns("reference"))
    assert chosen(op, x=X[:2]) == "cpu"
    assert chosen(op, x=X) == "reference"


def test_a_backend_of_another_device_is_passed_over(op: str) -> None:
    dispatch.register(op, "triton", returns("triton"), devices=("cuda",))
    dispatch.register(op, "reference", returns("reference"))
    assert chosen(op) == "reference"


def test_forward_and_backward_are_chosen_apart(op: str) -> None:
    dispatch.register(op, "cpu", returns("cpu"))
    dispatch.register(op, "reference", returns("f"), returns("b"))
    assert (chosen(op), chosen(op, "backward")) == ("cpu", "b")


def test_an_unproven_kernel_runs_only_when_forced(op: str) -> None:
    dispatch.register(op, "cuda", returns("cuda"), devices=("cpu",), proven=False)
    dispatch.register(op, "reference", returns("reference"))
    assert chosen(op) == "reference"
    assert fastlm.backends()[op]["cuda"] == dispatch.NOT_PROVEN
    assert dispatch.ready(op) == ["cuda", "reference"]
    with fastlm.use_backend("cuda"):
        assert chosen(op) == "cuda"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"unavailable": "no compiler"}, "no compiler"),
        ({"refuses": lambda x: "x is too small"}, "x is too small"),
        ({"devices": ("cuda",)}, "does not run on cpu"),
        (None, "not written"),
    ],
)
def test_forcing_raises_with_the_reason(op: str, options: dict[str, Any] | None, reason: str):
    dispatch.register(op, "reference", returns("reference"))
    if options is not None:
        dispatch.register(op, "cpu", returns("cpu"), **options)
    with fastlm.use_backend("cpu"), pytest.raises(RuntimeError, match=f"{op}: .*\n  cpu: {reason}"):
        chosen(op)


def test_no_backend_left_names_every_reason(op: str) -> None:
    dispatch.register(op, "cpu", returns("cpu"), unavailable="no compiler")
    with pytest.raises(RuntimeError) as caught:
        chosen(op, "backward")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"fastlm.{op}: no backend takes this backward call"
    assert "  cpu: no compiler" in lines and "  reference: not written" in lines


def test_use_backend_is_undone_after_an_exception_and_nests() -> None:
    with fastlm.use_backend("reference"):
        with pytest.raises(KeyError), fastlm.use_backend("cpu"):
            raise KeyError
        assert dispatch._forced == "reference"
        with fastlm.use_backend(None):
            assert dispatch._forced is None
        assert dispatch._forced == "reference"
    assert dispatch._forced is None


def test_blocks_of_use_backend_may_overlap() -> None:
    """As those of two threads do: what is asked for afterwards is what was before."""
    first, second = fastlm.use_backend("cpu"), fastlm.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch._forced == "reference"
    second.__exit__(None, None, None)
    assert dispatch._forced is None


def test_use_backend_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be one of cuda, .*got 'fast'"):
        with fastlm.use_backend("fast"):
            pass
    assert dispatch._forced is None


def test_explain_runs_the_call_and_keeps_every_answer(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.register(op, "cpu", returns("cpu"), refuses=lambda x: "odd sizes")
    dispatch.register(op, "reference", returns("reference"))
    calls = []

    def public(x: torch.Tensor) -> None:
        calls.append(chosen(op, x=x))

    monkeypatch.setattr(fastlm, op, public, raising=False)
    monkeypatch.setattr(fastlm, "__all__", [*fastlm.__all__, op])
    (answer,) = fastlm.explain(op, X)
    assert calls == ["reference"] and answer.chosen == "reference"
    assert answer.answers["cpu"] == "odd sizes" and answer.answers["triton"] == "not written"
    assert "cpu        odd sizes" in str(answer) and "reference  runs" in str(answer)
    with fastlm.use_backend("cpu"):
        assert fastlm.explain(op, X)[0].chosen is None  # explained, not raised
    assert dispatch._here.trace is None


def test_explain_is_the_call_itself_and_nobody_elses(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the caller's mode of autograd, which can decide who runs; other threads are not heard."""
    dispatch.register(op, "reference", returns("reference"))
    modes = []

    def public(x: torch.Tensor) -> None:
        other = threading.Thread(target=chosen, args=(op,))
        other.start()
        other.join()
        modes.append(torch.is_grad_enabled())
        chosen(op, x=x)

    monkeypatch.setattr(fastlm, op, public, raising=False)
    monkeypatch.setattr(fastlm, "__all__", [*fastlm.__all__, op])
    assert len(fastlm.explain(op, X)) == 1
    with torch.no_grad():
        assert len(fastlm.explain(op, X)) == 1
    assert modes == [True, False]


def test_explain_says_where_there_is_nothing_to_choose() -> None:
    assert str(fastlm.explain("kl_estimate", X, X)) == "plain PyTorch: no op of fastlm runs"


def test_explain_passes_on_what_the_call_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def public() -> None:
        raise RuntimeError("of its own")

    monkeypatch.setattr(fastlm, "broken", public, raising=False)
    monkeypatch.setattr(fastlm, "__all__", [*fastlm.__all__, "broken"])
    with pytest.raises(RuntimeError, match="of its own"):
        fastlm.explain("broken")
    with pytest.raises(ValueError, match="must be a public function of fastlm, got 'nothing'"):
        fastlm.explain("nothing")
    assert dispatch._here.trace is None


def test_backends_prints_a_table_with_long_reasons_below(op: str) -> None:
    dispatch.register(op, "cpu", returns("cpu"), unavailable="the compiler was not found")
    dispatch.register(op, "reference", returns("reference"))
    report = fastlm.backends()
    assert report[op]["reference"] == "ready" and report[op]["triton"] == "-"
    text = str(report)
    row = next(line for line in text.splitlines() if line.startswith(op))
    number = next(word for word in row.split() if word.startswith("["))
    assert f"{number} the compiler was not found" in text.splitlines()


def test_every_op_has_a_backend_that_runs_anywhere() -> None:
    for name, states in fastlm.backends().items():
        assert states["reference"] == "ready" or states["torch"] == "ready", name


FROM_ENVIRONMENT = """
import importlib, os
os.environ["FASTLM_BACKEND"] = "reference"
from fastlm import dispatch
print(dispatch._forced)
os.environ["FASTLM_BACKEND"] = "fast"
try:
    importlib.reload(dispatch)
except ValueError as error:
    print(error)
"""


def test_the_environment_forces_a_backend_or_says_what_it_may_be() -> None:
    run = [sys.executable, "-c", FROM_ENVIRONMENT]
    result = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "reference",
        "FASTLM_BACKEND must be one of cuda, triton, cpu, torch, reference, got 'fast'",
    ]
