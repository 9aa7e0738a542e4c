"""BatchTopK selection and sparse products, in work that grows with what fires rather than with B * n.

One encoder product per step has to touch all B * n pre-activations. It is made in blocks of rows that stay
in cache, and of each block only the few values that may survive are kept. All that follows (decoding, three
gradients) runs over those as weighted sums of rows: `embedding_bag` forwards, which sum in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**20  # pre-activations made at a time: 2 MB in bfloat16
SAMPLE_ROWS = 128  # rows that the first guess of the cut is made from


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
    floor = _guess(pre, b, n, keep)
    flat, values = _survivors(pre, b, n, floor)
    while len(values) < keep and floor > 0:
        floor = floor / 2 if floor > 1e-6 else 0.0
        flat, values = _survivors(pre, b, n, floor)
    if len(values) > keep:
        kept = values >= values.topk(keep, sorted=False).values.min()
        flat, values = flat[kept], values[kept]
    return pairs(flat, values, b, n)


def pairs(flat: Tensor, values: Tensor, b: int, n: int) -> Fired:
    """Index pairs given as ascending flat positions [m] into a [b, n] matrix, with their values [m]."""
    rows, cols = torch.div(flat, n, rounding_mode="floor"), flat.remainder(n)
    sorted_cols, order = torch.sort(cols, stable=True)
    return Fired(
        values=values,
        cols=cols,
        row_start=torch.searchsorted(rows, torch.arange(b, device=flat.device)),
        rows_by_col=rows[order],
        order=order,
        col_start=torch.searchsorted(sorted_cols, torch.arange(n, device=flat.device)),
        counts=torch.bincount(cols, minlength=n),
    )


def _guess(pre: Callable[[slice], Tensor], b: int, n: int, keep: int) -> float:
    """A floor that somewhat more than `keep` values should reach; 0 where positive values run short."""
    sample = pre(slice(0, b, max(1, b // SAMPLE_ROWS)))
    share = keep * sample.shape[0] / b
    rank = int(1.15 * share + 4 * share**0.5) + 1
    if rank >= sample.numel():
        return 0.0
    return max(0.0, float(sample.reshape(-1).topk(rank, sorted=False).values.min()))


def _survivors(pre: Callable[[slice], Tensor], b: int, n: int, floor: float) -> tuple[Tensor, Tensor]:
    """Flat positions (ascending) and values of all pre-activations >= floor and > 0."""
    step = max(1, BLOCK // n)
    flat, values = [], []
    for start in range(0, b, step):
        block = pre(slice(start, min(start + step, b))).reshape(-1)
        at = _nonzero(block >= floor if floor > 0 else block > 0)
        flat.append(at + start * n)
        values.append(block[at])
    return torch.cat(flat), torch.cat(values)


def _nonzero(mask: Tensor) -> Tensor:
    """mask.nonzero() of a flat bool tensor, faster where few are set: eight at a time, then within those."""
    if mask.numel() % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64)
    some = words.nonzero().squeeze(1)
    within = words[some].view(torch.bool).nonzero().squeeze(1)
    return some[within >> 3] * 8 + (within & 7)


def _bag(index: Tensor, table: Tensor, start: Tensor, weights: Tensor) -> Tensor:
    """Per bag, the sum of weights[j] * table[index[j]]: [bags, d]."""
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=weights)


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
        f: Fired = ctx.fired
        to_bias = torch.zeros_like(w_enc[:, 0]).index_add_(0, f.cols, grad)
        to_rows = _bag(f.rows_by_col, x - b_dec, f.col_start, grad[f.order])
        return to_rows, to_bias, -(to_bias @ w_enc), None, None


class _Decode(torch.autograd.Function):
    """z W_dec for the sparse z given by values at pairs: [B, d]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, fired: Fired) -> Tensor:
        ctx.save_for_backward(values, w_dec)
        ctx.fired = fired
        return _bag(fired.cols, w_dec, fired.row_start, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        values, w_dec = ctx.saved_tensors
        f: Fired = ctx.fired
        grad = grad.contiguous()
        to_rows = _bag(f.rows_by_col, grad, f.col_start, values[f.order])
        # embedding_bag's own backward for its weights is the product <grad_row, w_col> at the pairs alone.
        with torch.enable_grad():
            at = values.detach().requires_grad_()
            out = _bag(f.cols, w_dec.detach(), f.row_start, at)
        (to_values,) = torch.autograd.grad(out, at, grad)
        return to_values, to_rows, None


def reconstruct(w: Weights, x: Tensor, fired: Fired) -> Tensor:
    """x_hat [B, d] of x [B, d] through the kept pairs, differentiable in the weights (not in x)."""
    return decode_at(encode_at(w, x, fired), w.W_dec, fired) + w.b_dec


def encode_at(w: Weights, x: Tensor, fired: Fired) -> Tensor:
    """The pre-activations [m] of x [B, d] at the kept pairs, differentiable in the weights (not in x)."""
    return _EncodeAt.apply(w.W_enc, w.b_enc, w.b_dec, x, fired)  # pyright: ignore[reportReturnType]


def decode_at(values: Tensor, w_dec: Tensor, fired: Fired) -> Tensor:
    """z W_dec [B, d] of the z that has `values` [m] at the kept pairs, differentiable in both."""
    return _Decode.apply(values, w_dec, fired)  # pyright: ignore[reportReturnType]
