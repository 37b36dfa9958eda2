"""Which calls of the Triton kernels are compiled: every value of every option, and every pair.

What a kernel is compiled for are its dtypes, head sizes, tensors that may be missing, alignment and
flags; all of them at once are too many. `pairs` takes so few calls that each two values of two
options meet in one of them, of each entry of the tables.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]
TRIES = 60  # cases drawn for each that is taken


def pairs(
    options: dict[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda _: True
) -> list[Case]:
    """Cases in which each two values of two options meet, where a case with both is allowed."""
    draw = random.Random(0)

    def of(case: Case) -> set[Any]:
        return set(itertools.combinations(sorted((n, repr(v)) for n, v in case.items()), 2))

    def drawn(fixed: Case) -> Case | None:
        for _ in range(200):
            case = {n: fixed.get(n, draw.choice(list(v))) for n, v in options.items()}
            if allowed(case):
                return case
        return None

    missing = {}
    for one, two in itertools.combinations(sorted(options), 2):
        for a, b in itertools.product(options[one], options[two]):
            missing[((one, repr(a)), (two, repr(b)))] = {one: a, two: b}
    found = []
    while missing:
        key, fixed = next(iter(missing.items()))
        tried = [case for case in (drawn(fixed) for _ in range(TRIES)) if case is not None]
        if not tried:
            del missing[key]  # not allowed together
            continue
        best = max(tried, key=lambda case: len(of(case) & missing.keys()))
        found.append(best)
        for pair in of(best):
            missing.pop(pair, None)
    return found


# head sizes of q and v by entry of the table; heads of q and of k
SIZES = {
    64: [(64, 64), (48, 31)],
    128: [(128, 128), (96, 64)],
    256: [(256, 256), (192, 128)],
}
HEADS = [(16, 16), (32, 8)]
KINDS = ("causal", "band", "scores", "all")
# the dtypes of an entry, and how their products are taken
BITS = {
    16: (("bfloat16", "ieee"), ("float16", "ieee")),
    32: (("float32", "ieee"), ("float32", "tf32")),
}
BROADCAST = ((), (0, 1), (0, 1, 2, 3))  # dimensions in which a bias may have one element
ROWS = 1024


def _kind(case: Case) -> str:
    if case["bias"] is not None or case["dropout"]:
        return "all"
    if case["softcap"] or case["intervals"] or case["slopes"]:
        return "scores"
    return "band" if case["left"] else "causal"


def most(size: int, kind: str, way: tuple[str, str]) -> Case:
    """Everything that a call of this kind may ask for, densely."""
    scores = kind in ("scores", "all")
    return {
        "way": way,
        "sizes": (size, size),
        "heads": (16, 8),
        "layout": "plain",
        "keys": ROWS,
        "packed": kind == "band",
        "left": kind != "causal",
        "right": True,
        "sink": True,
        "dlse": True,
        "softcap": scores,
        "intervals": scores,
        "slopes": "needed" if scores else None,
        "bias": () if kind == "all" else None,
        "dropout": kind == "all",
    }


def attention_cases(size: int, bits: int, kind: str) -> list[Case]:
    """Of one entry of the table: the most and the least of each dtype, and pairs of options."""
    flag = (False, True)
    scores = kind in ("scores", "all")
    some = flag if scores else (False,)
    options: dict[str, Sequence[Any]] = {
        "way": BITS[bits],
        "sizes": SIZES[size],
        "heads": HEADS,
        "layout": ("plain", "far"),
        "keys": (ROWS, 1),
        "packed": flag,
        "left": {"causal": (False,), "band": (True,)}.get(kind, flag),
        "right": flag,
        "sink": flag,
        "dlse": flag,
        "softcap": some,
        "intervals": some,
        "slopes": (None, "given", "needed") if scores else (None,),
        "bias": (None, *BROADCAST) if kind == "all" else (None,),
        "dropout": flag if kind == "all" else (False,),
    }
    ends = [most(size, kind, way) for way in BITS[bits]]
    ends += [{**case, "packed": not case["packed"]} for case in ends]
    return ends + pairs(options, lambda case: _kind(case) == kind)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """[B, S, H, D] on no device, contiguous or with batch entries 2^33 elements apart."""
    if layout == "plain":
        return torch.empty(shape, dtype=dtype, device="meta")
    _, rows, heads, size = shape
    steps = (2**33, size, rows * size, 1)
    return torch.empty_strided(shape, steps, dtype=dtype, device="meta")


def attention_call(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], list[Any], list[bool]]:
    """q, k and v; the arguments behind them; the gradients that are asked for."""
    heads, key_heads = case["heads"]
    size, size_v = case["sizes"]
    dtype, keys = getattr(torch, case["way"][0]), case["keys"]
    batch = 1 if case["packed"] else 2
    q = tensor((batch, ROWS, heads, size), dtype, case["layout"])
    k = tensor((batch, keys, key_heads, size), dtype, case["layout"])
    v = tensor((batch, keys, key_heads, size_v), dtype, case["layout"])
    with torch.device("meta"):
        starts = torch.empty(5, dtype=torch.int32) if case["packed"] else None
        lo = torch.empty(1, 1, ROWS, dtype=torch.int32) if case["intervals"] else None
        slopes = None if case["slopes"] is None else torch.empty(heads)
        sink = torch.empty(heads) if case["sink"] else None
        bias = None
        if case["bias"] is not None:
            shape = (batch, heads, ROWS, keys)
            bias = torch.empty([1 if d in case["bias"] else n for d, n in enumerate(shape)])
        seed = torch.empty((), dtype=torch.int64) if case["dropout"] else None
    numbers = (
        0.125,
        100 if case["left"] else -1,
        0 if case["right"] else -1,
        30.0 if case["softcap"] else 0.0,
        0.1 if case["dropout"] else 0.0,
    )
    given = [lo, lo, starts, starts, slopes, sink, bias, seed, *numbers]
    return (q, k, v), given, [case["slopes"] == "needed", True, bias is not None]
