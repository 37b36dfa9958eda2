"""What the compilers of Triton kernels object to, for what GPU, and how they sum up."""

from __future__ import annotations

import time
from typing import Any

# bytes of shared memory that a block can have: the least of what sm_80's kernels run on, and
# sm_90's; registers of a multiprocessor
SHARED = {80: 101376, 90: 232448}
REGISTERS = 65536
# of a multiprocessor: one waits for memory while the other computes. A tile of attention fills the
# registers, and loads the next one while it computes
BLOCKS_AT_ONCE = {"attention": 1}
# rows of a product at least for the instructions of sm_90: a program that owns fewer rows or keys,
# because a head of 256 leaves no registers for more, uses those of sm_80
LEAST_ROWS = 64
# kernels that take products on tensor cores
ATTENTION = ("forward_kernel", "dkdv_kernel", "dq_kernel")


def objections(kernel: dict[str, Any]) -> list[str]:
    found = []
    if kernel["stack"] or kernel["local"]:
        found.append("spills")
    if kernel["shared"] > SHARED[kernel["capability"]]:
        found.append("takes too much shared memory")
    at_once = BLOCKS_AT_ONCE.get(kernel["op"], 2) * kernel["threads"]
    if at_once * kernel["registers"] > REGISTERS:
        found.append("takes too many registers")
    if kernel["op"] == "attention" and _without_products(kernel):
        found.append("has no product on tensor cores")
    return found


def _without_products(kernel: dict[str, Any]) -> bool:
    """Whether a kernel that takes products takes them without the tensor cores that it could."""
    counts, constants = kernel["products"], kernel["constants"]
    if kernel["kernel"] not in ATTENTION or "q" not in kernel["arguments"]:
        return False
    if kernel["arguments"]["q"] == "*fp32" and constants["PRECISION"] == "ieee":
        return False
    owned = kernel["tiles"][1 if kernel["kernel"] == "dkdv_kernel" else 0]
    hopper = kernel["capability"] == 90 and owned >= LEAST_ROWS
    return counts["wgmma.mma_async" if hopper else "mma.sync"] == 0


def summary(found: list[dict[str, Any]], since: float) -> str:
    spilled = sum(bool(kernel["stack"] or kernel["local"]) for kernel in found)
    bad = sum(bool(kernel["objections"]) for kernel in found)
    registers = max((kernel["registers"] for kernel in found), default=0)
    seconds = time.perf_counter() - since
    return (
        f"{len(found)} kernels, at most {registers} registers, {spilled} spill, "
        f"{bad} with an objection; {seconds:.0f} s"
    )
