"""Whether Triton kernels can run in this process, found out without importing triton.

`ops/*/triton_kernels.py` import it, the first time that one of their kernels is called.
"""

from __future__ import annotations

import importlib.util
import os

import torch

#: Triton's interpreter runs kernels on the CPU, to test them; Triton reads the same variable
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

#: where tensors may be
devices = ("cpu", "cuda") if interpreted else ("cuda",)


def _objection() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # device_count asks the driver's library: it starts no CUDA context and leaves fork alone
    if not interpreted and not (torch.backends.cuda.is_built() and torch.cuda.device_count()):
        return "no GPU"
    return None


#: why Triton kernels cannot run, or None when they can
unavailable: str | None = _objection()
