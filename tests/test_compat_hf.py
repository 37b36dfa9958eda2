"""fastlm.compat.hf: the call of transformers' attention layers, against scores written out."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from test_attention import band, plain
from torch import Tensor, nn

from fastlm import testing
from fastlm.compat import hf


class Layer(nn.Module):
    is_causal = True


def expected(q: Tensor, k: Tensor, v: Tensor, *extra: Any, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return plain(q, k, v, *extra, **options)[0]


PADDED = (torch.arange(12) >= torch.tensor([0, 5])[:, None])[:, None, None] & band(9, 12, right=0)
# without a mask query i stands on key i: the rest of the keys is what a static cache has not filled
TOP = torch.cat((band(9, 9, right=0), torch.zeros(9, 3, dtype=torch.bool)), 1)
WINDOW = torch.cat((band(9, 9, 2, 0), torch.zeros(9, 3, dtype=torch.bool)), 1)
BIAS = torch.randn(1, 4, 9, 12)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"keep": TOP}),
    "not causal": ({"is_causal": False}, {}),
    "window": ({"sliding_window": 3}, {"keep": WINDOW}),
    "softcap": (
        {"softcap": 2.0, "scaling": 0.5},
        {"softcap": 2.0, "scale": 0.5, "keep": TOP},
    ),
    "mask": ({"attention_mask": PADDED, "sliding_window": 2}, {"keep": PADDED}),
    "mask and softcap": (
        {"attention_mask": PADDED, "softcap": 1.0},
        {"keep": PADDED, "softcap": 1.0},
    ),
    "longer mask": (
        {"attention_mask": torch.nn.functional.pad(PADDED, (0, 5), value=True)},
        {"keep": PADDED},
    ),
    "bias": ({"position_bias": BIAS}, {"keep": TOP, "bias": BIAS}),
    "bias, not causal": ({"position_bias": BIAS, "is_causal": False}, {"bias": BIAS}),
    "bias and mask": (
        {"position_bias": BIAS, "attention_mask": PADDED},
        {"keep": PADDED, "bias": BIAS},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sink", [False, True])
def test_as_written_out(name: str, sink: bool) -> None:
    given, want = CASES[name]
    given = {"attention_mask": None} | given
    args = [torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)]
    args += [torch.randn(4)] if sink else []

    def ours(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None) -> Tensor:
        out, weights = hf.attention_forward(Layer(), q, k, v, s_aux=s_aux, position_ids=1, **given)
        assert weights is None and out.is_contiguous()
        return out

    def theirs(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None) -> Tensor:
        keep = want.get("keep", torch.ones(9, 12, dtype=torch.bool))
        alive = keep.any(-1, keepdim=True) | sink
        out = expected(q, k, v, None, s_aux, **(want | {"keep": keep | ~alive}))
        return out.where(alive.expand(2, 1, 9, 1)[:, 0, :, None], 0.0)

    testing.check(ours, theirs, args)


@pytest.mark.parametrize("name", hf._NOT_WRITTEN)
def test_what_is_not_written_is_refused(name: str) -> None:
    """transformers' own "sdpa" has it in its mask, or computes something else."""
    q = torch.randn(1, 2, 3, 8)
    given = {name: torch.ones(2)}
    with pytest.raises(NotImplementedError, match=f"Layer passes {name}, .*'eager'"):
        hf.attention_forward(Layer(), q, q, q, None, **given)


def test_one_query_sees_every_key() -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8)
    got = hf.attention_forward(Layer(), q, k, k, None)[0]
    torch.testing.assert_close(got, expected(q, k, k))
    got = hf.attention_forward(Layer(), q, k, k, None, sliding_window=2)[0]
    torch.testing.assert_close(got, expected(q, k[:, :, -2:], k[:, :, -2:]))


def test_packed_sequences() -> None:
    q, k = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8)
    starts = torch.tensor([0, 4, 11], dtype=torch.int32)
    got = hf.attention_forward(
        Layer(), q, k, k, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=7,
        max_length_k=7,
    )[0]  # fmt: skip
    for a, b in ((0, 4), (4, 11)):
        part = (q[:, :, a:b], k[:, :, a:b], k[:, :, a:b])
        want = expected(*part, keep=band(b - a, b - a, right=0))
        torch.testing.assert_close(got[:, a:b], want)
    assert math.isfinite(float(got.sum()))


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into stand-ins of the two registries."""

    class Registry(dict[str, Any]):
        def register(self, name: str, value: Any) -> None:
            self[name] = value

    package, masking = types.ModuleType("transformers"), types.ModuleType("masking_utils")
    package.AttentionInterface = Registry()  # type: ignore[attr-defined]
    package.AttentionMaskInterface = Registry()  # type: ignore[attr-defined]
    masking.sdpa_mask = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", masking)
    hf.register()
    assert package.AttentionInterface == {"fastlm": hf.attention_forward}
    assert package.AttentionMaskInterface == {"fastlm": masking.sdpa_mask}
