"""fastlm.decode_attention: against scores written out, row by row, in every form of cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.ops.decode_attention import reference

BACKENDS = dispatch.ready("decode_attention")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# the kernels sum in float32
RUNS = [(b, d) for b in BACKENDS for d in DTYPES if (b, d) != ("cpu", torch.float64)]
NEG = -math.inf


def ints(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


def plain_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int = 0,
    left: int = -1,
    right: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One row: q [Sq, H, D] over its keys [n, Hk, D], the whole matrix of scores."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, keys = s.shape[-2:]
    ahead = torch.arange(keys) - (torch.arange(rows)[:, None] + keys - rows)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        s = s - slopes[:, None, None] * ahead.abs()
    keep = (torch.arange(keys) >= start).expand(rows, keys)
    if left >= 0:
        keep = keep & (ahead >= -left)
    if right >= 0:
        keep = keep & (ahead <= right)
    s = s.masked_fill(~keep, NEG)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(-1, rows, 1)], -1)
    lse = s.logsumexp(-1)
    p = s.softmax(-1).masked_fill(lse[..., None] == NEG, 0.0)[..., :keys]
    return (p.to(v.dtype) @ v).transpose(0, 1), lse


class Cache:
    """A case: lengths, new keys, and the caches in one of their forms.

    The keys of each row are made dense first; slots that no row uses are NaN.
    """

    def __init__(
        self,
        lengths: list[int],
        new: int = 0,
        *,
        rows: int = 1,
        heads: tuple[int, int] = (4, 2),
        sizes: tuple[int, int] = (8, 8),
        slots: int = 0,
        block_size: int = 0,
        indexed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, (h, hk), (d, dv) = len(lengths), heads, sizes
        self.lengths, self.new, self.dtype = lengths, new, dtype
        most = max([n + new for n in lengths], default=0)
        slots = slots or max(most, 1)
        self.q = torch.randn(batch, rows, h, d).to(dtype)
        self.dense = [[torch.randn(n + new, hk, x).to(dtype) for x in (d, dv)] for n in lengths]
        self.options: dict[str, Any] = {}
        if new:
            for i, name in enumerate(("k_new", "v_new")):
                parts = [dense[i][n:] for dense, n in zip(self.dense, lengths, strict=True)]
                self.options[name] = (
                    torch.stack(parts) if parts else self.q.new_empty(0, new, hk, d)
                )
        if block_size:
            self._paged(block_size, -(-slots // block_size), hk, sizes)
        else:
            self._contiguous(slots, hk, sizes, indexed)

    def _contiguous(self, slots: int, hk: int, sizes: tuple[int, int], indexed: bool) -> None:
        batch = len(self.lengths)
        index = torch.randperm(batch + 2)[:batch] if indexed else torch.arange(batch)
        if indexed:
            self.options["cache_batch_idx"] = index.int()
        shape = (batch + 2 * indexed, slots, hk)
        self.k, self.v = (torch.full((*shape, n), math.nan, dtype=self.dtype) for n in sizes)
        for row, n, dense in zip(index.tolist(), self.lengths, self.dense, strict=True):
            self.k[row, :n], self.v[row, :n] = dense[0][:n], dense[1][:n]
        self.places = [[(row, j) for j in range(slots)] for row in index.tolist()]

    def _paged(self, size: int, blocks: int, hk: int, sizes: tuple[int, int]) -> None:
        batch = len(self.lengths)
        total = batch * blocks + 3
        table = torch.randperm(total)[: batch * blocks].view(batch, blocks)
        self.k, self.v = (
            torch.full((total, size, hk, n), math.nan, dtype=self.dtype) for n in sizes
        )
        self.places = [[(int(b), j) for b in row for j in range(size)] for row in table]
        for row, n in enumerate(self.lengths):
            for position in range(n):
                at = self.places[row][position]
                for cache, dense in zip((self.k, self.v), self.dense[row], strict=True):
                    cache[at] = dense[position]
        # blocks that are not used yet may hold anything
        table = table.int()
        for row, n in enumerate(self.lengths):
            table[row, -(-(n + self.new) // size) :] = -7
        self.options["block_table"] = table

    def new_keys(self) -> tuple[Tensor, Tensor]:
        return self.options["k_new"], self.options["v_new"]

    def run(self, k: Tensor | None = None, v: Tensor | None = None, **extra: Any) -> Any:
        """Out and lse, on copies of the caches; `written` keeps them."""
        k = self.k.clone() if k is None else k
        v = self.v.clone() if v is None else v
        self.written = k, v
        given = {"return_lse": True, **self.options, **extra}
        return fastlm.decode_attention(self.q, k, v, ints(self.lengths), **given)

    def want(self, double: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        per_row = {n: options.pop(n) for n in ("start", "slopes") if n in options}
        for row, (k, v) in enumerate(self.dense):
            own = dict(options)
            if "start" in per_row:
                own["start"] = per_row["start"][row]
            if "slopes" in per_row:
                slopes = per_row["slopes"]
                own["slopes"] = slopes if slopes.dim() == 1 else slopes[row]
            if double:
                own = {n: x.double() if isinstance(x, Tensor) else x for n, x in own.items()}
            tensors = [x.double() if double else x for x in (self.q[row], k, v)]
            out, lse = plain_row(*tensors, **own)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)


def check(case: Cache, given: dict[str, Any] | None = None, **options: Any) -> None:
    """Ours on the caches against `plain_row` on the dense keys, by the rule of `testing`."""
    given = given or {}

    def ours(marker: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(**given)

    def theirs(marker: Tensor) -> tuple[Tensor, Tensor]:
        return case.want(double=marker.dtype == torch.float64, **options)

    testing.check(ours, theirs, [torch.zeros(1, dtype=case.dtype)])
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    out, lse = case.run(**given)
    assert out.dtype == case.dtype and lse.dtype == wide


def check_written(case: Cache) -> None:
    """The new keys stand where they belong, and every other slot has its old bits."""
    k, v = case.k.clone(), case.v.clone()
    for places, n, dense in zip(case.places, case.lengths, case.dense, strict=True):
        for j in range(n, n + case.new):
            k[places[j]], v[places[j]] = dense[0][j], dense[1][j]
    for got, want in zip(case.written, (k, v), strict=True):
        assert torch.equal(*(x.contiguous().view(torch.uint8) for x in (got, want)))


LENGTHS = [0, 1, 3, 37, 300]
FORMS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "larger": {"slots": 321},
    "indexed": {"indexed": True, "slots": 311},
    "paged-1": {"block_size": 1},
    "paged-16": {"block_size": 16},
    "paged-7": {"block_size": 7, "slots": 340},
    "paged-512": {"block_size": 512},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("backend, dtype", RUNS)
def test_forms(backend, dtype, form, new, poisoned):
    """Lengths per row, 0 among them; unused slots hold NaN; appended keys take part."""
    with fastlm.use_backend(backend):
        for rows in (1, 3):
            case = Cache(LENGTHS, new, rows=rows, dtype=dtype, **FORMS[form])
            check(case)
            check_written(case)


HEADS = [(1, 1), (3, 3), (6, 3), (8, 1), (5, 1), (12, 2), (32, 8)]
SIZES = [(1, 1), (8, 5), (59, 59), (64, 64), (80, 33), (128, 128), (256, 256)]


@pytest.mark.parametrize("rows", [1, 2, 5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_sizes(backend, dtype, rows, poisoned):
    with fastlm.use_backend(backend):
        for heads in HEADS:
            check(Cache([70, 17], rows, rows=rows, heads=heads, dtype=dtype))
        for sizes in SIZES:
            check(Cache([70, 17], rows, rows=rows, sizes=sizes, dtype=dtype))


MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"causal": False}, {"right": -1}),
    "window": ({"window": (4, 2), "causal": False}, {"left": 4, "right": 2}),
    "causal-window": ({"window": (3, None)}, {"left": 3}),
    "own-key": ({"window": (0, 0)}, {"left": 0}),
    "softcap": ({"softcap": 1.5, "scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_size", [0, 5])
@pytest.mark.parametrize("backend, dtype", RUNS)
def test_masks(backend, mask, dtype, block_size, poisoned):
    """More queries than keys in two rows: those without keys give 0 and -inf."""
    given, options = MASKS[mask]
    with fastlm.use_backend(backend):
        case = Cache([0, 2, 40, 290], rows=4, block_size=block_size, dtype=dtype)
        check(case, given, **options)
        if "window" not in given or given.get("causal", True):
            out, lse = case.run(**given)
            empty = torch.tensor([4, 2 if mask != "full" else 0, 0, 0])
            for row, count in enumerate(empty.tolist()):
                assert bool((out[row, :count] == 0).all() & (lse[row, :, :count] == NEG).all())


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("backend, dtype", RUNS)
def test_every_option_at_once(backend, dtype, block_size, batched, poisoned):
    slopes = torch.rand(4, 4) if batched else torch.rand(4)
    sink, pad = torch.randn(4), [0, 3, 30, 1]
    given = {"alibi_slopes": slopes, "sink": sink, "cache_leftpad": ints(pad), "softcap": 2.0}
    given |= {"window": (50, 1), "causal": False, "scale": 0.3}
    options = {"slopes": slopes, "sink": sink, "start": pad, "softcap": 2.0, "left": 50}
    with fastlm.use_backend(backend):
        case = Cache([0, 9, 44, 280], 2, rows=3, block_size=block_size, dtype=dtype)
        check(case, given, **options, right=1, scale=0.3)
        # a row whose every key is padding has the sink alone
        out, lse = case.run(**{**given, "cache_leftpad": ints([2, 0, 99, 0])})
        assert bool((out[[0, 2]] == 0).all())
        torch.testing.assert_close(lse[2], sink[:, None].expand(4, 3).to(lse.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_in_the_dtype_of_q(backend):
    with fastlm.use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            sink = torch.randn(4).to(dtype)
            check(Cache([30, 5], dtype=dtype), {"sink": sink}, sink=sink)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention_of_one_row(backend):
    """Same as the docstring says."""
    q, cache = torch.randn(1, 3, 4, 16), torch.randn(2, 1, 90, 2, 16)
    with fastlm.use_backend(backend):
        got = fastlm.decode_attention(q, *cache, 77, return_lse=True)
    want = fastlm.attention(q, *cache[:, :1, :77], mask="causal", return_lse=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_without_its_dimension(backend):
    case = Cache([5, 40], 1)
    with fastlm.use_backend(backend):
        want, want_lse = case.run()
        case.q = case.q[:, 0]
        case.options |= {name: case.options[name][:, 0] for name in ("k_new", "v_new")}
        got, lse = case.run()
        assert torch.equal(got, want[:, 0]) and torch.equal(lse, want_lse[..., 0])
        assert torch.equal(case.run(return_lse=False), got)


def laid_out(x: Tensor, kind: str) -> Tensor:
    """A cache [rows, slots, Hk, D] in another order of memory, or apart, or last dim with gaps."""
    if kind == "heads-first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "slots-first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "joined":
        return torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]]
    return testing.strided(x, kind)


KINDS = ("heads-first", "slots-first", "joined", "transposed", "sliced", "offset")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, dtype, block_size, kind):
    """Any strides are read, and the append writes into the very tensor."""
    with fastlm.use_backend(backend):
        case = Cache([3, 40, 290], 2, rows=2, block_size=block_size, dtype=dtype)
        want = case.run()
        case.q = testing.strided(case.q, "sliced" if kind == "sliced" else "transposed")
        for name in ("k_new", "v_new"):
            case.options[name] = testing.strided(case.options[name], "sliced")
        k, v = laid_out(case.k, kind), laid_out(case.v, kind)
        assert all(torch.equal(a, b) for a, b in zip(case.run(k, v), want, strict=True))
        check_written(Copied(case, k.clone(), v.clone()))


class Copied:
    """A case with the caches as they stand after the append."""

    def __init__(self, case: Cache, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.places = case.k, case.v, case.places
        self.lengths, self.new, self.dense = case.lengths, case.new, case.dense
        self.written = k, v


def batch_of(case: Cache, rows: list[int], **given: Any) -> tuple[Tensor, Tensor]:
    """Those rows alone."""
    options = {n: x[rows] for n, x in case.options.items()}
    k, v = (x if "block_table" in options else x[rows] for x in (case.k.clone(), case.v.clone()))
    lengths = ints([case.lengths[row] for row in rows])
    return fastlm.decode_attention(case.q[rows], k, v, lengths, return_lse=True, **options, **given)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, block_size", [(1, 0), (1, 16), (3, 0), (20, 7)])
def test_a_row_has_the_same_bits_in_any_batch(dtype, rows, block_size, threads):
    """Alone, beside others, in another order, on more threads, in any number of splits; with 20
    queries the batch is cut by query rows and one row alone by keys."""
    lengths = [2000, 1, 0, 513, 256, 700, 255, 90]
    with fastlm.use_backend("cpu"):
        case = Cache(lengths, 2, rows=rows, block_size=block_size, dtype=dtype)
        sink = torch.randn(4)
        threads(1)
        out, lse = case.run(sink=sink)
        for count in (1, 2, 5):
            threads(count)
            again, again_lse = case.run(sink=sink, num_splits=count)
            assert torch.equal(again, out) and torch.equal(again_lse, lse)
            for some in ([0], [3], [2], [5, 1], [7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 3]):
                part, part_lse = batch_of(case, some, sink=sink)
                assert torch.equal(part, out[some]) and torch.equal(part_lse, lse[some])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_queries(backend, dtype):
    """A prompt behind a cached prefix, over several chunks of keys."""
    with fastlm.use_backend(backend):
        for heads in ((6, 1), (16, 8)):
            check(Cache([600, 31, 0], 70, rows=70, heads=heads, sizes=(16, 24), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_far_apart(dtype):
    """Chunks whose weights underflow beside others, and a maximum in each of them."""
    for at in (0, 255, 256, 700):
        case = Cache([701], dtype=dtype)
        for row in case.dense:
            row[0][at] = case.q[0, 0, ::2].to(dtype) * 60
        case.k[0, :701] = case.dense[0][0]
        check(case)


def test_a_head_too_large_for_the_kernel():
    check(Cache([5], sizes=(1025, 4), heads=(1, 1)))
    if "cpu" in BACKENDS:
        check(Cache([5], sizes=(1024, 1030), heads=(1, 1)))


def test_batch_of_no_rows_and_no_queries():
    for backend in BACKENDS:
        with fastlm.use_backend(backend):
            out, lse = Cache([]).q, None
            cache = torch.randn(2, 4, 2, 8)
            out, lse = fastlm.decode_attention(out, cache, cache, ints([]), return_lse=True)
            assert out.shape == (0, 1, 4, 8) and lse.shape == (0, 4, 1)
            q = torch.randn(2, 0, 4, 8)
            out, lse = fastlm.decode_attention(q, cache, cache, 3, return_lse=True)
            assert out.shape == (2, 0, 4, 8) and lse.shape == (2, 4, 0)
            empty = torch.randn(2, 0, 2, 8)
            q = torch.randn(2, 1, 4, 8)
            out, lse = fastlm.decode_attention(q, empty, empty, 0, return_lse=True)
            assert bool((out == 0).all()) and bool((lse == NEG).all())
            new = torch.randn(2, 0, 2, 8)
            want = fastlm.decode_attention(q, cache, cache, 3)
            got = fastlm.decode_attention(q, cache, cache, 3, k_new=new, v_new=new)
            assert torch.equal(got, want)


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("block_size", [0, 7])
def test_all_rows_at_once(block_size, new):
    """The way a GPU goes, without a look at the lengths, finds the same."""
    case = Cache(LENGTHS, new, rows=3, block_size=block_size)
    slopes, pad = torch.rand(5, 4), ints([0, 0, 1, 5, 2])
    names = ("block_table", "cache_batch_idx")
    given = reference.Options(
        *(case.options.get(n) for n in names), pad, slopes, torch.randn(4), 0.3, 40, 0, 2.0, 0
    )
    caches = case.k.clone(), case.v.clone()
    case.written = caches
    if new:
        reference.append(*caches, *case.new_keys(), ints(case.lengths), given)
        check_written(case)
    total = ints(case.lengths) + new
    got = reference.together(case.q, *caches, total, given)
    torch.testing.assert_close(got, reference.one_by_one(case.q, *caches, total, given))


def test_a_row_that_does_not_exist_is_nan_where_nobody_looks():
    """What a GPU gives: NaN in its row, nothing written for it, the other rows unharmed."""
    case = Cache([4, 2, 6], 1, slots=8)
    want = case.run()[0]
    for lengths in ([4, 8, 6], [4, -1, 6], [9, 9, 9]):
        caches = case.k.clone(), case.v.clone()
        given = reference.Options(None, None, None, None, None, 8**-0.5, -1, 0, 0.0, 0)
        reference.append(*caches, *case.new_keys(), ints(lengths), given)
        out, lse = reference.together(case.q, *caches, reference.extended(ints(lengths), 1), given)
        for row, n in enumerate(lengths):
            good = n == case.lengths[row]
            if good:
                torch.testing.assert_close(out[row], want[row])
                torch.testing.assert_close(caches[0][row, n], case.dense[row][0][n])
            else:
                assert bool(out[row].isnan().all() & lse[row].isnan().all())
                assert torch.equal(caches[0][row].isnan(), case.k[row].isnan())
    table = ints([[0, 1], [5, 0], [-1, 2]])
    blocks = torch.randn(5, 4, 2, 8)
    given = reference.Options(table, None, None, None, None, 8**-0.5, -1, 0, 0.0, 0)
    out, _ = reference.together(case.q, blocks, blocks, ints([8, 4, 0]), given)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str]] = {
    "long": (
        {"cache_seqlens": ints(3, 9)},
        r"cache_seqlens must be in \[0, 8\] \(8 slots of a row\), got 9 at \[1\]",
    ),
    "negative": ({"cache_seqlens": ints(-1, 2)}, r"cache_seqlens must be .*, got -1 at \[0\]"),
    "new": (
        {"cache_seqlens": ints(3, 7), "k_new": torch.ones(2, 2, 2, 8)},
        r"cache_seqlens must be in \[0, 6\] \(8 slots of a row, 2 new\), got 7 at \[1\]",
    ),
    "int": ({"cache_seqlens": 9}, r"cache_seqlens must be in \[0, 8\] .*, got 9 at \[0\]"),
    "paged": (
        {"block_table": ints([[0], [1]]), "cache_seqlens": ints(3, 9)},
        r"in \[0, 8\] \(1 blocks of 8 of a row\), got 9 at \[1\]",
    ),
    "block": (
        {"block_table": ints([[0, 9], [1, 2]]), "cache_seqlens": ints(3, 9)},
        r"block_table must be in \[0, 2\) where it is used, got 2 at \[1, 1\]",
    ),
    "row": (
        {"cache_batch_idx": ints(0, 2)},
        r"cache_batch_idx must be in \[0, 2\), got 2 at \[1\]",
    ),
    "pad": ({"cache_leftpad": ints(0, -2)}, r"cache_leftpad must be >= 0, got -2 at \[1\]"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_range_is_named_before_anything_is_written(backend, case):
    options, message = OUT_OF_RANGE[case]
    q, k, v = torch.randn(2, 1, 4, 8), torch.zeros(2, 8, 2, 8), torch.zeros(2, 8, 2, 8)
    new = torch.ones(2, 1, 2, 8)
    options = {"cache_seqlens": ints(3, 4), "k_new": new, **options}
    options["v_new"] = options["k_new"]
    with fastlm.use_backend(backend), pytest.raises(IndexError, match=message):
        if case in ("long", "paged", "int"):
            del options["k_new"], options["v_new"]
        fastlm.decode_attention(q, k, v, **options)
    assert not bool(k.any() | v.any())


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q dims": ({"q": torch.ones(4, 8)}, ValueError, r"q must be \[\*, \*, \*, \*\]"),
    "head size": (
        {"k_cache": torch.ones(2, 8, 2, 9)},
        ValueError,
        r"k_cache must be \[\*, \*, \*, 8\]",
    ),
    "v": ({"v_cache": torch.ones(2, 7, 2, 8)}, ValueError, r"v_cache must be \[2, 8, 2, \*\]"),
    "heads": (
        {"q": torch.ones(2, 1, 3, 8)},
        ValueError,
        r"heads of q must be a multiple of 2 \(as k_cache\), got 3",
    ),
    "few rows": ({"q": torch.ones(3, 1, 4, 8)}, ValueError, "must be at least 3"),
    "dtype": ({"k_cache": torch.ones(2, 8, 2, 8).half()}, TypeError, "k_cache must be float32"),
    "integer q": ({"q": torch.ones(2, 1, 4, 8).int()}, TypeError, "q must be float64, float32"),
    "long": (
        {"cache_seqlens": torch.tensor([3, 4])},
        TypeError,
        r"cache_seqlens must be int32, got int64; call .int\(\) once per batch",
    ),
    "lengths": ({"cache_seqlens": ints(1, 2, 3)}, ValueError, r"cache_seqlens must be \[2\]"),
    "list": ({"cache_seqlens": [3, 4]}, TypeError, "cache_seqlens must be a tensor, got list"),
    "long table": (
        {"block_table": torch.tensor([[0], [1]])},
        TypeError,
        r"block_table must be int32, got int64; call",
    ),
    "table": ({"block_table": ints(0, 1)}, ValueError, r"block_table must be \[2, \*\]"),
    "both": (
        {"block_table": ints([[0], [1]]), "cache_batch_idx": ints(0, 1)},
        ValueError,
        "cache_batch_idx must be None with a block_table",
    ),
    "one new": ({"k_new": torch.ones(2, 1, 2, 8)}, ValueError, "given both or neither"),
    "new shape": (
        {"k_new": torch.ones(2, 1, 4, 8), "v_new": torch.ones(2, 1, 4, 8)},
        ValueError,
        r"k_new must be \[2, \*, 2, 8\]",
    ),
    "expanded": (
        {
            "k_cache": torch.ones(1, 8, 2, 8).expand(2, 8, 2, 8),
            "k_new": torch.ones(2, 1, 2, 8),
            "v_new": torch.ones(2, 1, 2, 8),
        },
        ValueError,
        "k_cache must be without expanded dimensions",
    ),
    "sink": ({"sink": torch.ones(3)}, ValueError, r"sink must be \[4\], got \[3\]"),
    "slopes": (
        {"alibi_slopes": torch.ones(2, 3)},
        ValueError,
        r"alibi_slopes must be \[4\] or \[2, 4\]",
    ),
    "window": ({"window": (-2, 0)}, ValueError, r"window\[0\] must be >= 0, or -1 or None"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be >= 0"),
    "splits": ({"num_splits": 0}, ValueError, "num_splits must be >= 1 or None"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(case):
    options, error, message = REJECTED[case]
    given = {"q": torch.ones(2, 1, 4, 8), "k_cache": torch.ones(2, 8, 2, 8)}
    given |= {"v_cache": torch.ones(2, 8, 2, 8), "cache_seqlens": ints(3, 4), **options}
    with pytest.raises(error, match=rf"fastlm\.decode_attention: .*{message}"):
        fastlm.decode_attention(**given)


@pytest.mark.parametrize("what", ["q", "k_cache", "v_cache", "k_new", "v_new", "sink"])
def test_gradient_is_refused(what):
    given = {"q": torch.ones(2, 1, 4, 8), "k_cache": torch.ones(2, 8, 2, 8), "sink": torch.ones(4)}
    given |= {"v_cache": torch.ones(2, 8, 2, 8), "k_new": torch.ones(2, 1, 2, 8)}
    given |= {"v_new": torch.ones(2, 1, 2, 8)}
    given[what] = given[what].requires_grad_()
    with pytest.raises(ValueError, match=f"{what} must be without gradient.*fastlm.attention"):
        fastlm.decode_attention(cache_seqlens=ints(3, 4), **given)
    with torch.no_grad():
        assert not fastlm.decode_attention(cache_seqlens=ints(3, 4), **given).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_cache_that_was_written_to_is_noticed(backend):
    cache = torch.randn(2, 8, 2, 8)
    weight = torch.randn(8, requires_grad=True)
    scored = cache * weight
    new = torch.randn(2, 1, 2, 8)
    with fastlm.use_backend(backend):
        q = torch.randn(2, 1, 4, 8)
        fastlm.decode_attention(q, cache, torch.zeros(2, 8, 2, 8), 3, k_new=new, v_new=new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scored.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes(backend):
    case = Cache([5, 40], 1, dtype=torch.bfloat16)
    with fastlm.use_backend(backend):
        want = case.run()
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(case.run(), want, strict=True))
            check_written(case)
        # q of another dtype takes that of the cache, as a projection in autocast would
        with torch.autocast("cpu", torch.bfloat16):
            case.q = case.q.float()
            assert all(torch.equal(a, b) for a, b in zip(case.run(), want, strict=True))


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, block_size):
    with fastlm.use_backend(backend):
        for new in (0, 2):
            case = Cache([5, 40], new, rows=2, block_size=block_size)
            shared = (ints(case.lengths), case.options.get("block_table"), None, ints([0, 2]))
            shared += (torch.rand(4), torch.randn(4), 0.3, 7, 0, 2.0, 0)
            tensors = (case.q, case.k, case.v, *(case.new_keys() if new else ()))
            name = "decode_attention_append" if new else "decode_attention"
            torch.library.opcheck(getattr(torch.ops.fastlm, name).default, (*tensors, *shared))


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, block_size):
    """Generates: one graph for growing lengths, which sees its own writes to the cache."""

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None, new: Tensor):
        first = fastlm.decode_attention(
            q, k, v, lengths, block_table=table, k_new=new, v_new=new + 1
        )
        # reads what the call above wrote
        again = fastlm.decode_attention(first, k, v, lengths + new.shape[1], block_table=table)
        return first + again, k.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    case = Cache([3, 5], 1, block_size=block_size, slots=64)
    k, v = case.k.nan_to_num(), case.v.nan_to_num()
    mine = [k.clone(), v.clone()]
    theirs = [k.clone(), v.clone()]
    lengths, table = ints(case.lengths), case.options.get("block_table")
    if table is not None:
        table = torch.randperm(k.shape[0])[: table.numel()].view_as(table).int()
    with fastlm.use_backend(backend):
        for rows in (1, 1, 3, 2):
            q, new = torch.randn(2, rows, 4, 8), torch.randn(2, rows, 2, 8)
            want = step(q, *mine, lengths, table, new)
            got = compiled(q, *theirs, lengths, table, new)
            torch.testing.assert_close(got, want)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
            lengths = lengths + rows


def test_explain():
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 8, 2, 8)
    found = fastlm.explain("decode_attention", q, cache, cache, 3)
    assert [e.op for e in found] == ["decode_attention"] and found[0].chosen in BACKENDS
