"""From residuals to new weights in one pass over the features: no gradient of a weight matrix ever reaches memory.

A program owns a feature: it walks the pairs in which the feature fires, gathers their residuals and inputs, sums both
gradients in registers, takes the part along the decoder row out, makes Adam's step and normalises the row. A feature
that fires very often would keep its program busy long after the others: its pairs are summed by several programs
first, in a second small kernel, in a fixed order.

A row of d values is held as two tiles that are powers of two, 1280 = 1024 + 256, so that few lanes idle.
"""

# A kernel is subscripted by its grid, which only Triton knows.
# pyright: reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from neuraleraser.sae.kernels.select import ByFeature

AT_ONCE = 4  # pairs in flight
SEGMENT = 1024  # pairs that one program walks at most


class Moments(NamedTuple):
    """A tensor that Adam trains, with its moments, all float32 and altered in place."""

    weight: Tensor
    first: Tensor
    second: Tensor


class Adam(NamedTuple):
    """One step's numbers."""

    lr: float
    step: int  # from 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10


@triton.jit
def _dot(head: Any, other: Any, tail: Any, other_tail: Any) -> Any:
    """Return the dot product of two rows held as two tiles each."""
    return tl.sum(head * other, 0) + tl.sum(tail * other_tail, 0)


@triton.jit
def _rows(base: Any, at: Any, real: Any, d: Any, i: Any) -> Any:
    """Values i of the rows `at`, as float32; 0 for rows that are not real and values beyond d."""
    return tl.load(base + at[:, None] * d + i[None, :], mask=real[:, None] & (i < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _walk(
    e: Any,
    into: Any,
    rows: Any,
    values: Any,
    start: Any,
    end: Any,
    w0: Any,
    w1: Any,
    d: Any,
    i0: Any,
    i1: Any,
    AT_ONCE: tl.constexpr,
) -> Any:
    """Over the pairs from start to end of a feature with decoder row w: the sums, still without the loss's factor, of
    z * e (for the decoder), of <e, w> * into (for the encoder), and of <e, w> (for its bias)."""
    dec0, dec1 = w0 * 0.0, w1 * 0.0
    enc0, enc1 = w0 * 0.0, w1 * 0.0
    bias = tl.full([], 0.0, tl.float32)
    for first in range(start, end, AT_ONCE):
        j = first + tl.arange(0, AT_ONCE)
        real = j < end
        row = tl.load(rows + j, mask=real, other=0).to(tl.int64)
        z = tl.load(values + j, mask=real, other=0.0)
        e0, e1 = _rows(e, row, real, d, i0), _rows(e, row, real, d, i1)
        x0, x1 = _rows(into, row, real, d, i0), _rows(into, row, real, d, i1)
        to_z = tl.sum(e0 * w0[None, :], 1) + tl.sum(e1 * w1[None, :], 1)
        dec0 += tl.sum(e0 * z[:, None], 0)
        dec1 += tl.sum(e1 * z[:, None], 0)
        enc0 += tl.sum(x0 * to_z[:, None], 0)
        enc1 += tl.sum(x1 * to_z[:, None], 0)
        bias += tl.sum(to_z, 0)
    return dec0, dec1, enc0, enc1, bias


@triton.jit
def _often(
    e: Any,
    into: Any,
    rows: Any,
    values: Any,
    start: Any,
    w_dec: Any,
    feature_of: Any,
    first_segment: Any,
    sums: Any,
    n: Any,
    d: Any,
    SEGMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """sums[segment] = (decoder row, encoder row, bias) of one segment of a feature that fires often."""
    segment = tl.program_id(0)
    feature = tl.load(feature_of + segment).to(tl.int64)
    if feature < n:
        i0, i1 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
        w0 = tl.load(w_dec + feature * d + i0, mask=i0 < d, other=0.0)
        w1 = tl.load(w_dec + feature * d + i1, mask=i1 < d, other=0.0)
        lo = tl.load(start + feature) + (segment - tl.load(first_segment + feature)) * SEGMENT
        hi = tl.minimum(lo + SEGMENT, tl.load(start + feature + 1))
        dec0, dec1, enc0, enc1, bias = _walk(e, into, rows, values, lo, hi, w0, w1, d, i0, i1, AT_ONCE)
        to = sums + segment.to(tl.int64) * (2 * d + 1)
        tl.store(to + i0, dec0, mask=i0 < d)
        tl.store(to + i1, dec1, mask=i1 < d)
        tl.store(to + d + i0, enc0, mask=i0 < d)
        tl.store(to + d + i1, enc1, mask=i1 < d)
        tl.store(to + 2 * d, bias)


@triton.jit
def _adam(
    p: Any, grad: Any, first: Any, second: Any, at: Any, mask: Any, lr: Any, fix: Any, b1: Any, b2: Any, eps: Any
):
    """The weights at p + at after Adam's step; writes the moments. lr is divided, fix the root, of bias corrections."""
    m = b1 * tl.load(first + at, mask=mask, other=0.0) + (1 - b1) * grad
    v = b2 * tl.load(second + at, mask=mask, other=0.0) + (1 - b2) * grad * grad
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    return tl.load(p + at, mask=mask, other=0.0) - lr * m / (tl.sqrt(v) / fix + eps)


@triton.jit
def _update(
    e: Any,
    into: Any,
    rows: Any,
    values: Any,
    start: Any,
    first_segment: Any,
    sums: Any,
    clip: Any,
    w_enc: Any,
    m_enc: Any,
    v_enc: Any,
    b_enc: Any,
    m_bias: Any,
    v_bias: Any,
    w_dec: Any,
    m_dec: Any,
    v_dec: Any,
    to_bias: Any,
    squares: Any,
    d: Any,
    factor: Any,
    lr: Any,
    fix: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    SEGMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Everything for one feature, from its pairs to its new rows; squares: of its gradient, before it is clipped."""
    feature = tl.program_id(0).to(tl.int64)
    i0, i1 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    k0, k1 = i0 < d, i1 < d
    at0, at1 = feature * d + i0, feature * d + i1
    w0, w1 = tl.load(w_dec + at0, mask=k0, other=0.0), tl.load(w_dec + at1, mask=k1, other=0.0)
    lo, hi = tl.load(start + feature), tl.load(start + feature + 1)
    segment, segments = tl.load(first_segment + feature), tl.load(first_segment + feature + 1)
    end = tl.where(segments > segment, lo, hi)  # the pairs of a feature that fires often are summed already
    dec0, dec1, enc0, enc1, bias = _walk(e, into, rows, values, lo, end, w0, w1, d, i0, i1, AT_ONCE)
    for s in range(segment, segments):
        of = sums + s * (2 * d + 1)
        dec0 += tl.load(of + i0, mask=k0, other=0.0)
        dec1 += tl.load(of + i1, mask=k1, other=0.0)
        enc0 += tl.load(of + d + i0, mask=k0, other=0.0)
        enc1 += tl.load(of + d + i1, mask=k1, other=0.0)
        bias += tl.load(of + 2 * d)
    dec0, dec1, enc0, enc1, bias = factor * dec0, factor * dec1, factor * enc0, factor * enc1, factor * bias
    tl.store(to_bias + feature, bias)
    along = _dot(dec0, w0, dec1, w1)
    dec0 -= along * w0
    dec1 -= along * w1
    tl.store(squares + feature, _dot(dec0, dec0, dec1, dec1) + _dot(enc0, enc0, enc1, enc1) + bias * bias)

    c = tl.load(clip)
    w0 = _adam(w_dec, c * dec0, m_dec, v_dec, at0, k0, lr, fix, b1, b2, eps)
    w1 = _adam(w_dec, c * dec1, m_dec, v_dec, at1, k1, lr, fix, b1, b2, eps)
    norm = tl.sqrt(_dot(w0, w0, w1, w1))
    tl.store(w_dec + at0, w0 / norm, mask=k0)
    tl.store(w_dec + at1, w1 / norm, mask=k1)
    tl.store(w_enc + at0, _adam(w_enc, c * enc0, m_enc, v_enc, at0, k0, lr, fix, b1, b2, eps), mask=k0)
    tl.store(w_enc + at1, _adam(w_enc, c * enc1, m_enc, v_enc, at1, k1, lr, fix, b1, b2, eps), mask=k1)
    tl.store(b_enc + feature, _adam(b_enc, c * bias, m_bias, v_bias, feature, feature >= 0, lr, fix, b1, b2, eps))


def tiles(d: int) -> tuple[int, int]:
    """Two powers of two, the first below d (or 1), that together hold d values."""
    head = max(1, triton.next_power_of_2(d) // 2)
    return head, triton.next_power_of_2(max(1, d - head))


def update(
    e: Tensor,
    into: Tensor,
    fired: ByFeature,
    factor: float,
    w_enc: Moments,
    b_enc: Moments,
    w_dec: Moments,
    adam: Adam,
    clip: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of W_enc [n, d], b_enc [n] and W_dec [n, d], in place, from the residual e [B, d] and into = x - b_dec
    [B, d], both in the dtype of the large products, where features fired.

    The gradients are `factor` times those of -||e||^2 / 2; the decoder's has the part along its row taken
    out; all are multiplied by the scalar `clip` on their way into Adam, and the decoder's rows end with norm 1.

    -> (gradient of b_enc [n], sum of squares of all these gradients before `clip`, a scalar).
    The twin is a step of `steps.plain_step`.
    """
    n, d = w_enc.weight.shape
    device = e.device
    count = fired.start.diff()
    segments = torch.where(count > SEGMENT, (count + SEGMENT - 1) // SEGMENT, 0)
    first_segment = torch.zeros(n + 1, dtype=torch.int32, device=device)
    first_segment[1:] = segments.cumsum(0)
    most = 2 * len(fired.values) // SEGMENT  # a feature of several segments fills more than half of them
    sums = torch.empty(max(1, most), 2 * d + 1, device=device)
    head, tail = tiles(d)
    shape = {"SEGMENT": SEGMENT, "AT_ONCE": AT_ONCE, "HEAD": head, "TAIL": tail, "num_warps": 4 if head <= 1024 else 8}
    if most:
        ids = torch.arange(most, dtype=torch.int32, device=device)
        feature_of = torch.searchsorted(first_segment[1:], ids, right=True, out_int32=True)
        _often[(most,)](
            e, into, fired.rows, fired.values, fired.start, w_dec.weight, feature_of, first_segment, sums, n, d, **shape
        )
    to_bias, squares = torch.empty(n, device=device), torch.empty(n, device=device)
    _update[(n,)](
        e,
        into,
        fired.rows,
        fired.values,
        fired.start,
        first_segment,
        sums,
        clip,
        *w_enc,
        *b_enc,
        *w_dec,
        to_bias,
        squares,
        d,
        factor,
        adam.lr / (1 - adam.beta1**adam.step),
        (1 - adam.beta2**adam.step) ** 0.5,
        adam.beta1,
        adam.beta2,
        adam.eps,
        **shape,
    )
    return to_bias, squares.sum()
