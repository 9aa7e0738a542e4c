"""Decoding the pairs that fire, and what is left of x: one pass over W_dec's rows, no reconstruction in between."""

# A kernel is subscripted by its grid, which only Triton knows.
# pyright: reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from neuraleraser.sae.kernels.select import Pairs

WIDTH = 256  # of a vector that one program makes
AT_ONCE = 16  # rows of W_dec in flight


@triton.jit
def _residual(
    into: Any,
    w_dec: Any,
    values: Any,
    cols: Any,
    row_start: Any,
    out: Any,
    squares: Any,
    d: Any,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """out[row] = into[row] - sum of values[j] * w_dec[cols[j]] over the row's pairs j, WIDTH of its d values."""
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * WIDTH + tl.arange(0, WIDTH)
    here = i < d
    x_hat = tl.zeros([WIDTH], tl.float32)
    end = tl.load(row_start + row + 1)
    for first in range(tl.load(row_start + row), end, AT_ONCE):
        j = first + tl.arange(0, AT_ONCE)
        real = j < end
        col = tl.load(cols + j, mask=real, other=0).to(tl.int64)
        z = tl.load(values + j, mask=real, other=0.0)
        rows = tl.load(w_dec + col[:, None] * d + i[None, :], mask=real[:, None] & here[None, :], other=0.0)
        x_hat += tl.sum(rows.to(tl.float32) * z[:, None], 0)
    at = row.to(tl.int64) * d + i
    e = tl.load(into + at, mask=here, other=0.0) - x_hat
    tl.store(out + at, e.to(out.dtype.element_ty), mask=here)
    tl.store(squares + row * tl.num_programs(1) + part, tl.sum(tl.where(here, e * e, 0.0), 0))


def residual(into: Tensor, w_dec: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(e [B, d] in w_dec's dtype, sum of its squares, a scalar float32): e = into - z W_dec for the pairs' sparse z,
    where into [B, d] float32 is x - b_dec. Summed in float32. The twin is `sparse.decode_at`."""
    b, d = into.shape
    width = min(WIDTH, triton.next_power_of_2(d))
    parts = triton.cdiv(d, width)
    out = torch.empty(b, d, dtype=w_dec.dtype, device=into.device)
    squares = torch.empty(b, parts, device=into.device)
    _residual[(b, parts)](
        into, w_dec, pairs.values, pairs.cols, pairs.row_start, out, squares, d, AT_ONCE=AT_ONCE, WIDTH=width
    )
    return out, squares.sum()
