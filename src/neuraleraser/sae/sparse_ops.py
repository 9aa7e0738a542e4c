"""BatchTopK selection and sparse products, in work that grows with what fires rather than with B * n.

One encoder product per step has to touch all B * n pre-activations. It is made in blocks of rows that stay
in cache, and of each block only the few values that may survive are kept. All that follows (decoding, three
gradients) runs over those as weighted sums of rows, `embedding_bag` forwards, which sum in a fixed order; only the
gradient of the kept values is a product of two rows for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PRE_ACTIVATIONS_AT_ONCE = 2**22  # pre-activations made at a time: 8 MB in bfloat16; a product of fewer rows is slower
SAMPLE_ROWS = 64  # rows that the first guess of the cut is made from
MAX_FLOAT32_WIDTH = (
    512  # up to this width products of two rows are faster in float32 than converted to bfloat16 and back
)


class Weights(NamedTuple):
    """The trained tensors: [n, d], [n], [n, d] with rows of norm 1, [d]."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Fired:
    """The kept (row, feature) pairs of a batch [B, d], ordered by row, and once more by feature."""

    values: Tensor  # [m] pre-activations, all > 0
    rows: Tensor  # [m] int64, row of each pair
    cols: Tensor  # [m] int64, feature of each pair
    row_start: Tensor  # [B] int64, first pair of each row
    rows_by_col: Tensor  # [m] int64, row of each pair in order of feature
    order: Tensor  # [m] int64, by-row index of each pair in order of feature
    col_start: Tensor  # [n] int64, first pair of each feature in that order
    counts: Tensor  # [n] int64, pairs of each feature


def select(pre: Callable[[slice], Tensor], b: int, n: int, keep: int) -> Fired:
    """BatchTopK (Bussmann et al. 2024): the positive pre-activations among the `keep` largest of b * n.

    `pre` gives rows of the pre-activations: pre(rows) [len(rows), n]. All values that equal the smallest kept
    one are kept too, so the result does not depend on the order of rows or features. Exact: a sample of rows
    only guesses a floor; if fewer than `keep` values reach it, it is lowered.
    """
    floor = _guess_floor(pre, b, n, keep)
    flat, values = _values_above(pre, b, n, floor)
    while len(values) < keep and floor > 0:
        floor = floor / 2 if floor > 1e-6 else 0.0
        flat, values = _values_above(pre, b, n, floor)
    if len(values) > keep:
        kept = (values >= _cut(values, keep)).nonzero().squeeze(1)
        flat, values = flat.index_select(0, kept), values.index_select(0, kept)
    return fired_pairs(flat, values, b, n)


def _cut(values: Tensor, keep: int) -> Tensor:
    """The `keep`-th largest of values [m] > 0, a scalar."""
    if values.element_size() > 2:
        return values.topk(keep, sorted=False).values.min()
    # Of positive numbers the bits are in order, too, and sixteen of them are sorted without a comparison.
    return values.view(torch.int16).sort().values[-keep].view(values.dtype)


def fired_pairs(flat: Tensor, values: Tensor, b: int, n: int) -> Fired:
    """Index pairs given as ascending flat positions [m] into a [b, n] matrix, with their values [m]."""
    rows, cols = torch.div(flat, n, rounding_mode="floor"), flat.remainder(n)
    order = torch.sort(cols.short() if n <= 2**15 else cols, stable=True).indices  # fewer bits sort faster
    counts = torch.bincount(cols, minlength=n)
    return Fired(
        values=values,
        rows=rows,
        cols=cols,
        row_start=torch.searchsorted(rows, torch.arange(b, device=flat.device)),
        rows_by_col=rows[order],
        order=order,
        col_start=counts.cumsum(0) - counts,
        counts=counts,
    )


def _guess_floor(pre: Callable[[slice], Tensor], b: int, n: int, keep: int) -> float:
    """A floor that somewhat more than `keep` values should reach; 0 where positive values run short."""
    sample = pre(slice(0, b, max(1, b // SAMPLE_ROWS)))
    share = keep * sample.shape[0] / b
    rank = int(1.15 * share + 4 * share**0.5) + 1
    if rank >= sample.numel():
        return 0.0
    floor = float(sample.reshape(-1).topk(rank, sorted=False).values.min())
    return floor if 0 < floor < math.inf else 0.0  # infinity would never be exceeded, nor halved


def _values_above(pre: Callable[[slice], Tensor], b: int, n: int, floor: float) -> tuple[Tensor, Tensor]:
    """Flat positions (ascending) and values of all pre-activations > floor >= 0."""
    step = max(1, PRE_ACTIVATIONS_AT_ONCE // n)
    flat, values = [], []
    for start in range(0, b, step):
        block = torch.threshold_(pre(slice(start, min(start + step, b))).reshape(-1), floor, 0.0)
        at, kept = _nonzero(block)
        flat.append(at + start * n)
        values.append(kept)
    return torch.cat(flat), torch.cat(values)


def _nonzero(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and values of what is not 0 in a flat tensor, faster where that is little: whole eight-byte words
    first, then within those that are not 0."""
    each = 8 // x.element_size()
    if each == 1 or x.numel() % each:
        places = x.nonzero().squeeze(1)
        return places, x[places]
    words = x.view(torch.int64)
    some = words.nonzero().squeeze(1)
    values = words.index_select(0, some).view(x.dtype)
    # As integers, which are compared without being converted first: what `threshold` left is +0.0 or not zero.
    within = values.view(_INTEGERS[x.element_size()]).nonzero().squeeze(1)
    shift = each.bit_length() - 1
    places = (some.index_select(0, within >> shift) << shift) + (within & each - 1)
    return places, values.index_select(0, within)


_INTEGERS = {2: torch.int16, 4: torch.int32}


def _weighted_row_sums(index: Tensor, table: Tensor, start: Tensor, weights: Tensor) -> Tensor:
    """Per bag, the sum of weights[j] * table[index[j]]: [bags, d]."""
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=weights)


def _row_products(grad: Tensor, table: Tensor, fired: Fired) -> Tensor:
    """<grad[row], table[col]> [m] at the pairs alone, of grad [B, d] and table [n, d]: what `embedding_bag` calls the
    gradient of its weights, here without the forward pass that autograd would want first."""
    op = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return op(grad, table, fired.cols, fired.row_start, fired.rows, 0)  # 0: mode sum


def _to_encoder(grad: Tensor, into: Tensor, w_enc: Tensor, fired: Fired) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc [n, d], b_enc [n] and b_dec [d], from those of the kept values [m]; into = x - b_dec."""
    by_col = grad[fired.order]
    to_bias = torch.zeros_like(w_enc[:, 0]).index_add_(0, fired.cols, grad)
    return _weighted_row_sums(fired.rows_by_col, into, fired.col_start, by_col), to_bias, -(to_bias @ w_enc)


class _Unexplained(torch.autograd.Function):
    """(||x - x_hat||^2, a scalar, and x - x_hat [B, d], for looking at) through the kept pairs, differentiable in the
    weights. The gradients are written out, so that no tensor of x's size is made but the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        w_enc: Tensor,
        b_enc: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        fired: Fired,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        into = x - b_dec
        values = fired.values.to(x.dtype)
        residual = torch.sub(into, _weighted_row_sums(fired.cols, w_dec, fired.row_start, values))
        ctx.save_for_backward(w_enc, w_dec, into, values, residual)
        ctx.fired, ctx.matmul_dtype = fired, matmul_dtype
        ctx.mark_non_differentiable(residual)
        flat = residual.view(-1)
        return torch.dot(flat, flat), residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:  # pyright: ignore
        w_enc, w_dec, into, values, residual = ctx.saved_tensors
        f: Fired = ctx.fired
        factor = -2 * grad
        matmul_dtype = ctx.matmul_dtype if w_dec.shape[1] > MAX_FLOAT32_WIDTH else w_dec.dtype
        to_values = factor * _row_products(residual.to(matmul_dtype), w_dec.to(matmul_dtype), f).to(values.dtype)
        to_dec = _weighted_row_sums(f.rows_by_col, residual, f.col_start, (factor * values)[f.order])
        to_enc, to_bias, to_b_dec = _to_encoder(to_values, into, w_enc, f)
        return to_enc, to_bias, to_dec, to_b_dec + factor * residual.sum(0), None, None, None


class _EncodeAt(torch.autograd.Function):
    """The pre-activations at the kept pairs, as `select` found them; backward gives their exact gradients."""

    @staticmethod
    def forward(ctx: Any, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, x: Tensor, fired: Fired) -> Tensor:
        ctx.save_for_backward(w_enc, b_dec, x)
        ctx.fired = fired
        return fired.values.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore
        w_enc, b_dec, x = ctx.saved_tensors
        return *_to_encoder(grad, x - b_dec, w_enc, ctx.fired), None, None


class _Decode(torch.autograd.Function):
    """z W_dec for the sparse z given by values at pairs: [B, d]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, fired: Fired) -> Tensor:
        ctx.save_for_backward(values, w_dec)
        ctx.fired = fired
        return _weighted_row_sums(fired.cols, w_dec, fired.row_start, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        values, w_dec = ctx.saved_tensors
        f: Fired = ctx.fired
        grad = grad.contiguous()
        return (
            _row_products(grad, w_dec, f),
            _weighted_row_sums(f.rows_by_col, grad, f.col_start, values[f.order]),
            None,
        )


def unexplained_at(w: Weights, x: Tensor, fired: Fired, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ||x - x_hat||^2, a scalar, and x - x_hat [B, d] of x [B, d] through the kept pairs. The first is
    differentiable in the weights (not in x), the second in nothing. The products of rows in its gradient are made in
    `matmul_dtype`."""
    return _Unexplained.apply(*w, x, fired, matmul_dtype)  # pyright: ignore[reportReturnType]


def encode_at(w: Weights, x: Tensor, fired: Fired) -> Tensor:
    """The pre-activations [m] of x [B, d] at the kept pairs, differentiable in the weights (not in x)."""
    return _EncodeAt.apply(w.W_enc, w.b_enc, w.b_dec, x, fired)  # pyright: ignore[reportReturnType]


def decode_at(values: Tensor, w_dec: Tensor, fired: Fired) -> Tensor:
    """z W_dec [B, d] of the z that has `values` [m] at the kept pairs, differentiable in both."""
    return _Decode.apply(values, w_dec, fired)  # pyright: ignore[reportReturnType]
