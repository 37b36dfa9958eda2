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
    """[B, S, H, D] on no device: contiguous, with rows that no 16 bytes divide, or with batch
    entries 2^33 elements apart."""
    if layout == "plain":
        return torch.empty(shape, dtype=dtype, device="meta")
    if layout == "odd":
        return torch.empty(*shape[:3], shape[3] + 2, dtype=dtype, device="meta")[..., 1:-1]
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


def row_statistics_calls(kernels: Any) -> None:
    """Both passes of row statistics, recorded."""
    flag = (False, True)
    shared: dict[str, Sequence[Any]] = {
        "dtype": (torch.float32, torch.bfloat16, torch.float16),
        "classes": (50304, 1001, 500, 200, 1),
        "step": (None, 0, 2**33),
        "target": flag,
        "weight": (None, "of all", "of each"),
        "scale": (1.0, 0.5, -1.0),
        "softcap": (0.0, 30.0),
    }
    device, n = torch.device("meta"), torch.empty(3, device="meta")
    for backward in flag:
        wanted = [f"wanted{i}" for i in range(5 if backward else 4)]
        for case in pairs(shared | dict.fromkeys(wanted, flag)):
            classes, weight = case["classes"], None
            logits = torch.empty(3, classes, dtype=case["dtype"], device=device)
            if case["step"] is not None and not (backward and case["step"] == 0):
                steps = (case["step"], 1 if case["step"] else 0)
                logits = torch.empty_strided(logits.shape, steps, dtype=logits.dtype, device=device)
            target = torch.empty(3, dtype=torch.int64, device=device) if case["target"] else None
            if case["weight"] is not None:
                shape = (classes,) if case["weight"] == "of all" else (3, classes)
                weight = torch.empty(shape, device=device)
            numbers = (-100, case["scale"], case["softcap"])
            some = [n if case[name] else None for name in wanted]
            if backward:
                into = torch.empty_like(logits, memory_format=torch.contiguous_format)
                kernels.backward_into(into, logits, target, weight, n, n, tuple(some), *numbers)
            else:
                entropy, squares, total, best = some
                best = None if best is None else best.long()
                logprob = None if target is None else n
                out = (n, n, n, logprob, entropy, squares, total, total, best)
                kernels.forward(logits, target, weight, *numbers, out)


def embedding_gru_calls(kernels: Any) -> None:
    """Both passes of the recurrence, recorded."""
    flag = (False, True)
    options: dict[str, Sequence[Any]] = {
        "dtype": (torch.float32, torch.bfloat16, torch.float16),
        "batch": (3, 64, 256),
        "hidden": (1, 19, 40, 512),
        "shared": flag,
        "reset": flag,
        "bias": flag,
        "h0": flag,
        "batch_first": flag,
        "reverse": flag,
    }
    for case in pairs(options):
        batch, hidden = case["batch"], case["hidden"]
        tokens, width = 2 * batch, 3 * hidden
        with torch.device("meta"):
            table, w_hh = (
                torch.empty(tokens, width),
                torch.empty(width, hidden, dtype=case["dtype"]),
            )
            index = torch.empty(tokens, dtype=torch.int64) if case["shared"] else None
            reset = torch.empty(tokens, dtype=torch.uint8) if case["reset"] else None
            b_hh = torch.empty(width) if case["bias"] else None
            h0 = torch.empty(batch, hidden) if case["h0"] else None
        layout = (batch, case["batch_first"], case["reverse"])
        output, h_n, gates = kernels.forward(table, index, reset, w_hh, b_hh, h0, *layout)
        saved = (torch.empty_like(output), h_n, index, tokens, reset, w_hh, h0, output, gates)
        kernels.backward(*saved, *layout)


def decode_calls(kernels: Any, options_of: Any) -> None:
    """Dense and paged caches of any strides, recorded."""
    flag = (False, True)
    options: dict[str, Sequence[Any]] = {
        "way": (*BITS[16], *BITS[32]),
        "sizes": [(64, 64), (128, 128), (256, 256), (80, 48), (33, 16)],
        # queries and heads: tiles of 16, 32 and 64 rows
        "rows": ((1, 32, 8), (8, 32, 8), (9, 32, 2), (1, 16, 16)),
        "keys": (64, 4096, 65536),
        "layout": ("plain", "odd", "far"),
        "paged": flag,
        "pad": flag,
        "row": flag,
        "left": flag,
        "right": flag,
        "softcap": flag,
        "slopes": (None, 1, 2),
        "sink": flag,
    }
    for case in pairs(options):
        (dtype, way), (size, size_v) = case["way"], case["sizes"]
        queries, heads, key_heads = case["rows"]
        kernels.precision = lambda _, way=way: way
        slots = (4096, 16) if case["paged"] else (2, case["keys"])
        with torch.device("meta"):
            q = torch.empty(2, queries, heads, size, dtype=getattr(torch, dtype))
            k, v = (tensor((*slots, key_heads, n), q.dtype, case["layout"]) for n in (size, size_v))
            ints = torch.empty(2, dtype=torch.int32)
            table = torch.empty(2, case["keys"] // 16, dtype=torch.int32) if case["paged"] else None
            slopes = None if case["slopes"] is None else torch.empty(2, heads)[: case["slopes"]]
            slopes = slopes[0] if case["slopes"] == 1 else slopes
            sink = torch.empty(heads) if case["sink"] else None
        given = options_of(
            table, ints if case["row"] and table is None else None, ints if case["pad"] else None,
            slopes, sink, 0.1, 100 if case["left"] else -1, 0 if case["right"] else -1,
            30.0 if case["softcap"] else 0.0, 0,
        )  # fmt: skip
        kernels.forward(q, k, v, ints, given)
