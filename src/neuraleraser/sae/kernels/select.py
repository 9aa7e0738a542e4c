"""Selection of the pre-activations that fire, exactly and without asking the host, after the encoder product.

Positive floats are ordered as their bits are, so the k-th largest is found bit by bit. For BatchTopK its bits are
narrowed down eight at a time by histograms of all B * n values (two for bfloat16, four for float32); for TopK one by
one, by counting in a row that stays in registers. Then every row is read once to count what it keeps and once to
write it: pairs come out ordered by row and by feature, without a sort and without atomic order.
"""

# A kernel is subscripted by its grid, which only Triton knows.
# pyright: reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BINS: tl.constexpr = tl.constexpr(256)
CHUNK = 2048  # values of a row that a program holds at a time
PROGRAMS = 1024  # of a pass over everything: enough to fill any device
LEVELS = {torch.bfloat16: (23, 15), torch.float32: (23, 15, 7, -1)}  # first of the eight bits; -1: the last seven


@dataclass(frozen=True)
class Pairs:
    """The kept (row, feature) pairs of a batch, in arrays of fixed length C that `total` of them fill.

    Beyond `total` values are 0, rows are B and features n.
    """

    values: Tensor  # [C] float32, > 0
    rows: Tensor  # [C] int32, ascending
    cols: Tensor  # [C] int32, ascending within a row
    row_start: Tensor  # [B + 1] int32, first pair of each row, then `total`
    cut: Tensor  # scalar float32: the smallest kept value, for TopK on average over rows; 0 where nothing is kept

    @property
    def total(self) -> Tensor:
        """Number of pairs, on the device."""
        return self.row_start[-1]


@dataclass(frozen=True)
class ByFeature:
    """The same pairs in order of feature."""

    values: Tensor  # [C] float32
    rows: Tensor  # [C] int32, ascending within a feature
    start: Tensor  # [n + 1] int32, first pair of each feature, then `total`


@triton.jit
def _bits(x: Any) -> Any:
    """The bits of values as float32, as integers: ascending for positive values, negative for the others."""
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _histogram(pre: Any, known: Any, hist: Any, size: Any, SHIFT: tl.constexpr, CHUNK: tl.constexpr) -> None:
    """Add to hist[256] the counts, by their next 8 bits, of positive values whose bits above those are `known`'s."""
    first = tl.load(known)
    counts = tl.zeros([BINS], tl.int32)
    start = tl.program_id(0).to(tl.int64) * CHUNK
    for at in range(start, size, tl.num_programs(0).to(tl.int64) * CHUNK):
        i = at + tl.arange(0, CHUNK)
        b = _bits(tl.load(pre + i, mask=i < size, other=0.0))
        if SHIFT >= 0:
            same = (b > 0) & ((b >> (SHIFT + 8)) == (first >> (SHIFT + 8)))
            counts += tl.histogram((b >> SHIFT) & 255, BINS, mask=same)
        else:
            same = (b > 0) & ((b >> 7) == (first >> 7))
            counts += tl.histogram((b & 127) << 1, BINS, mask=same)
    tl.atomic_add(hist + tl.arange(0, BINS), counts, sem="relaxed")


@triton.jit
def _narrow(hist: Any, known: Any, left: Any, SHIFT: tl.constexpr) -> None:
    """Add to `known` the bits of the left-th largest value counted in hist[256]; take from `left` what is larger."""
    bins = tl.arange(0, BINS)
    count = tl.load(hist + bins)
    reach = tl.cumsum(count, 0, reverse=True)  # values in this bin or a higher one
    wanted = tl.load(left)
    found = tl.max(tl.where(reach >= wanted, bins, 0), 0)
    larger = tl.sum(tl.where(bins > found, count, 0), 0)
    part = (found << SHIFT) if SHIFT >= 0 else (found >> 1)
    tl.store(known, tl.load(known) | part)
    tl.store(left, wanted - larger)


@triton.jit
def _row_cut(pre: Any, cut: Any, n: Any, k: Any, LOWEST: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """cut[row]: the bits of the row's k-th largest positive value, 0 where it has fewer."""
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    b = _bits(tl.load(pre + row.to(tl.int64) * n + i, mask=i < n, other=0.0))
    found = tl.full([], 0, tl.int32)
    for step in range(0, 31 - LOWEST):
        trial = found | (1 << (30 - step))
        found = tl.where(tl.sum((b >= trial).to(tl.int32), 0) >= k, trial, found)
    tl.store(cut + row, found)


@triton.jit
def _count(pre: Any, cut: Any, count: Any, smallest: Any, n: Any, PER_ROW: tl.constexpr, CHUNK: tl.constexpr) -> None:
    """count[row]: positive values of the row whose bits reach the cut; smallest[row]: the least of them, or inf."""
    row = tl.program_id(0)
    least = tl.maximum(tl.load(cut + row * PER_ROW), 1)
    kept = tl.zeros([CHUNK], tl.int32)
    small = tl.full([CHUNK], float("inf"), tl.float32)
    for at in range(0, n, CHUNK):
        i = at + tl.arange(0, CHUNK)
        x = tl.load(pre + row.to(tl.int64) * n + i, mask=i < n, other=0.0).to(tl.float32)
        keep = _bits(x) >= least
        kept += keep.to(tl.int32)
        small = tl.minimum(small, tl.where(keep, x, float("inf")))
    tl.store(count + row, tl.sum(kept, 0))
    tl.store(smallest + row, tl.min(small, 0))


@triton.jit
def _write(
    pre: Any,
    cut: Any,
    row_start: Any,
    values: Any,
    rows: Any,
    cols: Any,
    n: Any,
    room: Any,
    PER_ROW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write what `_count` counted, from row_start[row] on; nothing beyond `room`."""
    row = tl.program_id(0)
    least = tl.maximum(tl.load(cut + row * PER_ROW), 1)
    at = tl.load(row_start + row)
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        x = tl.load(pre + row.to(tl.int64) * n + i, mask=i < n, other=0.0).to(tl.float32)
        keep = (_bits(x) >= least).to(tl.int32)
        to = at + tl.cumsum(keep, 0) - keep
        mask = (keep > 0) & (to < room)
        tl.store(values + to, x, mask=mask)
        tl.store(cols + to, i, mask=mask)
        tl.store(rows + to, tl.zeros([CHUNK], tl.int32) + row, mask=mask)
        at += tl.sum(keep, 0)


def select(pre: Tensor, k: int, per_row: bool) -> Pairs:
    """The positive values of pre [B, n] among the k * B largest (BatchTopK) or the k largest of their row (TopK).

    Equal values at the cut are all kept, up to room for an eighth more than k * B: ties are common in bfloat16. The
    twin is `naive_pairs` in the tests.
    """
    b, n = pre.shape
    levels = LEVELS[pre.dtype]
    if per_row:
        cut = torch.empty(b, dtype=torch.int32, device=pre.device)
        width = triton.next_power_of_2(n)
        lowest = 16 if pre.dtype == torch.bfloat16 else 0
        _row_cut[(b,)](pre, cut, n, k, LOWEST=lowest, WIDTH=width, num_warps=min(16, max(4, width // 2048)))
    else:
        cut = torch.zeros(1, dtype=torch.int32, device=pre.device)
        left = torch.full((1,), b * k, dtype=torch.int32, device=pre.device)
        hist = torch.zeros(len(levels), 256, dtype=torch.int32, device=pre.device)
        programs = min(PROGRAMS, triton.cdiv(b * n, CHUNK))
        for level, shift in enumerate(levels):
            _histogram[(programs,)](pre, cut, hist[level], b * n, SHIFT=shift, CHUNK=CHUNK)
            _narrow[(1,)](hist[level], cut, left, SHIFT=shift)
    count = torch.empty(b, dtype=torch.int32, device=pre.device)
    smallest = torch.empty(b, device=pre.device)
    _count[(b,)](pre, cut, count, smallest, n, PER_ROW=int(per_row), CHUNK=CHUNK)
    room = b * k + max(1024, b * k // 8)
    row_start = torch.zeros(b + 1, dtype=torch.int32, device=pre.device)
    row_start[1:] = count.cumsum(0).clamp_max(room)
    values = torch.zeros(room, device=pre.device)
    rows = torch.full((room,), b, dtype=torch.int32, device=pre.device)
    cols = torch.full((room,), n, dtype=torch.int32, device=pre.device)
    _write[(b,)](pre, cut, row_start, values, rows, cols, n, room, PER_ROW=int(per_row), CHUNK=CHUNK)
    some = smallest < torch.inf
    if per_row:
        least = torch.where(some, smallest, 0.0).sum() / some.sum().clamp_min(1)
    else:
        least = smallest.amin().nan_to_num(posinf=0.0)
    return Pairs(values, rows, cols, row_start, least)


def by_feature(pairs: Pairs, n: int) -> ByFeature:
    """The pairs sorted by feature, of n, in one stable sort."""
    cols, order = torch.sort(pairs.cols, stable=True)
    edges = torch.arange(n + 1, dtype=torch.int32, device=cols.device)
    start = torch.searchsorted(cols, edges, out_int32=True)
    return ByFeature(pairs.values[order], pairs.rows[order], start)
