"""The fast selection is the naive one, and the sparse gradients are the dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuraleraser.sae import sparse_ops
from neuraleraser.sae.sparse_ops import Weights, fired_pairs, select, unexplained_at


def naive(pre: Tensor, keep: int) -> Tensor:
    """[B, n] bool: positive and at least the keep-th largest of all."""
    cut = pre.flatten().sort(descending=True).values[min(keep, pre.numel()) - 1]
    return (pre >= cut) & (pre > 0)


def matrix(b: int, n: int, seed: int, kind: str) -> Tensor:
    """Pre-activations of a kind; each but the first is awkward for a guess made from few rows."""
    x = torch.randn(b, n, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return x.round()
    if kind == "bfloat16":
        return x.bfloat16()
    if kind == "few positive":
        return x - 2.5
    if kind == "uneven rows":
        return x + torch.linspace(-6, 2, b)[:, None]
    if kind == "sampled rows high":
        return torch.where((torch.arange(b) % max(1, b // sparse_ops.SAMPLE_ROWS) == 0)[:, None], x + 9, x)
    if kind == "one value":
        return torch.ones(b, n)
    if kind == "none":
        return -torch.ones(b, n)
    return x


KINDS = [
    "normal",
    "ties",
    "bfloat16",
    "few positive",
    "uneven rows",
    "sampled rows high",
    "one value",
    "none",
]


@given(
    b=st.integers(1, 300),
    n=st.integers(1, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
)
def test_fast_selection_equals_the_naive_one(b, n, share, seed, kind):
    pre = matrix(b, n, seed, kind)
    keep = max(1, int(share * n)) * b
    fired = select(lambda rows: pre[rows], b, n, keep)
    want = naive(pre, keep)
    assert torch.equal(fired.values, pre[want])  # boolean indexing goes row by row
    rows, cols = want.nonzero().unbind(1)
    assert torch.equal(fired.cols, cols)
    assert torch.equal(fired.counts, want.sum(0))
    assert torch.equal(fired.rows, rows)
    assert torch.equal(rows[fired.order], fired.rows_by_col)
    assert torch.equal(fired.col_start, want.sum(0).cumsum(0) - want.sum(0))
    assert torch.equal(fired.rows_by_col, want.T.nonzero()[:, 1])
    ends = want.sum(1).cumsum(0)
    assert torch.equal(fired.row_start, torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_in_several_blocks_too(kind, monkeypatch):
    monkeypatch.setattr(sparse_ops, "PRE_ACTIVATIONS_AT_ONCE", 64 * 50)
    pre = matrix(777, 64, 1, kind)
    fired = select(lambda rows: pre[rows], 777, 64, 777 * 3)
    assert torch.equal(fired.values, pre[naive(pre, 777 * 3)])


def test_selection_does_not_depend_on_the_order_of_the_batch():
    pre = matrix(200, 32, 0, "ties")
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = pre[order]
    a = select(lambda rows: pre[rows], 200, 32, 600)
    b = select(lambda rows: shuffled[rows], 200, 32, 600)
    assert torch.equal(a.counts, b.counts)


def case(seed: int, b: int = 7, n: int = 12, d: int = 5) -> tuple[Weights, Tensor, Tensor]:
    """Weights and x in float64, and a [b, n] mask of which no feature from 9 on is a part."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = torch.nn.functional.normalize(normal(n, d), dim=1)
    w = Weights(normal(n, d), normal(n), rows, normal(d))
    x = normal(b, d)
    mask = naive((x - w.b_dec) @ w.W_enc.T + w.b_enc, 3 * b)
    mask[:, 9:] = False
    return Weights(*(p.requires_grad_() for p in w)), x, mask


def dense_loss(w: Weights, x: Tensor, mask: Tensor) -> Tensor:
    """What a BatchTopK step should minimise, densely; the mask is held fixed."""
    pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    return (x - (pre * mask) @ w.W_dec - w.b_dec).square().sum() / (len(x) * 2.0)


def sparse_of(w: Weights, x: Tensor, mask: Tensor) -> sparse_ops.Fired:
    with torch.no_grad():
        pre = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    flat = mask.flatten().nonzero().squeeze(1)
    return fired_pairs(flat, pre.flatten()[flat], *pre.shape)


def main_loss(w: Weights, x: Tensor, fired: sparse_ops.Fired) -> Tensor:
    return unexplained_at(w, x, fired, torch.float64)[0] / (len(x) * 2.0)


def residual_of(w: Weights, x: Tensor, fired: sparse_ops.Fired) -> Tensor:
    return unexplained_at(w, x, fired, torch.float64)[1]


def test_gradients_of_the_whole_loss():
    """Against finite differences of the dense loss."""
    w, x, mask = case(0)

    def value(*params: Tensor) -> Tensor:
        return dense_loss(Weights(*params), x, mask)

    assert torch.autograd.gradcheck(value, tuple(w))
    main = main_loss(w, x, sparse_of(w, x, mask))
    torch.testing.assert_close(main, value(*w))
    torch.testing.assert_close(torch.autograd.grad(main, w), torch.autograd.grad(value(*w), w))


def test_gradcheck_of_the_sparse_path_itself():
    """Finite differences through the sparse code, whose kept values are recomputed with the weights."""
    w, x, mask = case(1)

    def value(*params: Tensor) -> Tensor:
        p = Weights(*params)
        return main_loss(p, x, sparse_of(p, x, mask))

    assert torch.autograd.gradcheck(value, tuple(w))


def test_a_vector_for_which_nothing_fires_is_reconstructed_as_the_bias():
    w, x, mask = case(2)
    mask[3] = False
    assert torch.equal(residual_of(w, x, sparse_of(w, x, mask))[3], (x - w.b_dec)[3])
    mask[:] = False
    loss, residual = unexplained_at(w, x, sparse_of(w, x, mask), torch.float64)
    assert torch.equal(residual, x - w.b_dec)
    to_enc, to_bias, to_dec, to_b_dec = torch.autograd.grad(loss, w)
    assert not to_enc.any() and not to_bias.any() and not to_dec.any()
    torch.testing.assert_close(to_b_dec, -2 * residual.sum(0))


def test_low_products_touch_the_gradient_of_values_alone(monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 the encoder's gradient is near, the decoder's the same; narrow rows are multiplied in float32."""
    w, x, mask = case(4)
    w = Weights(*(p.detach().float().requires_grad_() for p in w))
    fired = sparse_of(w, x.float(), mask)

    def grads(low: torch.dtype) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(unexplained_at(w, x.float(), fired, low)[0], w)

    want = grads(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(grads(torch.bfloat16), want, strict=True))
    monkeypatch.setattr("neuraleraser.sae.sparse_ops.MAX_FLOAT32_WIDTH", 0)
    got = grads(torch.bfloat16)
    assert torch.equal(got[2], want[2])
    assert not torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.01
