"""Mends Triton's interpreter where it is wrong, as a plugin: `TRITON_INTERPRET=1 pytest -p ...`.

Of Triton 3.6, the version that the development set pins:
- a loop bound that is a tensor breaks with numpy 2.4 and later;
- `tl.dot` of bfloat16 multiplies the bit patterns;
- float32 to bfloat16 cuts instead of rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_builder = interpreter.InterpreterBuilder
_dot, _cast, _convert = _builder.create_dot, _builder.cast_impl, _builder.create_fp_to_fp
_handle = interpreter.TensorHandle


def _with_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(value: Any) -> Any:
    """float32 to the bits of bfloat16: nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(value.data, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(value.data), np.uint32(0x7FC0), nearest).astype(np.uint16)
    return _handle(data.reshape(value.data.shape), tl.bfloat16)


def _is_rounding(value: Any, to: Any) -> bool:
    return value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16


def _mend() -> None:
    interpreter._patch_lang_tensor = _with_index
    _builder.create_dot = lambda self, a, b, *rest: _dot(self, _widened(a), _widened(b), *rest)
    # the create_* of every kind of cast call cast_impl
    _builder.cast_impl = lambda self, value, to: (
        _rounded(value) if _is_rounding(value, to) else _cast(self, value, to)
    )
    _builder.create_fp_to_fp = lambda self, value, to, mode: (
        _rounded(value) if _is_rounding(value, to) else _convert(self, value, to, mode)
    )


_mend()
