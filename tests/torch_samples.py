"""PyTorch's samples of its modules, and layouts of a tensor to try them in."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from collections.abc import Iterator

import torch

if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
    # torch's helpers import it for a base class of test cases that is not used here
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules["expecttest"] = stand_in

from torch.testing._internal import common_modules as torch_modules  # noqa: E402
from torch.testing._internal.common_utils import gradcheck, gradgradcheck  # noqa: E402

__all__ = ["gradcheck", "gradgradcheck", "strided_variants", "torch_modules"]


def strided_variants(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same values: alternate elements of a larger tensor, and a transposed copy."""
    wide = torch.zeros(*value.shape, 2, dtype=value.dtype)
    wide[..., 0] = value.detach()
    yield wide[..., 0].requires_grad_(value.requires_grad)
    if value.dim() > 1:
        turned = value.detach().transpose(0, 1).contiguous().transpose(0, 1)
        yield turned.requires_grad_(value.requires_grad)
